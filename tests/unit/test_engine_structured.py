"""Structured outputs through the engine, on a runner without a device: who gets a mask, and what a fault takes down."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mili import RequestError, SamplingParams, StructuredOutputsParams
from mili.config import EngineConfig, ModelConfig
from mili.engine import Engine
from mili.grammar import GrammarState
from support.fake_runner import FakeRunner
from unit.test_engine import EOS, FOLDER, check_idle, generate, greedy, make_engine, random_prompts, run, tokenizer

TURN, THINK, END_THINK = (tokenizer().token_to_id(text) for text in ("<|im_start|>", "<think>", "</think>"))
CHOICES = ("red", "green", "dark blue")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"type": "string", "maxLength": 8}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def form(**fields) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def choosing(**options) -> SamplingParams:
    return SamplingParams(structured_outputs=form(choice=CHOICES), **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_choice_is_made_and_ends(temperature):
    output = generate(make_engine(), [5], choosing(temperature=temperature, seed=1))
    assert output.text in CHOICES
    assert output.outputs[0].token_ids[-1] == EOS
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_a_schema_is_kept_beside_free_requests_that_notice_nothing():
    plain = SamplingParams(seed=3, max_tokens=30, top_k=40, presence_penalty=0.5)
    bound = SamplingParams(seed=4, structured_outputs=form(json=POINT))
    prompts = random_prompts(6)
    engine = make_engine(max_num_seqs=4)
    ids = [engine.add(p, bound if i % 2 else plain) for i, p in enumerate(prompts)]
    outputs, empty = run(engine), make_engine()
    for i, (prompt, request_id) in enumerate(zip(prompts, ids, strict=True)):
        alone = generate(empty, prompt, bound if i % 2 else plain)
        assert outputs[request_id].outputs[0].token_ids == alone.outputs[0].token_ids
        if i % 2:
            assert set(json.loads(outputs[request_id].text)) == {"x", "name"}


def test_preemption_leaves_the_grammar_where_it_was():
    runner = FakeRunner(num_pages=18, page_size=4, max_model_len=68)
    pattern = "[a-z0-9 ]{60,}"
    prompts = [p[:30] for p in random_prompts(8)]
    params = [SamplingParams(seed=i, max_tokens=30, structured_outputs=form(regex=pattern)) for i in range(8)]
    engine = make_engine(runner)
    ids = [engine.add(p, q) for p, q in zip(prompts, params, strict=True)]
    outputs = run(engine)
    assert engine.metrics()["num_preemptions_total"] > 0
    roomy = make_engine()
    for prompt, param, request_id in zip(prompts, params, ids, strict=True):
        assert outputs[request_id].text == generate(roomy, prompt, param).text


def test_n_completions_share_the_compiled_form():
    engine = make_engine()
    output = generate(engine, [1, 2, 3], SamplingParams(n=3, seed=5, structured_outputs=form(regex="[a-z]{8}")))
    assert all(len(c.text) == 8 and c.text.isalpha() for c in output.outputs)
    assert len({completion.text for completion in output.outputs}) == 3
    assert engine._grammars._compile.cache_info().misses == 1


def test_log_probabilities_are_those_of_the_free_row():
    runner = FakeRunner()
    completion = generate(make_engine(runner), [5], choosing(temperature=0.0, logprobs=2)).outputs[0]
    entry = completion.logprobs[0]
    logits = runner.logits([5])
    assert next(iter(entry)) == completion.token_ids[0]
    assert entry[completion.token_ids[0]].rank == 1 + (logits > logits[completion.token_ids[0]]).sum() > 1
    assert list(entry)[1:] == logits.argsort()[::-1][:2].tolist()


def test_a_stop_string_and_a_stop_token_still_end_the_text():
    (word,) = tokenizer().encode("a")
    pattern = form(regex="[ab]{40}")
    stopped = generate(make_engine(), [5], SamplingParams(seed=1, structured_outputs=pattern, stop="ba"))
    assert "ba" not in stopped.text and stopped.outputs[0].stop_reason == "ba"
    stopped = generate(make_engine(), [5], SamplingParams(seed=1, structured_outputs=pattern, stop_token_ids=[word]))
    assert stopped.outputs[0].stop_reason == word
    limited = generate(make_engine(), [5], SamplingParams(seed=1, structured_outputs=pattern, max_tokens=3))
    assert limited.outputs[0].finish_reason == "length"


def test_reasoning_is_free_and_the_answer_is_bound():
    thoughts = [*tokenizer().encode("hm, purple?"), END_THINK]
    prompt = [TURN, *tokenizer().encode("assistant\n"), THINK]
    held = len(prompt)

    def think(token_ids):
        return thoughts[min(len(token_ids) - held, len(thoughts) - 1)]

    output = generate(make_engine(FakeRunner(next_token=think)), prompt, choosing(temperature=0.0))
    token_ids = output.outputs[0].token_ids
    assert token_ids[: len(thoughts)] == thoughts
    assert tokenizer().decode(token_ids[len(thoughts) : -1]) in CHOICES


def test_a_mask_is_part_of_the_rows_that_have_a_form_only():
    engine = make_engine(runner := FakeRunner())
    engine.add([1], greedy(max_tokens=2))
    engine.add([2], choosing(seed=1))
    engine.add([3] * 20, SamplingParams(prompt_logprobs=0, max_tokens=2, structured_outputs=form(regex="[ab]*")))
    run(engine)
    seen = runner.samplings
    assert seen[0].ints[:, 6].tolist() == [-1, 0, *[-1] * 19, 1]
    assert seen[0].masks.shape == (2, 8192 // 32)


def test_only_steps_with_a_form_are_sampled_from_what_is_made_late():
    engine = make_engine(runner := FakeRunner(looks_ahead=True))
    generate(engine, [1], greedy(max_tokens=5, ignore_eos=True))
    assert (runner.num_steps, runner.num_late) == (5, 0)
    output = generate(engine, [2], choosing(seed=1))
    assert runner.num_late == len(output.outputs[0].token_ids) == runner.num_steps - 5


# --- refusals and faults ---


@pytest.mark.parametrize("fields", [{"regex": "["}, {"json": {"enum": []}}, {"grammar": "start: start"}])
def test_an_impossible_form_is_refused_before_anything_is_queued(fields):
    engine = make_engine()
    params = SamplingParams(structured_outputs=form(**fields))
    for refuse in (engine.check, engine.add):
        with pytest.raises(RequestError, match=f"structured_outputs.{next(iter(fields))}"):
            refuse([1], params)
    assert not engine.has_unfinished
    check_idle(engine)


def test_a_model_without_an_eos_token_is_refused():
    model = replace(ModelConfig.from_pretrained(FOLDER), eos_token_ids=frozenset())
    runner = FakeRunner()
    config = EngineConfig(page_size=runner.page_size, max_model_len=runner.max_model_len)
    engine = Engine(runner, tokenizer(), model, config)
    with pytest.raises(RequestError, match="end-of-sequence"):
        engine.add([1], choosing())
    assert generate(engine, [1], greedy(max_tokens=2)).finished


def test_bad_words_that_leave_nothing_take_their_request_down_alone():
    engine = make_engine()
    first = engine.add([1], SamplingParams(bad_words=["a"], seed=1, structured_outputs=form(choice=["a"])))
    others = [engine.add([2], choosing(seed=2)), engine.add([3], greedy(max_tokens=9, ignore_eos=True))]
    outputs, failed = {}, []
    while engine.has_unfinished:
        for request_id in engine.step().finished:
            try:
                outputs[request_id] = engine.take(request_id)
            except RequestError as error:
                failed.append((request_id, str(error)))
    check_idle(engine)
    assert [request_id for request_id, _ in failed] == [first]
    assert "bad_words" in failed[0][1]
    assert outputs[others[0]].text in CHOICES
    assert len(outputs[others[1]].outputs[0].token_ids) == 9
    assert engine.metrics()["request_failure_total"] == 1


@pytest.mark.parametrize("method", ["digest", "use"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_fault_in_a_grammar_takes_its_request_down_alone(monkeypatch, method, n):
    engine = make_engine()
    request_id = engine.add([1], SamplingParams(n=n, seed=1, structured_outputs=form(regex="[ab]{30}")))
    broken = engine._groups[request_id].children[0].grammar
    sound = getattr(GrammarState, method)
    other = engine.add([2], SamplingParams(seed=1, structured_outputs=form(regex="[ab]{30}")))
    engine.step()
    monkeypatch.setattr(GrammarState, method, lambda self, *rows: 1 / 0 if self is broken else sound(self, *rows))
    progress = engine.step()
    assert progress[:2] == ([other], [request_id])
    with pytest.raises(ZeroDivisionError):
        engine.take(request_id)
    assert len(run(engine)[other].text) == 30


def test_a_fault_in_filling_masks_takes_down_those_that_wait_for_one(monkeypatch):
    engine = make_engine()
    ids = [engine.add([i], choosing(seed=i)) for i in (1, 2)]
    other = engine.add([3], greedy(max_tokens=4, ignore_eos=True))
    engine.step()
    monkeypatch.setattr("mili.grammar.fill_next_token_bitmask_par", lambda *args: 1 / 0)
    assert engine.step()[:2] == ([other], ids)
    monkeypatch.undo()
    for request_id in ids:
        with pytest.raises(ZeroDivisionError):
            engine.take(request_id)
    assert list(run(engine)) == [other]
    assert generate(engine, [1], choosing(seed=1)).text in CHOICES


def test_a_fault_of_all_masks_ends_the_step_and_nothing_else(monkeypatch):
    engine = make_engine()
    ids = [engine.add([1], choosing(seed=1)), engine.add([2], greedy(max_tokens=4, ignore_eos=True))]
    engine.step()
    monkeypatch.setattr(engine._grammars, "advance", lambda states: 1 / 0)
    assert engine.step()[:2] == ([], ids)
    monkeypatch.undo()
    for request_id in ids:
        with pytest.raises(ZeroDivisionError):
            engine.take(request_id)
    check_idle(engine)
    assert generate(engine, [1], choosing(seed=1)).text in CHOICES


def test_an_aborted_request_is_not_advanced():
    engine = make_engine()
    request_id = engine.add([1], choosing(seed=1))
    engine.step()
    engine.abort(request_id)
    assert engine.step()[:2] == ([], [])
    check_idle(engine)


def test_the_same_seed_draws_the_same_text():
    params = SamplingParams(seed=9, structured_outputs=form(json=POINT))
    first, second = (generate(make_engine(), [1, 2], params) for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert np.isfinite(json.loads(first.text)["x"])
