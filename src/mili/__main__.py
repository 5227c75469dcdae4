"""`python -m mili` is the `mili` command."""

from mili.cli.main import main

if __name__ == "__main__":
    main()
