"""Token ids to text with marker tokens set apart, released as far as the engine shows it.

Knows nothing of what the markers mean. Invariant: the pieces given so far join to the engine's text so far, except that
a marker waits until all of it is shown or the text has ended.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from mili.detokenizer import Detokenizer
from mili.tokenizer import Tokenizer


@dataclass(slots=True)
class Piece:
    """One marker, or a run of other tokens; a marker's text is empty where special tokens are skipped."""

    text: str
    marker: str | None
    num_tokens: int  # tokens that begin in it


class MarkedText:
    """Decodes one completion.

    A marker is known by its id alone: the same characters spelt in other tokens are text. One that a stop string cuts
    or hides is still given, with what is shown of it, when all text before it is shown.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Mapping[int, str], *, skip_special_tokens: bool) -> None:
        self._markers = markers
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._waiting: deque[Piece] = deque()
        self._position = 0  # characters of the engine's text given so far
        self._finished = False

    def feed(self, token_ids: Sequence[int], text_len: int, finished: bool) -> list[Piece]:
        """Take new ids, of an engine's text that has `text_len` characters now; returns the pieces that it shows."""
        assert not self._finished and text_len >= self._position
        self._finished = finished
        self._decode(token_ids)
        given: list[Piece] = []
        while self._waiting:
            piece = self._waiting[0]
            shown = piece.text[: text_len - self._position]
            is_cut = len(shown) < len(piece.text)
            if is_cut and piece.marker is not None and not finished:
                break
            given.append(Piece(shown, piece.marker, piece.num_tokens))
            self._position += len(shown)
            if is_cut:
                piece.text, piece.num_tokens = piece.text[len(shown) :], 0
                break
            self._waiting.popleft()
        if finished:
            assert self._position == text_len, "the engine's text is not the beginning of what the ids decode to"
            hidden = takewhile(lambda piece: piece.marker is None, self._waiting)
            given.append(Piece("", None, sum(piece.num_tokens for piece in hidden)))
        return given

    def _decode(self, token_ids: Sequence[int]) -> None:
        start = 0
        for at, token_id in enumerate(token_ids):
            marker = self._markers.get(token_id)
            if marker is not None:
                self._decode_run(token_ids[start:at])
                text = self._detokenizer.feed((token_id,))
                broken_off = text.removesuffix(marker)  # U+FFFD for a character that the marker left incomplete
                self._waiting.append(Piece(broken_off, None, 0))
                self._waiting.append(Piece(text[len(broken_off) :], marker, 1))
                start = at + 1
        self._decode_run(token_ids[start:])
        if self._finished:
            self._waiting.append(Piece(self._detokenizer.finish(), None, 0))

    def _decode_run(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._waiting.append(Piece(self._detokenizer.feed(token_ids), None, len(token_ids)))
