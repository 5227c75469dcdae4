"""The forms in which a caller may give prompts, brought into one.

It knows types only: no tokenizer, no vocabulary. Invariant: what it returns is never ambiguous between one prompt given
as token ids and a list of prompts, because a list of integers is always one prompt.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mili.errors import RequestError
from mili.sampling_params import SamplingParams

# Text, token ids, or vLLM's dicts {"prompt": text} and {"prompt_token_ids": ids}.
PromptLike: TypeAlias = str | Sequence[int] | Mapping[str, Any]
Messages: TypeAlias = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...} in order

_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; at least one of the two is set, and the ids win."""

    text: str | None = None
    token_ids: list[int] | None = None


def parse_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[Prompt]:
    """One prompt, or a list of prompts, as a list. Raises RequestError naming the prompt that is none."""
    if isinstance(prompts, (str, Mapping)):
        return [_parse(prompts, "prompt")]
    items = _items(prompts, "prompts")
    if not items:
        raise RequestError("no prompt: prompts is empty")
    if all(_is_integer(item) for item in items):
        return [_parse(items, "prompt")]
    return [_parse(item, f"prompts[{index}]") for index, item in enumerate(items)]


def parse_conversations(messages: Messages | Sequence[Messages]) -> list[Any]:
    """One conversation, or a list of them, as a list; what is in each is not looked at. Raises RequestError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(
            f"messages must be a list of {{'role': ..., 'content': ...}} dicts, or a list of such lists, "
            f"got {type(messages).__name__}"
        )
    items: list[Any] = list(messages)
    if not items:
        raise RequestError("no conversation: messages is empty")
    return [items] if isinstance(items[0], Mapping) else items


def match_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, default: SamplingParams
) -> list[SamplingParams]:
    """One `SamplingParams` for each prompt: the one given for all, one each, or `default`. Raises RequestError."""
    if params is None:
        return [default] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    items: list[Any] = list(params) if isinstance(params, Iterable) else [params]
    for item in items:
        if not isinstance(item, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, or one for each prompt, got {item!r}")
    if len(items) != num_prompts:
        raise RequestError(
            f"sampling_params has {len(items)} entries for {num_prompts} prompts: give one for all or one for each"
        )
    return items


def _parse(prompt: Any, name: str) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if not isinstance(prompt, Mapping):
        return Prompt(token_ids=_token_ids(prompt, name))
    if unknown := [key for key in prompt if key not in _KEYS]:
        raise RequestError(f"{name} has the unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{name}['prompt'] must be a str, got {type(text).__name__}")
    if text is None and ids is None:
        raise RequestError(f"{name} must have 'prompt' or 'prompt_token_ids'")
    return Prompt(text=text, token_ids=None if ids is None else _token_ids(ids, f"{name}['prompt_token_ids']"))


def _token_ids(value: Any, name: str) -> list[int]:
    ids = _items(value, name)
    if set(map(type, ids)) == {int}:  # the usual case, many times faster than a look at each
        return ids
    for index, item in enumerate(ids):
        if not _is_integer(item):
            raise RequestError(f"{name}[{index}] must be a token id, got {item!r}")
    return [operator.index(item) for item in ids]


def _items(value: Any, name: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be text, token ids or a list of them, got {type(value).__name__}")
    if callable(to_list := getattr(value, "tolist", None)):  # an array or a tensor, whose items are no plain integers
        value = to_list()
        return value if isinstance(value, list) else _items(value, name)  # no list: it had no dimension
    return list(value)


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__") and not hasattr(value, "__len__")
