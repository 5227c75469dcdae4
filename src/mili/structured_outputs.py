"""What form the text of a completion must have, as the caller states it: one of five kinds.

The field names are vLLM's. It checks that a form is well put and not too large; it knows no grammar engine and no
tokens, so whether any text has the form is found when the request meets the engine. Invariant: a
``StructuredOutputsParams`` that exists names exactly one form, never changes, and can be a dictionary's key.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mili.errors import RequestError

__all__ = ["MAX_FORM_BYTES", "MAX_JSON_NESTING", "StructuredOutputsParams"]

MAX_FORM_BYTES = 128 * 1024
"""Longest schema, expression or grammar, and longest list of choices, in bytes of UTF-8."""

MAX_JSON_NESTING = 100
"""Most objects and arrays inside one another in a JSON schema."""

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a completion's text: exactly one of the fields is given.

    Attributes:
        json: A JSON schema, as a mapping or as JSON text; stored as JSON text.
        regex: A regular expression in Rust's syntax, which the whole text matches.
        choice: The texts of which the completion is one; stored as a tuple.
        grammar: A Lark grammar as llguidance takes it.
        json_object: True for any JSON object.

    Raises:
        RequestError: None or several are given, or one is malformed or too large; the message names the field.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"got {', '.join(given)}" if given else "got none"
            raise RequestError(f"structured_outputs takes exactly one of {', '.join(_KINDS)}: {found}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.json_object is not None and self.json_object is not True:
            raise RequestError(f"structured_outputs.json_object must be True or left out, got {self.json_object!r}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)


def _schema(value: Any) -> str:
    """A JSON schema as text that is known to parse, to be an object and to be shallow enough for any parser."""
    name = "json"
    try:
        text = json.dumps(dict(value), allow_nan=False) if isinstance(value, Mapping) else value
        _check_text(name, text)
        parsed = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"structured_outputs.json is not a JSON schema: {error}") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"structured_outputs.json must be a JSON object, got {type(parsed).__name__}")
    level: list[Any] = [parsed]
    for _ in range(MAX_JSON_NESTING):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, (dict, list))]
        if not level:
            return str(text)
    raise _too_deep()


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"structured_outputs.choice must be a list of strings, got {value!r}")
    choices = tuple(value)
    for choice in choices:
        if not isinstance(choice, str):
            raise RequestError(f"structured_outputs.choice must hold strings, got {choice!r}")
    if not choices:
        raise RequestError("structured_outputs.choice is empty: give at least one string")
    _check_text("choice", "".join(choices), may_be_empty=True)
    return choices


def _check_text(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise RequestError(f"structured_outputs.{name} must be a non-empty string, got {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"structured_outputs.{name} is not valid Unicode: {error.reason}") from error
    if size > MAX_FORM_BYTES:
        raise RequestError(
            f"structured_outputs.{name} has {size} bytes, the limit is {MAX_FORM_BYTES}: give a smaller one"
        )


def _too_deep() -> RequestError:
    return RequestError(
        f"structured_outputs.json is nested more than {MAX_JSON_NESTING} deep: use $defs and $ref, or a flatter schema"
    )
