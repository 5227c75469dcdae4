"""Checked reading of one JSON object from a model folder.

Knows how to say what is wrong with a field; knows nothing of models. Every value that leaves this module has the type
its reader's name says, and every error names the file, the field and the value found.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mili.errors import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object stored in ``path``; ConfigError when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # both bad UTF-8 and bad JSON
        raise ConfigError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """One JSON object with typed access. ``null`` counts as absent, as it does in transformers."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source  # what error messages call this object

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value, or ``default`` when the key is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def wrong(self, name: str, expected: str) -> ConfigError:
        """The error for a field whose value is not what was expected."""
        return ConfigError(f"{self.source}: {name} must be {expected}, got {self._values.get(name)!r}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ConfigError(f"{self.source}: required field {name} is missing")
        return value

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least ``minimum``; required when there is no default."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0, above: bool = True) -> float:
        """A finite number above ``minimum`` (or equal to it when not ``above``); required when there is no default."""
        value = self._required(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < minimum or (above and value == minimum):
            raise self.wrong(name, f"a finite number {'above' if above else 'of at least'} {minimum:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self._required(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def strings(self, name: str) -> list[str] | None:
        """A list of strings, or None when absent."""
        value = self.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(name, "a list of strings")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A nested object; empty when absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def token_ids(self, name: str) -> frozenset[int]:
        """Token ids given as nothing, one integer, or a list of them."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.wrong(name, "a token id or a list of token ids")
        return frozenset(ids)
