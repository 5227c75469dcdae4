from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mili
from mili.completion import Completion, token_logprobs
from mili.outputs import FinishReason, Logprob
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(Path(mili.__file__).parent / "data" / "tiny-qwen3-code")


def make(text: str, **options) -> tuple[Completion, list[int]]:
    return Completion(0, SamplingParams(**options), TOKENIZER), TOKENIZER.encode(text)


def test_text_held_back_for_a_stop_string_comes_out_at_the_end():
    completion, ids = make("one two", stop=["two three"])
    assert not any(completion.append(i) for i in ids)
    assert completion.snapshot().text == "one "
    completion.finish(FinishReason.LENGTH, None)
    last = completion.snapshot()
    assert (last.text, last.delta) == ("one two", "two")
    assert (last.finish_reason, last.stop_reason) == ("length", None)


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_half_a_character_is_shown_only_at_the_end(stop):
    completion, ids = make("🙂", stop=stop)
    assert len(ids) > 1
    for i in ids[:-1]:
        completion.append(i)
    assert completion.snapshot().text == ""
    completion.finish(FinishReason.LENGTH, None)
    assert completion.snapshot().text == "\ufffd"


def test_a_stop_string_wins_over_the_reason_given():
    completion, ids = make("one two", stop=["two"])
    assert [completion.append(i) for i in ids][-1]
    completion.finish(FinishReason.LENGTH, None)
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, "two")


def test_snapshots_do_not_change_and_deltas_start_anew():
    completion, ids = make("one two three", logprobs=0)
    for i in ids:
        completion.append(i)
        completion.add_logprobs({i: Logprob(-0.5, 1)})
        if i == ids[0]:
            first = completion.snapshot()
    second = completion.snapshot()
    assert (len(first.token_ids), len(first.logprobs), first.cumulative_logprob) == (1, 1, -0.5)
    assert second.delta == second.text.removeprefix(first.text)
    assert second.cumulative_logprob == -0.5 * len(ids)
    assert completion.snapshot().delta == ""


def step(top_ids, top_logprobs):
    return SimpleNamespace(
        logprobs=np.array([-1.5], np.float32),
        ranks=np.array([4], np.int32),
        top_ids=np.array([top_ids], np.int32),
        top_logprobs=np.array([top_logprobs], np.float32),
    )


def test_token_logprobs_leaves_out_the_places_of_a_tiny_vocabulary():
    entry = token_logprobs(step([5, 6, -1, -1], [-0.5, -1.0, -np.inf, -np.inf]), 0, 9, 4, None)
    assert entry == {9: Logprob(-1.5, 4), 5: Logprob(-0.5, 1), 6: Logprob(-1.0, 2)}


def test_the_chosen_token_keeps_its_own_rank_among_the_likeliest():
    entry = token_logprobs(step([5, 9, 6], [-0.5, -1.5, -2.0]), 0, 9, 2, TOKENIZER)
    assert list(entry) == [9, 5]
    assert entry[9].rank == 4
    assert entry[5].decoded_token == TOKENIZER.token_text(5)
