"""The process that meets unknown grammars first: it answers or is killed, and ends with its owner."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mili
from mili import MiliError
from mili.grammar_trial import GrammarTrial
from mili.tokenizer import Tokenizer

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
OVERFLOW = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} | "x" r{i * 13 % 3000}' for i in range(3000)) + '\nr3000: "x"'
SLOW = 'start: %json {"type": "integer", "multipleOf": 99999989}'


def vocabulary() -> dict[str, Any]:
    text = Tokenizer.from_pretrained(FOLDER).to_json()
    return {"tokenizer": text, "size": 8192, "eos_token_ids": [8166], "limits": {}}


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def trial() -> Iterator[GrammarTrial]:
    made = GrammarTrial(vocabulary, 1.0)
    yield made
    made.close()


def process_id(trial: GrammarTrial) -> int:
    assert trial._process is not None
    return trial._process.pid


def test_a_grammar_passes_whether_it_is_right_or_wrong(trial: GrammarTrial) -> None:
    assert trial.passes('start: "a"')
    first = process_id(trial)
    assert trial.passes("nonsense\n\x00é")
    assert process_id(trial) == first


@pytest.mark.parametrize("grammar", [OVERFLOW, SLOW], ids=["overflow", "slow"])
def test_a_hostile_grammar_fails_soon_and_the_next_has_a_new_process(trial: GrammarTrial, grammar: str) -> None:
    assert trial.passes('start: "a"')
    first, begun = process_id(trial), time.monotonic()
    assert not trial.passes(grammar)
    assert time.monotonic() - begun < 5
    assert not is_alive(first)
    assert trial.passes('start: "a"')
    assert process_id(trial) != first


def test_a_process_that_died_by_itself_is_noticed(trial: GrammarTrial) -> None:
    assert trial.passes('start: "a"')
    assert trial._process is not None
    trial._process.kill()
    trial._process.wait()
    assert not trial.passes('start: "a"')
    assert trial.passes('start: "a"')


def test_it_ends_with_its_owner() -> None:
    trial = GrammarTrial(vocabulary, 1.0)
    assert trial.passes('start: "a"')
    process = process_id(trial)
    del trial
    gc.collect()
    assert not is_alive(process)


def test_a_process_that_cannot_start_is_an_error_of_ours() -> None:
    trial = GrammarTrial(lambda: {"tokenizer": "nonsense", "size": 1, "eos_token_ids": [], "limits": {}}, 1.0)
    with pytest.raises(MiliError, match="did not start"):
        trial.passes('start: "a"')
    assert trial._process is None
