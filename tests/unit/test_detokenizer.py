"""Text appears character by character, and stop strings are found across token borders."""

import pytest

from mili.detokenizer import Detokenizer, StopMatcher


class Table:
    """A vocabulary of the 256 bytes, then "<eos>" (special), then nothing."""

    special_ids = frozenset({256})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>" if token_id == 256 else b""


def pieces(data: bytes) -> list[str]:
    detokenizer = Detokenizer(Table())
    return [*(detokenizer.feed([byte]) for byte in data), detokenizer.finish()]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"ab", ["a", "b", ""]),
        ("é".encode(), ["", "é", ""]),
        ("a👋".encode(), ["a", "", "", "", "👋", ""]),
        (b"\xf0\x9f\x91", ["", "", "", "\ufffd"]),  # never completed: one replacement for the whole part
        (b"\xf0\x9fa", ["", "", "\ufffda", ""]),  # completed by nothing: the next letter shows it
        (b"\xff\x80", ["\ufffd", "\ufffd", ""]),  # bytes that begin no character need not wait
        (b"", [""]),
    ],
)
def test_half_characters_wait(data: bytes, expected: list[str]) -> None:
    assert pieces(data) == expected


def test_several_ids_at_once() -> None:
    detokenizer = Detokenizer(Table())
    assert detokenizer.feed([0x61, 0xC3]) == "a"
    assert detokenizer.feed([]) == ""
    assert detokenizer.feed(iter([0xA9, 0x62])) == "éb"


@pytest.mark.parametrize(("skip", "expected"), [(True, "é"), (False, "\ufffd<eos>\ufffd")])
def test_special_tokens(skip: bool, expected: str) -> None:
    """A skipped token leaves no trace, as in one-shot decoding: the bytes on its two sides meet."""
    detokenizer = Detokenizer(Table(), skip_special_tokens=skip)
    assert detokenizer.feed([0xC3, 256, 0xA9]) + detokenizer.finish() == expected


def test_ids_without_a_token_are_nothing() -> None:
    assert Detokenizer(Table()).feed([0x61, 9999, 0x62]) == "ab"


def feed_all(matcher: StopMatcher, *texts: str) -> list[str]:
    return [matcher.feed(text) for text in texts]


def test_no_stop_strings_hold_nothing() -> None:
    matcher = StopMatcher([])
    assert feed_all(matcher, "a", "", "bc") == ["a", "", "bc"]
    assert (matcher.finish(), matcher.matched) == ("", None)


def test_match_across_pieces() -> None:
    matcher = StopMatcher(["STOP"])
    assert feed_all(matcher, "go S", "TO", "P now", "more") == ["go ", "", "", ""]
    assert (matcher.matched, matcher.finish()) == ("STOP", "")


def test_included_in_output() -> None:
    matcher = StopMatcher(["STOP"], include_stop_str_in_output=True)
    assert feed_all(matcher, "go S", "TOP now") == ["go ", "STOP"]
    assert matcher.matched == "STOP"


def test_a_false_start_is_released() -> None:
    matcher = StopMatcher(["STOP"])
    assert feed_all(matcher, "STO", "R", "Y") == ["", "STOR", "Y"]
    assert matcher.matched is None


def test_the_end_releases_what_was_held() -> None:
    matcher = StopMatcher(["\n\n"])
    assert feed_all(matcher, "a\n") == ["a"]
    assert (matcher.finish(), matcher.matched) == ("\n", None)


def test_only_the_longest_possible_beginning_is_held() -> None:
    assert StopMatcher(["aab"]).feed("xaaaa") == "xaa"


def test_the_first_to_be_completed_wins_then_the_longest() -> None:
    for stop in (["world", "lo", "hello"], ["hello", "lo", "world"]):
        matcher = StopMatcher(stop)
        assert (matcher.feed("say hello world"), matcher.matched) == ("say ", "hello")
    matcher = StopMatcher(["abcd", "bc"])
    assert (matcher.feed("abcd"), matcher.matched) == ("a", "bc")


def test_overlapping_beginnings() -> None:
    matcher = StopMatcher(["abcx", "bcd"])
    assert feed_all(matcher, "ab", "c", "d") == ["", "", "a"]
    assert matcher.matched == "bcd"


def test_text_fed_without_matching() -> None:
    """Before min_tokens a whole stop string is text, but its end may begin one that counts."""
    matcher = StopMatcher(["END"])
    assert matcher.feed("END", match=False) == "END"
    assert matcher.feed("E", match=False) == ""
    assert (matcher.feed("ND"), matcher.matched) == ("", "END")
    matcher = StopMatcher(["aba"])
    assert matcher.feed("xaba", match=False) == "xab"
    assert (matcher.feed("ba"), matcher.matched) == ("", "aba")


def test_ten_thousand_stop_strings() -> None:
    """Work per character is independent of their number: a search for each of them would take minutes here."""
    stop = [f"stop{i:05d}" for i in range(10_000)]
    matcher = StopMatcher(stop)
    text = "stop0 stop12 " * 4_000
    assert "".join(matcher.feed(letter) for letter in text) == text
    assert (matcher.feed("stop09999!"), matcher.matched) == ("", "stop09999")


def test_a_long_stop_string_that_nearly_matches_itself() -> None:
    matcher = StopMatcher(["a" * 1000 + "b"])
    assert sum(len(matcher.feed("a")) for _ in range(20_000)) == 19_000
    assert (matcher.feed("b"), matcher.matched) == ("", "a" * 1000 + "b")
