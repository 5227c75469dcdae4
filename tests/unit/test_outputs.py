import dataclasses
import json

import pytest

import mili
from mili.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput


def completion(**fields) -> CompletionOutput:
    return CompletionOutput(**{"index": 0, "text": "hi", "token_ids": [1, 2], **fields})


def test_finish_reasons_are_vllms_strings():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort"]
    assert FinishReason.STOP == "stop"
    assert json.dumps(FinishReason.LENGTH) == '"length"'


def test_text_and_delta_are_the_first_completions():
    output = RequestOutput("0", "p", [1], [completion(delta="i"), completion(text="no")], finished=False)
    assert (output.text, output.delta) == ("hi", "i")


def test_a_completion_is_finished_with_a_reason():
    assert not completion().finished
    assert completion(finish_reason=FinishReason.ABORT).finished


def test_outputs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion().text = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Logprob(-1.0).rank = 2


def test_metrics_derive_durations_only_from_what_happened():
    waiting = RequestMetrics(arrival_time=10.0)
    assert waiting.queue_time is None
    assert waiting.time_to_first_token is None
    done = RequestMetrics(10.0, first_scheduled_time=10.5, first_token_time=12.0, finished_time=15.0)
    assert (done.queue_time, done.time_to_first_token) == (0.5, 2.0)


def test_every_public_name_can_be_imported_and_no_other():
    assert {name: getattr(mili, name) for name in mili.__all__}.keys() == set(dir(mili))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = mili.Nothing
