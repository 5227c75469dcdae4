"""The command group: one sub-command per file, and one place where errors become one line and an exit code.

It does not know what the commands do. Invariant: nothing heavier than click is imported before a command runs, so that
`mili --help` stays under half a second. Exit codes: 0 done, 1 a fault of mili's, 2 a mistake in what was asked,
130 Ctrl-C.
"""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

import mili
from mili.cli.bench import bench
from mili.cli.chat import chat
from mili.cli.compile import compile_command
from mili.cli.doctor import doctor
from mili.cli.generate import generate
from mili.cli.plan import plan
from mili.cli.run_batch import run_batch
from mili.cli.serve import serve
from mili.errors import MiliError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mili.__version__, prog_name="mili")
def program() -> None:
    """Run Qwen3 language models on mili's own kernels, on CPU and GPU."""


for _command in (generate, chat, serve, run_batch, plan, compile_command, bench, doctor):
    program.add_command(_command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. An error is one line, `error: ...`, and a traceback only with `--traceback`.

    Args:
        args: the words after the program's name; those of the process when None.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        status = program.main(words, "mili", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except Exception as error:
        if "--traceback" in words:
            traceback.print_exc()
        click.echo(f"error: {_one_line(error)}", err=True)
        sys.exit(2 if isinstance(error, (click.ClickException, MiliError, OSError)) else 1)
    sys.exit(status if isinstance(status, int) else 0)


def _one_line(error: Exception) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{_joined(error.format_message())} See '{error.ctx.command_path} --help'."
    if isinstance(error, click.ClickException):
        return _joined(error.format_message())
    if isinstance(error, (MiliError, OSError)):
        return _joined(str(error))
    return f"{type(error).__name__}: {_joined(str(error))} (--traceback shows where; please report it)"


def _joined(message: str) -> str:
    return " ".join(message.split())
