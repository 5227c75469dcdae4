"""The JSON body of one tool call, read while it arrives: its name, and the text of its arguments.

    {"name": "f", "arguments": {"a": [1, 2]}}
                               └── slice ──┘

Knows nothing of tokens, markers or messages. It follows the outer object strictly and everything nested in it by
quotes and brackets only, so arguments are handed on exactly as written, valid JSON or not. Invariant: what is announced
and the joined argument text depend on the body, never on where it was cut into pieces.
"""

import json
import re
from enum import Enum, auto

_IN_STRING = re.compile(r'[^"\\]*')
_IN_NESTED = re.compile(r'[^"{}\[\]]*')
_IN_SCALAR = re.compile(r"[-+.\w]*")
_SPACE = " \t\r\n"


class _At(Enum):
    """What the scanner expects or is inside of."""

    OPEN = auto()  # {
    FIRST_KEY = auto()  # a key, or } of an empty object
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    INSIDE = auto()  # a key or a value
    NEXT = auto()  # , or }
    END = auto()


class ToolCallScanner:
    """One body. It is announced once its name and the beginning of its arguments are known; there is no way back.

    Until then an error makes it malformed. After that, whatever cannot belong to the object ends it instead and is left
    in `rest`. Members other than "name" and "arguments" are passed over; a body without arguments has "{}".
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.announced = False
        self.malformed = False
        self.rest = ""  # text of the last piece that came after the end
        self._at = _At.OPEN
        self._raw: list[str] = []  # of the key or value at hand
        self._key: str | None = None  # None while a key is read
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._arguments: list[str] = []  # not returned yet
        self._in_arguments = False

    @property
    def ended(self) -> bool:
        """Whether the object is complete, or cannot go on."""
        return self._at is _At.END

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a JSON string."""
        return self._quoted

    def feed(self, text: str) -> str:
        """Take a piece of the body; returns the argument text that is new, nothing before `announced`."""
        at = 0
        while at < len(text) and not self.ended:
            if self._at is _At.INSIDE:
                end, is_complete = self._pass_over(text, at)
                (self._arguments if self._in_arguments else self._raw).append(text[at:end])
                at = end
                if is_complete:
                    self._close_value()
            elif text[at] in _SPACE:
                at += 1
            else:
                at = self._punctuation(text[at], at)
        self.rest = text[at:]
        if not self.announced:
            return ""
        new, self._arguments = "".join(self._arguments), []
        return new

    def _punctuation(self, letter: str, at: int) -> int:
        """One character of the outer object; returns where to go on, `at` itself for one that is not taken."""
        match self._at, letter:
            case _At.OPEN, "{":
                self._at = _At.FIRST_KEY
            case _At.FIRST_KEY | _At.NEXT, "}":
                self._close_object()
            case _At.NEXT, ",":
                self._at = _At.KEY
            case _At.FIRST_KEY | _At.KEY, '"':
                self._begin(letter)
                self._key = None
            case _At.COLON, ":":
                self._at = _At.VALUE
            case _At.VALUE, _:
                return self._open_value(letter, at)
            case _:
                self._fail()
                return at
        return at + 1

    def _open_value(self, letter: str, at: int) -> int:
        self._in_arguments = self._key == "arguments" and not self.announced
        if (self._in_arguments and letter != "{") or not (letter in '"{[' or _IN_SCALAR.fullmatch(letter)):
            self._fail()
            return at
        self._begin(letter)
        if self._in_arguments:
            self._arguments = [letter]
            self.announced = self.name is not None
        return at + 1

    def _begin(self, letter: str) -> None:
        """The first character of a key or value."""
        self._at, self._raw = _At.INSIDE, [letter]
        self._quoted, self._depth = letter == '"', int(letter in "{[")

    def _pass_over(self, text: str, at: int) -> tuple[int, bool]:
        """How far the key or value at hand goes on, to its next character that matters; and whether it is complete."""
        if self._escaped:
            self._escaped = False
            return at + 1, False
        if not self._quoted and self._depth == 0:
            at = _end(_IN_SCALAR, text, at)
            return at, at < len(text)
        at = _end(_IN_STRING if self._quoted else _IN_NESTED, text, at)
        if at == len(text):
            return at, False
        match text[at]:
            case "\\":
                self._escaped = True
            case '"':
                self._quoted = not self._quoted
            case "{" | "[":
                self._depth += 1
            case _:
                self._depth -= 1
        return at + 1, not self._quoted and self._depth == 0

    def _close_value(self) -> None:
        self._at = _At.NEXT
        self._in_arguments = False
        if self._key is None:
            self._key = _string("".join(self._raw))
            if self._key is None:
                self._fail()
            else:
                self._at = _At.COLON
        elif self._key == "name" and not self.announced:
            self.name = _string("".join(self._raw))
            if self.name and self.name.isprintable():  # not so a lone surrogate, which could not even be sent
                self.announced = bool(self._arguments)
            else:
                self._fail()

    def _close_object(self) -> None:
        if self.name is None:
            self._fail()
        elif not self.announced:
            self.announced, self._arguments = True, ["{}"]
        self._at = _At.END

    def _fail(self) -> None:
        self.malformed = not self.announced
        self._at = _At.END


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None, "every pattern matches the empty string"
    return found.end()


def _string(raw: str) -> str | None:
    """The JSON string `raw`; None when it is another value or has a bad escape."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
