"""JSON as the server writes it: compact, UTF-8, always encodable."""

import json
from typing import Any

json_text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""A value as JSON text; for a `str` this is one call into C."""


def json_bytes(value: Any) -> bytes:
    """A value as a JSON body; a lone surrogate that a client sent comes back as "?"."""
    return json_text(value).encode("utf-8", "replace")
