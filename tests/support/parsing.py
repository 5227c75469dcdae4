"""Drive an output parser as a server does: the ids and text lengths come from a real `Completion`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import ModuleType
from typing import Any

from mili import output_parser
from mili.completion import Completion
from mili.outputs import FinishReason
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer

ASSISTANT = "<|im_start|>assistant\n"


@dataclass
class Parsed:
    """What came of one run; two runs of the same completion must be equal."""

    content: str | None
    reasoning: str | None
    calls: list[tuple[str, str]]  # name, arguments
    num_reasoning_tokens: int
    text: str  # the engine's
    deltas: list[Any] = field(compare=False)


def parse(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    prompt: str = ASSISTANT,
    chunks: Iterable[int] | None = None,
    ends_with_stop_token: bool = False,
    finish_apart: bool = False,
    parse_reasoning: bool = True,
    parse_tools: bool = True,
    module: ModuleType = output_parser,
    **params: Any,
) -> Parsed:
    """Generate `token_ids` up to a stop string and parse them in `chunks` of that many tokens, or all at once.

    With `finish_apart` the end is told in a feed of its own, without ids.
    """
    sampling = SamplingParams(**params)
    completion = Completion(0, sampling, tokenizer)
    parser = module.OutputParser(
        tokenizer,
        tokenizer.encode(prompt),
        parse_reasoning=parse_reasoning,
        parse_tools=parse_tools,
        skip_special_tokens=sampling.skip_special_tokens,
    )
    message, deltas, fed = module.Message(), [], 0
    sizes = chain((len(token_ids) + 1,) if chunks is None else chunks, repeat(len(token_ids) + 1))

    def feed(finished: bool) -> None:
        nonlocal fed
        output = completion.snapshot()
        new = parser.feed(output.token_ids[fed:], len(output.text), finished)
        fed = len(output.token_ids)
        message.feed(new)
        deltas.extend(new)

    due = next(sizes)
    for at, token_id in enumerate(token_ids):
        if ends_with_stop_token and at == len(token_ids) - 1:
            completion.append_stop_token(token_id)
        elif completion.append(token_id):
            break
        if at + 1 == due and (finish_apart or at + 1 < len(token_ids)):
            feed(False)
            due += next(sizes)
    if finish_apart:
        feed(False)
    completion.finish(FinishReason.LENGTH, None)
    feed(True)
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    text = completion.snapshot().text
    return Parsed(message.content, message.reasoning, calls, parser.num_reasoning_tokens, text, deltas)


def parse_all_ways(tokenizer: Tokenizer, ids: str | list[int], **options: Any) -> Parsed:
    """Parse one-shot and token by token; both must agree."""
    ids = tokenizer.encode(ids) if isinstance(ids, str) else ids
    whole = parse(tokenizer, ids, **options)
    assert parse(tokenizer, ids, chunks=repeat(1), **options) == whole
    assert parse(tokenizer, ids, chunks=repeat(1), finish_apart=True, **options) == whole
    return whole


def message(parsed: Parsed) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    return parsed.reasoning, parsed.content, parsed.calls
