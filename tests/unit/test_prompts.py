import numpy as np
import pytest
import torch

from mili.errors import RequestError
from mili.prompts import Prompt, match_params, parse_conversations, parse_prompts
from mili.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", [Prompt("text")]),
        (["a", "b"], [Prompt("a"), Prompt("b")]),
        ([1, 2, 3], [Prompt(token_ids=[1, 2, 3])]),
        ((1, 2), [Prompt(token_ids=[1, 2])]),
        (np.array([1, 2]), [Prompt(token_ids=[1, 2])]),
        ([[1, 2], [3]], [Prompt(token_ids=[1, 2]), Prompt(token_ids=[3])]),
        (np.array([[1, 2], [3, 4]]), [Prompt(token_ids=[1, 2]), Prompt(token_ids=[3, 4])]),
        ([[1], "a", {"prompt": "b"}], [Prompt(token_ids=[1]), Prompt("a"), Prompt("b")]),
        (torch.tensor([1, 2]), [Prompt(token_ids=[1, 2])]),
        ([torch.tensor([1, 2]), "a"], [Prompt(token_ids=[1, 2]), Prompt("a")]),
        ({"prompt": "a"}, [Prompt("a")]),
        ({"prompt_token_ids": [4]}, [Prompt(token_ids=[4])]),
        ({"prompt": "a", "prompt_token_ids": [4]}, [Prompt("a", [4])]),
        ([[]], [Prompt(token_ids=[])]),
    ],
)
def test_every_form_of_prompt(given, expected):
    parsed = parse_prompts(given)
    assert parsed == expected
    assert all(type(i) is int for prompt in parsed for i in prompt.token_ids or ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no prompt"),
        (None, "prompts must be text, token ids or a list of them, got NoneType"),
        (b"bytes", "got bytes"),
        ([1, "a"], r"prompts\[0\] must be text.*got int"),
        (["a", None], r"prompts\[1\]"),
        ([[1, 2.5]], r"prompts\[0\]\[1\] must be a token id, got 2.5"),
        ([[True]], "must be a token id, got True"),
        ({"text": "a"}, "unknown key 'text'"),
        ({"prompt": 3}, "must be a str, got int"),
        ({}, "must have 'prompt' or 'prompt_token_ids'"),
        ({"prompt_token_ids": "abc"}, "got str"),
        (np.array(5), "got int"),
        ([torch.tensor(5)], r"prompts\[0\] must be text.*got int"),
    ],
)
def test_what_is_no_prompt_is_refused(given, message):
    with pytest.raises(RequestError, match=message):
        parse_prompts(given)


def test_one_conversation_or_several():
    message = {"role": "user", "content": "a"}
    assert parse_conversations([message]) == parse_conversations(iter([message])) == [[message]]
    assert parse_conversations([[message], [message]]) == [[message], [message]]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "no conversation"), ({"role": "user"}, "got dict"), ("hello", "got str"), (5, "got int"), (None, "NoneType")],
)
def test_what_is_no_conversation_is_refused(given, message):
    with pytest.raises(RequestError, match=message):
        parse_conversations(given)


def test_params_are_matched_to_prompts():
    default, one, two = (SamplingParams(max_tokens=i) for i in (1, 2, 3))
    assert match_params(None, 2, default) == [default, default]
    assert match_params(one, 2, default) == [one, one]
    assert match_params([one, two], 2, default) == [one, two]
    assert match_params((one,), 1, default) == [one]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([SamplingParams()] * 3, "3 entries for 2 prompts"),
        ([SamplingParams(), None], "got None"),
        ({"temperature": 0}, "must be SamplingParams"),
        (0.5, "got 0.5"),
    ],
)
def test_params_that_do_not_match_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        match_params(given, 2, SamplingParams())
