"""SamplingParams: every value is stored in one form, or refused with the name of its field."""

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from mili.errors import RequestError
from mili.sampling_params import SamplingParams


def test_defaults_change_nothing() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.max_tokens is None and params.logprobs is None and params.seed is None
    assert not params.stop and not params.stop_token_ids and not params.bad_words


def test_values_are_normalised() -> None:
    given: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": -1,
        "stop": "END",
        "stop_token_ids": np.array([3, 4]),
        "bad_words": ["a", "b"],
        "logit_bias": {"7": 1, 8: np.float64(-2)},
        "logprobs": np.int64(3),
    }
    params = SamplingParams(**given)
    assert type(params.temperature) is float and params.temperature == 0.5
    assert params.top_k == 0 and params.stop == ("END",) and params.stop_token_ids == (3, 4)
    assert params.bad_words == ("a", "b") and params.logit_bias == {7: 1.0, 8: -2.0}
    assert type(params.logprobs) is int and all(type(t) is int for t in params.stop_token_ids)


def test_none_means_no_list() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None)  # type: ignore[arg-type]
    assert params == SamplingParams()


def test_the_callers_containers_are_copied() -> None:
    bias, stops = {1: 1.0}, [5]
    params = SamplingParams(logit_bias=bias, stop_token_ids=stops)
    bias[2] = 3.0
    stops.append(6)
    assert params.logit_bias == {1: 1.0} and params.stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", b"1"),
        ("temperature", 10**400),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-7),
        ("repetition_penalty", 1.6e155),
        ("seed", 2**64),
        ("seed", 1.0),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", "12"),
        ("include_stop_str_in_output", 1),
        ("ignore_eos", None),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"x": 0.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: 10**400}),
        ("bad_words", [""]),
        ("skip_special_tokens", "yes"),
        ("detokenize", 0),
    ],
)
def test_a_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("kwargs", "fields"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, ("min_tokens", "max_tokens")),
        ({"stop": "x", "detokenize": False}, ("stop", "detokenize")),
        ({"n": 2, "temperature": 0.0}, ("n", "temperature")),
    ],
)
def test_contradictions_name_both_fields(kwargs: dict[str, Any], fields: tuple[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**kwargs)
    assert all(field in str(caught.value) for field in fields)


def test_bad_values_are_value_errors_and_unknown_keywords_type_errors() -> None:
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2.0)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[call-arg]


@pytest.mark.parametrize("temperature, greedy", [(0.0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy_has_vllms_limit(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_is_frozen_and_copies_equal() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, seed=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert dataclasses.replace(params, n=3).n == 3
    with pytest.raises(RequestError, match="top_p"):
        dataclasses.replace(params, top_p=-1.0)
