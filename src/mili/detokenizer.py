"""Token ids to text as they come, and the search for stop strings in that text.

    ids -> Detokenizer -> characters -> StopMatcher -> text that can be shown

Knows nothing of requests, vocabularies or sampling. Invariants: what the pieces of a `Detokenizer` join to is the
one-shot decoding of all its ids; what a `StopMatcher` does depends on the text, never on where it was cut into pieces.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenTable(Protocol):
    """What a `Detokenizer` needs of a tokenizer."""

    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, empty for an id without one."""
        ...


class Detokenizer:
    """Turns the token ids of one request into text, piece by piece.

    A token of byte-level BPE is a string of bytes and may end in the middle of a character. Those bytes are kept until
    the character is whole, so a piece never shows U+FFFD for bytes that later tokens complete. Work per token is
    proportional to its own bytes.
    """

    def __init__(self, tokens: TokenTable, *, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokens.token_bytes
        self._skipped = tokens.special_ids if skip_special_tokens else frozenset()
        # Malformed bytes become one U+FFFD per maximal subpart, as Unicode recommends and the tokenizers library does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that `token_ids` complete; often empty in scripts that spend several tokens on one."""
        skipped = self._skipped
        return self._utf8.decode(b"".join([self._token_bytes(i) for i in token_ids if i not in skipped]))

    def finish(self) -> str:
        """Flush: U+FFFD if the last character was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Finds the first of several stop strings in text that arrives in pieces (Aho and Corasick, 1975).

    The match that is completed first wins, and of those that end at the same character the longest. Text that may yet
    become a stop string is held back, no more than that: the longest suffix that begins one. Work per character does
    not depend on the number of stop strings.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        """`stop` holds no empty strings. None at all is allowed, and then nothing is held back."""
        assert all(stop), "SamplingParams refuses empty stop strings"
        self._include = include_stop_str_in_output
        self._build(stop)
        self._node = 0
        self._held = ""  # its length is the depth of self._node
        self.matched: str | None = None  # the stop string found

    def feed(self, text: str, *, match: bool = True) -> str:
        """Take `text` and return what can be shown: everything up to the text held back, or up to the match.

        After a match `matched` is set and this returns nothing more. With ``match=False`` (fewer than `min_tokens`
        tokens so far) a stop string completed inside `text` is ordinary text, though its end may begin another.
        """
        if self.matched is not None:
            return ""
        seen = self._held + text
        node = self._node
        for end, letter in enumerate(text, start=len(self._held) + 1):
            node = self._step(node, letter)
            if match and (found := self._found[node]) is not None:
                self.matched, self._held = found, ""
                return seen[: end if self._include else end - len(found)]
        while node and not self._next[node]:  # nothing can follow: only with match=False, after a whole stop string
            node = self._fallback[node]
        self._node = node
        shown = len(seen) - self._depth[node]
        self._held = seen[shown:]
        return seen[:shown]

    def finish(self) -> str:
        """Release what is held back: the text ends here, so it became no stop string."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _step(self, node: int, letter: str) -> int:
        while node and letter not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(letter, 0)

    def _build(self, stop: Sequence[str]) -> None:
        """Make the automaton. Node 0 is the empty string; every other node spells a beginning of a stop string."""
        self._next: list[dict[str, int]] = [{}]  # node -> letter -> the node one letter longer
        self._fallback = [0]  # node -> its longest proper suffix that is a node too
        self._found: list[str | None] = [None]  # node -> the longest stop string it ends with
        self._depth = [0]  # node -> its length
        for string in stop:
            node = 0
            for letter in string:
                if letter not in self._next[node]:
                    self._next[node][letter] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    self._found.append(None)
                    self._depth.append(self._depth[node] + 1)
                node = self._next[node][letter]
            self._found[node] = string
        queue = deque(self._next[0].values())
        while queue:  # by length, so that a node's fallback is complete before the node needs it
            node = queue.popleft()
            for letter, longer in self._next[node].items():
                self._fallback[longer] = self._step(self._fallback[node], letter)
                if self._found[longer] is None:
                    self._found[longer] = self._found[self._fallback[longer]]
                queue.append(longer)
