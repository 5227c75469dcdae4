"""Whatever is fed in whatever pieces: the detokenizer equals one-shot decoding, the matcher equals a plain search."""

from collections.abc import Iterable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import mili
from mili.detokenizer import Detokenizer, StopMatcher, TokenTable
from mili.tokenizer import Tokenizer
from support.qwen3_tokenizer import qwen3_tokenizer_folder


@pytest.fixture(scope="module", params=["qwen3", "bundled"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    bundled = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
    return Tokenizer.from_pretrained(qwen3_tokenizer_folder() if request.param == "qwen3" else bundled)


def detokenizer_machine(tokenizer: Tokenizer, make: type[Detokenizer] = Detokenizer) -> type[RuleBasedStateMachine]:
    """A machine that feeds `make(tokenizer)` and compares with `Tokenizer.decode`, the tokenizers library's own."""
    size = tokenizer.vocab_size
    # The 256 single bytes make broken characters likely; ids past the vocabulary sit in the model's padded rows.
    ids = st.integers(0, 255) | st.integers(0, size - 1) | st.integers(size - 40, size + 300)

    class Machine(RuleBasedStateMachine):
        @initialize(skip=st.booleans())
        def start(self, skip: bool) -> None:
            self.skip = skip
            self.detokenizer = make(tokenizer, skip_special_tokens=skip)
            self.ids: list[int] = []
            self.text = ""

        def take(self, token_ids: list[int]) -> None:
            self.ids += token_ids
            self.text += self.detokenizer.feed(token_ids)
            # Nothing is shown that decoding does not confirm, and only one broken character may be missing (CPython
            # waits for a third byte to reject half a surrogate, ED A0, which one-shot decoding calls two errors).
            whole = tokenizer.decode(self.ids, skip_special_tokens=self.skip)
            assert whole.startswith(self.text)
            assert whole[len(self.text) :] in ("", "\ufffd", "\ufffd\ufffd")

        @rule(token_ids=st.lists(ids, max_size=8))
        def feed(self, token_ids: list[int]) -> None:
            self.take(token_ids)

        @rule(text=st.text(max_size=6))
        def feed_text_in_bytes(self, text: str) -> None:
            """Characters spelt in single-byte tokens, one token at a time."""
            for byte in text.encode("utf-8", "ignore"):
                self.take([byte_ids[byte]])

        def teardown(self) -> None:
            if not hasattr(self, "ids"):
                return
            text = self.text + self.detokenizer.finish()
            assert text == tokenizer.decode(self.ids, skip_special_tokens=self.skip)

    byte_ids = {data[0]: i for i in range(256) if len(data := tokenizer.token_bytes(i)) == 1}
    assert len(byte_ids) == 256, "both vocabularies begin with the single bytes"
    return Machine


def test_detokenizer_is_one_shot_decoding(tokenizer: Tokenizer) -> None:
    run_state_machine_as_test(detokenizer_machine(tokenizer), settings=settings(max_examples=150, deadline=None))


class DecodesTokensAlone(Detokenizer):
    """Planted bug: each token is decoded by itself."""

    def feed(self, token_ids: Iterable[int]) -> str:
        return "".join(super(DecodesTokensAlone, self).feed([i]) + self.finish() for i in token_ids)


class ForgetsTheTail(Detokenizer):
    """Planted bug: an unfinished character at the end is dropped."""

    def finish(self) -> str:
        return ""


class KeepsSpecialTokens(Detokenizer):
    """Planted bug: `skip_special_tokens` is ignored."""

    def __init__(self, tokens: TokenTable, *, skip_special_tokens: bool = True) -> None:
        super().__init__(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("bug", [DecodesTokensAlone, ForgetsTheTail, KeepsSpecialTokens])
def test_planted_bugs_are_found(tokenizer: Tokenizer, bug: type[Detokenizer]) -> None:
    machine = detokenizer_machine(tokenizer, bug)
    search_only = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=search_only)


# Stop strings over two letters overlap in every way.
words = st.text("ab", min_size=1, max_size=5)
pieces = st.lists(st.tuples(st.text("abc", max_size=6), st.booleans()), max_size=12)


def search(fed: list[tuple[str, bool]], stop: list[str], include: bool) -> tuple[str, str | None]:
    """What to show and the stop string found, by trying every stop string at every end."""
    text = "".join(piece for piece, _ in fed)
    counts = [match for piece, match in fed for _ in piece]
    for end in range(1, len(text) + 1):
        found = [string for string in stop if counts[end - 1] and text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(stop=st.lists(words, max_size=5), fed=pieces, include=st.booleans())
def test_stop_matcher_is_a_plain_search(stop: list[str], fed: list[tuple[str, bool]], include: bool) -> None:
    matcher = StopMatcher(stop, include_stop_str_in_output=include)
    shown = ""
    for i, (piece, match) in enumerate(fed):
        shown += matcher.feed(piece, match=match)
        if matcher.matched is None:
            seen = "".join(piece for piece, _ in fed[: i + 1])
            begins = {string[:n] for string in stop for n in range(1, len(string))}
            held = max((n for n in range(len(seen) + 1) if seen[len(seen) - n :] in begins), default=0)
            assert shown == seen[: len(seen) - held], "exactly what may begin a stop string is held back"
    assert (shown + matcher.finish(), matcher.matched) == search(fed, stop, include)
