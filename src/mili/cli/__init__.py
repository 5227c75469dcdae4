"""The `mili` command: one file per sub-command, `main.main` is the entry point."""
