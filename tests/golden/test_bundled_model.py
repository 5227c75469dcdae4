"""The bundled checkpoint against transformers in float32 (tests/golden/tiny-qwen3-code.json says how it was made)."""

import json
from pathlib import Path

import pytest

from mili import LLM, SamplingParams

CASES = json.loads(Path(__file__).with_name("tiny-qwen3-code.json").read_text(encoding="utf-8"))["cases"]
TOLERANCE = 1e-3  # of a log-probability in float32
# bfloat16 keeps 8 bits of each activation. The bar is twice the error that transformers itself makes in bfloat16 on
# these prompts (0.307 at worst over the cases' top-20, torch 2.13 on a CPU), as in the kernels' tolerance rule.
BF16_TOLERANCE = 2 * 0.307


def greedy(llm: LLM, case: dict, **more):
    params = SamplingParams(
        temperature=0, max_tokens=len(case["greedy_token_ids"]), ignore_eos=True, logprobs=20, prompt_logprobs=0, **more
    )
    return llm.generate([case["prompt_token_ids"]], params, use_tqdm=False)[0]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_float32_tokens_and_logprobs(bundled_f32: LLM, case: dict) -> None:
    output = greedy(bundled_f32, case)
    completion = output.outputs[0]
    assert list(completion.token_ids) == case["greedy_token_ids"]
    first = completion.logprobs[0]
    for token, logprob in zip(case["top20_ids"], case["top20_logprobs"], strict=True):
        assert first[token].logprob == pytest.approx(logprob, abs=TOLERANCE)
    for step, token, logprob in zip(
        completion.logprobs, case["greedy_token_ids"], case["greedy_logprobs"], strict=True
    ):
        assert step[token].logprob == pytest.approx(logprob, abs=TOLERANCE)
        assert step[token].rank == 1
    assert output.prompt_logprobs[0] is None and case["prompt_logprobs"][0] is None
    for entry, token, logprob in zip(
        output.prompt_logprobs[1:], case["prompt_token_ids"][1:], case["prompt_logprobs"][1:], strict=True
    ):
        assert entry[token].logprob == pytest.approx(logprob, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_text_of_a_prompt_gives_the_same_tokens(bundled_f32: LLM, case: dict) -> None:
    params = SamplingParams(temperature=0, max_tokens=len(case["greedy_token_ids"]))
    output = bundled_f32.generate(case["prompt"], params, use_tqdm=False)[0]
    assert list(output.prompt_token_ids) == case["prompt_token_ids"]
    assert output.text == case["text"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_bfloat16_stays_near(bundled_bf16: LLM, case: dict) -> None:
    completion = greedy(bundled_bf16, case).outputs[0]
    likely = [
        (token, logprob)
        for token, logprob in zip(case["top20_ids"], case["top20_logprobs"], strict=True)
        if token in completion.logprobs[0]
    ]
    assert len(likely) >= 15
    for token, logprob in likely:
        assert completion.logprobs[0][token].logprob == pytest.approx(logprob, abs=BF16_TOLERANCE)
    # Tokens may part only where the reference itself was undecided.
    for mine, theirs, margin in zip(
        completion.token_ids, case["greedy_token_ids"], case["greedy_margins"], strict=False
    ):
        if mine != theirs:
            assert margin < BF16_TOLERANCE
            break
