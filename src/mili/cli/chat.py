"""`mili chat`: talk to a model, turn by turn.

The conversation lives here, as the message list that the chat template renders; the prefix cache makes each turn pay
for its new tokens only. Invariant: a turn that fails before its first token leaves the conversation as it was.
"""

import sys
from typing import TYPE_CHECKING, Any

import click

from mili.cli.options import build_llm, build_sampling_params, model_options, sampling_options, traceback_option
from mili.errors import RequestError

if TYPE_CHECKING:
    from mili.llm import LLM
    from mili.sampling_params import SamplingParams

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


@click.command()
@click.option("--system", help="A system message that opens the conversation.")
@click.option("--thinking/--no-thinking", default=None, help="Let the model think before it answers (enable_thinking).")
@model_options
@sampling_options
@traceback_option
def chat(system: str | None, thinking: bool | None, **options: Any) -> None:
    """Hold a conversation, line by line."""
    template_kwargs = {} if thinking is None else {"enable_thinking": thinking}
    opening = [] if system is None else [{"role": "system", "content": system}]
    if sys.stdin is None:  # closed by whoever started this process
        raise click.UsageError("no standard input to read messages from.")
    interactive = sys.stdin.isatty()
    with build_llm(options) as llm:
        params = build_sampling_params(llm, options)
        if interactive:
            import readline  # noqa: F401  (gives input() line editing and history)

            click.echo(_HELP, err=True)
        messages = list(opening)
        while (line := _read_line(interactive)) is not None:
            command = line.strip()
            if command == "/exit":
                break
            if command == "/reset":
                messages = list(opening)
            elif command == "/help":
                click.echo(_HELP, err=True)
            elif command.startswith("/") and command.removeprefix("/").isalpha() and interactive:
                click.echo(f"unknown command {command}: {_HELP}", err=True)
            elif command:
                _turn(llm, messages, line, params, template_kwargs, interactive)


def _read_line(interactive: bool) -> str | None:
    """One line of input; None at its end. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo(err=True)


def _turn(
    llm: "LLM",
    messages: list[dict[str, Any]],
    line: str,
    params: "SamplingParams",
    template_kwargs: dict[str, Any],
    interactive: bool,
) -> None:
    """Answer `line` and append both to `messages`; a stopped answer is kept as far as it got."""
    messages.append({"role": "user", "content": line})
    answer = ""
    try:
        for output in llm.stream_chat(messages, params, chat_template_kwargs=template_kwargs):
            answer = output.text
            click.echo(output.delta, nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo()
        click.echo("[stopped]", err=True)
    except RequestError as error:
        messages.pop()
        if not interactive:
            raise
        click.echo(f"error: {error} (/reset starts over)", err=True)
        return
    if answer:
        messages.append({"role": "assistant", "content": answer})
    else:
        messages.pop()
