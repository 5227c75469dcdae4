from pathlib import Path

import mili
from mili.admission import bad_word_ids
from mili.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(Path(mili.__file__).parent / "data" / "tiny-qwen3-code")


def spelt(*words: str) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in bad_word_ids(words, TOKENIZER)]


def test_bad_words_are_found_at_the_start_and_after_a_space():
    assert spelt("return") == spelt("  return") == ["return", " return"]


def test_white_space_is_a_bad_word_like_any_other():
    assert spelt("\n", "    ", "\t") == ["\n", "    ", "\t"]
