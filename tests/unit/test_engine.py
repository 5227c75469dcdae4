import functools
import random
from pathlib import Path

import pytest

import mili
from mili.completion import Completion
from mili.config import EngineConfig, ModelConfig
from mili.engine import Engine, Progress
from mili.errors import ConfigError, RequestError
from mili.outputs import FinishReason, RequestOutput
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer
from support.fake_runner import FakeRunner

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
EOS = 8166


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


def make_engine(runner: FakeRunner | None = None, **options) -> Engine:
    runner = runner or FakeRunner()
    config = EngineConfig(page_size=runner.page_size, max_model_len=runner.max_model_len, **options)
    return Engine(runner, tokenizer(), ModelConfig.from_pretrained(FOLDER), config)


def saying(text: str, **options) -> FakeRunner:
    """A runner that answers every prompt of one token with `text`, then EOS."""
    ids = [*tokenizer().encode(text), EOS]
    return FakeRunner(next_token=lambda token_ids: ids[min(len(token_ids) - 1, len(ids) - 1)], **options)


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


def run(engine: Engine, max_steps: int = 2000) -> dict[str, RequestOutput]:
    """Step until idle; the finished outputs by id."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            break
        for request_id in engine.step().finished:
            outputs[request_id] = engine.take(request_id)
    assert not engine.has_unfinished
    check_idle(engine)
    return outputs


def check_idle(engine: Engine) -> None:
    """Nothing is left over: no request, and every page free or in the tree, unlocked."""
    cache = engine._cache
    cache.check_invariants()
    assert cache.usage == 0.0
    assert cache.num_free_pages + cache.num_evictable_pages == cache.num_usable_pages
    assert not engine._children
    assert not engine._groups


def generate(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    request_id = engine.add(prompt, params)
    return run(engine)[request_id]


def random_prompts(count: int, longest: int = 60) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(1000) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


# --- what comes out ---


def test_eos_ends_the_text_and_is_counted_but_not_shown():
    output = generate(make_engine(saying("hello world")), [5], greedy())
    assert output.text == "hello world"
    assert output.outputs[0].token_ids == [*tokenizer().encode("hello world"), EOS]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert output.finished
    assert output.prompt_token_ids == [5]
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_ignore_eos_goes_on_to_max_tokens():
    output = generate(make_engine(saying("hi")), [5], greedy(ignore_eos=True, max_tokens=9))
    assert len(output.outputs[0].token_ids) == 9
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_without_max_tokens_the_context_is_the_end():
    runner = FakeRunner(max_model_len=50, next_token=lambda ids: 7)
    output = generate(make_engine(runner), [5] * 20, greedy())
    assert len(output.outputs[0].token_ids) == 30
    assert output.outputs[0].finish_reason == "length"


def test_stop_token_id_is_the_stop_reason():
    ids = tokenizer().encode("one two three")
    output = generate(make_engine(saying("one two three")), [5], greedy(stop_token_ids=[ids[1]]))
    assert output.outputs[0].token_ids == ids[:2]
    assert output.text == tokenizer().decode(ids[:1])
    assert output.outputs[0].stop_reason == ids[1]
    shown = generate(
        make_engine(saying("one two three")), [5], greedy(stop_token_ids=[ids[1]], include_stop_str_in_output=True)
    )
    assert shown.text == tokenizer().decode(ids[:2])


def test_stop_string_across_tokens_cuts_the_text_and_frees_the_pages():
    text = "alpha beta gamma delta"
    output = generate(make_engine(saying(text)), [5], greedy(stop=["a g", "zzz"]))
    assert output.text == "alpha bet"
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == "a g"
    assert len(output.outputs[0].token_ids) < len(tokenizer().encode(text)), "it went on after the stop string"
    kept = generate(make_engine(saying(text)), [5], greedy(stop="a g", include_stop_str_in_output=True))
    assert kept.text == "alpha beta g"


def test_stop_string_completed_by_the_last_allowed_token_wins_over_length():
    ids = tokenizer().encode("alpha beta gamma")
    output = generate(make_engine(saying("alpha beta gamma")), [5], greedy(stop="gamma", max_tokens=len(ids)))
    assert len(output.outputs[0].token_ids) == len(ids)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "gamma")


def test_stop_string_before_min_tokens_is_text():
    ids = tokenizer().encode("x y x y x y")
    output = generate(make_engine(saying("x y x y x y")), [5], greedy(stop="y", min_tokens=len(ids) - 1))
    assert output.text == "x y x y x "


def test_min_tokens_holds_back_eos():
    output = generate(make_engine(saying("a")), [5], greedy(min_tokens=6, max_tokens=6))
    assert len(output.outputs[0].token_ids) == 6
    assert EOS not in output.outputs[0].token_ids


def test_min_tokens_lets_eos_through_afterwards():
    output = generate(make_engine(FakeRunner(next_token=lambda ids: EOS)), [5], greedy(min_tokens=2, max_tokens=9))
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].finish_reason == "stop"


def test_bad_words_never_come():
    runner = saying("def f(x): return x")
    output = generate(make_engine(runner), [5], greedy(bad_words=["return"], max_tokens=12))
    assert "return" not in output.text


def test_logit_bias_decides():
    output = generate(make_engine(), [5], greedy(logit_bias={123: 100.0}, max_tokens=3))
    assert output.outputs[0].token_ids == [123] * 3


def test_detokenize_off_gives_ids_only():
    output = generate(make_engine(saying("hello")), [5], greedy(detokenize=False, logprobs=1))
    assert output.text == ""
    assert output.outputs[0].token_ids[-1] == EOS
    assert all(e.decoded_token is None for entry in output.outputs[0].logprobs for e in entry.values())


def test_logprobs_have_the_chosen_token_first_and_the_likeliest_after():
    runner = FakeRunner()
    output = generate(make_engine(runner), [5, 6], greedy(logprobs=3, max_tokens=4, ignore_eos=True))
    completion = output.outputs[0]
    assert len(completion.logprobs) == 4
    seen = [5, 6]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = runner.logits(seen)
        assert next(iter(entry)) == token
        assert entry[token].rank == 1
        assert list(entry) == logits.argsort()[::-1][:3].tolist()
        assert [e.rank for e in entry.values()] == [1, 2, 3]
        assert entry[token].decoded_token == tokenizer().token_text(token)
        seen.append(token)
    chosen = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


def test_logprobs_zero_reports_the_chosen_token_with_its_own_rank():
    params = greedy(logprobs=0, max_tokens=1, logit_bias={77: 100.0})
    runner = FakeRunner()
    (entry,) = generate(make_engine(runner), [5], params).outputs[0].logprobs
    logits = runner.logits([5])
    assert list(entry) == [77]
    assert entry[77].rank == 1 + (logits > logits[77]).sum() > 1


@pytest.mark.parametrize("max_num_batched_tokens", [64, 8])
def test_prompt_logprobs_score_every_prompt_token_but_the_first(max_num_batched_tokens):
    runner = FakeRunner()
    prompt = random_prompts(1, 60)[0] + [3] * 20
    engine = make_engine(runner, max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens)
    engine.add(prompt, greedy(max_tokens=2))  # fills the prefix cache: it must not shorten the scores
    run(engine)
    output = generate(engine, prompt, greedy(prompt_logprobs=2, max_tokens=2, ignore_eos=True))
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position in range(1, len(prompt)):
        logits = runner.logits(prompt[:position])
        entry = output.prompt_logprobs[position]
        assert next(iter(entry)) == prompt[position]
        assert entry[prompt[position]].rank == 1 + (logits > logits[prompt[position]]).sum()
        assert set(logits.argsort()[::-1][:2].tolist()) <= set(entry)
    assert output.outputs[0].logprobs is None


def test_metrics_of_a_request_are_in_order():
    metrics = generate(make_engine(), [5], greedy(max_tokens=3, ignore_eos=True)).metrics
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times)
    assert metrics.queue_time >= 0
    assert metrics.num_preemptions == 0


# --- n, seeds, batches ---


def test_n_completions_share_the_prompt_and_differ():
    runner = FakeRunner()
    engine = make_engine(runner)
    output = generate(engine, list(range(40)), SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True))
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    # 40 prompt tokens once, and 8 after the two shared pages for each of the others
    assert sum(len(batch.token_ids) for batch in runner.batches) == 40 + 2 * 8 + 3 * 5
    assert engine.metrics()["prompt_tokens_total"] == 40


def test_completion_i_of_n_is_the_completion_of_seed_plus_i():
    engine = make_engine()
    together = generate(engine, [1, 2, 3], SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True))
    for index in range(3):
        alone = generate(engine, [1, 2, 3], SamplingParams(seed=5 + index, max_tokens=6, ignore_eos=True))
        assert alone.outputs[0].token_ids == together.outputs[index].token_ids


def test_n_with_prompt_logprobs_scores_the_prompt_once():
    runner = FakeRunner()
    output = generate(make_engine(runner), [1, 2, 3], SamplingParams(n=2, seed=1, prompt_logprobs=1, max_tokens=2))
    kinds = [kind for batch in runner.batches for _, kind, _ in batch.logit_owners]
    assert kinds.count("prompt") == 2
    assert [entry is None for entry in output.prompt_logprobs] == [True, False, False]


def test_without_a_seed_draws_differ_but_repeat_with_the_engine_seed():
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def two(seed: int) -> list[list[int]]:
        engine = make_engine(seed=seed)
        return [generate(engine, [1, 2, 3], params).outputs[0].token_ids for _ in range(2)]

    first = two(0)
    assert first[0] != first[1]
    assert two(0) == first
    assert two(1) != first


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"max_num_seqs": 1, "max_num_batched_tokens": 5},
        {"max_num_seqs": 3, "max_num_batched_tokens": 7},
        {"runner": {"num_pages": 18, "page_size": 4, "max_model_len": 68}},  # preempts
        {"runner": {"page_size": 1, "num_pages": 600}},
    ],
)
def test_tokens_do_not_depend_on_batching_chunking_caching_or_preemption(options):
    runner = FakeRunner(**options.pop("runner", {}))
    prompts = [p[:30] for p in random_prompts(12)]
    params = [
        SamplingParams(seed=i, max_tokens=30, top_k=40, presence_penalty=0.5, repetition_penalty=1.1) for i in range(12)
    ]
    engine = make_engine(runner, **options)
    ids = [engine.add(p, q) for p, q in zip(prompts, params, strict=True)]
    outputs = run(engine)
    for prompt, param, request_id in zip(prompts, params, ids, strict=True):
        alone = generate(make_engine(), prompt, param)
        assert outputs[request_id].outputs[0].token_ids == alone.outputs[0].token_ids
        assert outputs[request_id].text == alone.text
    if runner.num_pages == 18:
        assert engine.metrics()["num_preemptions_total"] > 0
        assert any(output.metrics.num_preemptions for output in outputs.values())


def test_cached_prefix_is_reported():
    engine = make_engine()
    prompt = list(range(50))
    assert generate(engine, prompt, greedy(max_tokens=1)).num_cached_tokens == 0
    assert generate(engine, prompt, greedy(max_tokens=1)).num_cached_tokens == 48
    assert engine.reset_prefix_cache()
    assert generate(engine, prompt, greedy(max_tokens=1)).num_cached_tokens == 0


def test_reset_keeps_what_runs():
    engine = make_engine()
    request_id = engine.add(list(range(50)), greedy(max_tokens=5, ignore_eos=True))
    engine.step()
    assert not engine.reset_prefix_cache()
    assert len(run(engine)[request_id].outputs[0].token_ids) == 5


# --- streaming ---


def test_deltas_join_to_the_text_and_never_show_a_stop_string():
    text = "naïve café — 你好 🙂 end stop here"
    engine = make_engine(saying(text))
    request_id = engine.add([5], greedy(stop="stop"))
    shown, deltas = "", []
    while True:
        progress = engine.step()
        assert progress.advanced == [request_id]
        output = engine.take(request_id)
        deltas.append(output.delta)
        shown += output.delta
        assert output.text == shown
        assert "\ufffd" not in output.delta
        if output.finished:
            assert progress.finished == [request_id]
            break
        assert output.outputs[0].finish_reason is None
    assert shown == "naïve café — 你好 🙂 end "
    assert len([d for d in deltas if d]) > 5
    check_idle(engine)


def test_delta_gathers_what_was_not_taken():
    engine = make_engine(saying("one two three four"))
    request_id = engine.add([5], greedy())
    engine.step()
    first = engine.take(request_id)
    engine.step()
    engine.step()
    second = engine.take(request_id)
    assert second.text == first.text + second.delta
    assert len(second.outputs[0].token_ids) == 3
    assert len(first.outputs[0].token_ids) == 1, "a snapshot does not change"


# --- abort, failure, refusal ---


@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_abort_from_any_state_frees_everything(num_steps, n):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=16)
    params = SamplingParams(n=n, max_tokens=20, ignore_eos=True, seed=1)
    ids = [engine.add(list(range(40)), params) for _ in range(3)]
    for _ in range(num_steps):
        engine.step()
    for request_id in ids[:2]:
        output = engine.abort(request_id)
        assert output.finished
        assert {c.finish_reason for c in output.outputs} == {FinishReason.ABORT}
    assert engine.abort(ids[0]) is None
    outputs = run(engine)
    assert list(outputs) == [ids[2]]
    assert engine.metrics()["request_success_total"] == {"stop": 0, "length": n, "abort": 2 * n}


def test_a_step_that_raises_ends_its_requests_and_no_others():
    runner = FakeRunner(fail_at={3})
    engine = make_engine(runner, max_num_seqs=2)
    params = greedy(max_tokens=6, ignore_eos=True)
    first, second, third = (engine.add(list(range(i, i + 40)), params) for i in range(3))
    engine.step()
    engine.step()
    progress = engine.step()
    assert progress == Progress([], [first, second])
    for request_id in (first, second):
        with pytest.raises(RuntimeError, match="on fire"):
            engine.take(request_id)
        with pytest.raises(KeyError):
            engine.take(request_id)
    assert len(run(engine)[third].outputs[0].token_ids) == 6
    assert engine.metrics()["request_failure_total"] == 2
    again = generate(engine, list(range(40)), params)
    assert again.outputs[0].token_ids == generate(make_engine(), list(range(40)), params).outputs[0].token_ids


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("method", ["append", "finish"])
def test_text_that_cannot_be_made_takes_down_its_own_request_only(monkeypatch, n, method):
    engine = make_engine()
    plain = getattr(Completion, method)

    def broken(self, *args):
        if self._params.seed == 13 and self.index == n - 1 and len(self.token_ids) >= 2:
            raise ValueError("no such character")
        return plain(self, *args)

    monkeypatch.setattr(Completion, method, broken)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=5)
    alone = generate(make_engine(), [1, 2, 3], params)
    bystander = engine.add([1, 2, 3], params)
    victim = engine.add([4, 5, 6], SamplingParams(max_tokens=6, ignore_eos=True, seed=13, n=n))
    outputs = {}
    while engine.has_unfinished:
        progress = engine.step()
        for request_id in progress.finished:
            if request_id == victim:
                with pytest.raises(ValueError, match="no such character"):
                    engine.take(request_id)
            else:
                outputs[request_id] = engine.take(request_id)
    assert list(outputs) == [bystander]
    assert outputs[bystander].outputs[0].token_ids == alone.outputs[0].token_ids
    assert engine.metrics()["request_failure_total"] + engine.metrics()["request_success_total"]["length"] == n + 1
    check_idle(engine)


def test_stats_count_the_tokens_and_time_between_them():
    engine = make_engine()
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=5)
    for _ in range(2):
        engine.add(list(range(40)), params)
    stats = []
    while engine.has_unfinished:
        stats.append(engine.step().stats)
    assert sum(step.num_tokens for step in stats) == 40 + 40 - 32 + 2 * 3, "the second prompt reuses two pages"
    gaps = [gap for step in stats for gap in step.inter_token_seconds]
    assert len(gaps) == 2 * 3
    assert all(0 <= gap < 10 for gap in gaps)


def test_keyboard_interrupt_leaves_step_and_a_clean_engine():
    runner = FakeRunner(fail_at={2}, error=KeyboardInterrupt())
    engine = make_engine(runner)
    request_id = engine.add([1, 2, 3], greedy(max_tokens=6))
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(mili.MiliError, match="interrupted"):
        engine.take(request_id)
    check_idle(engine)
    assert generate(engine, [1, 2, 3], greedy(max_tokens=6)).finished


def test_a_fault_after_the_step_also_ends_its_requests(monkeypatch):
    engine = make_engine()
    request_id = engine.add([1, 2, 3], greedy(max_tokens=6, ignore_eos=True))
    monkeypatch.setattr("mili.completion.Completion.append", lambda *args: 1 / 0)
    assert engine.step().finished == [request_id]
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        engine.take(request_id)
    check_idle(engine)
    assert generate(engine, [1, 2, 3], greedy(max_tokens=6, ignore_eos=True)).finished


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(), "prompt is empty"),
        ([1] * 256, greedy(), "256 tokens.*max_model_len is 256"),
        ([1] * 300, greedy(), "300 tokens.*max_model_len is 256"),
        ([1, 8192], greedy(), "8192 is out of range.*0 to 8191"),
        ([1, -1], greedy(), "-1 is out of range"),
        ([1], greedy(stop_token_ids=[9000]), "stop_token_ids.*9000"),
        ([1], greedy(logit_bias={9000: 1.0}), "logit_bias.*9000"),
        ([1] * 200, greedy(min_tokens=57), "min_tokens is 57.*200 tokens.*56.*256"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt, params, message):
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, params)
    check_idle(engine)
    assert not engine.has_unfinished
    assert generate(engine, [1] * 255, greedy()).outputs[0].finish_reason is not None


def test_an_id_in_use_is_refused():
    engine = make_engine()
    engine.add([1], greedy(max_tokens=1), request_id="0")
    with pytest.raises(RequestError, match="in use"):
        engine.add([1], greedy(), request_id="0")
    assert engine.add([1], greedy(max_tokens=1)) == "1"
    run(engine)


def test_a_cache_too_small_for_one_request_is_refused():
    with pytest.raises(ConfigError, match=r"holds 48 tokens.*max_model_len 50"):
        make_engine(FakeRunner(num_pages=4, max_model_len=50))
    make_engine(FakeRunner(num_pages=4, max_model_len=49))


def test_counters_and_gauges():
    engine = make_engine(max_num_seqs=2)
    for i in range(3):
        engine.add(list(range(i, 40 + i)), greedy(max_tokens=4, ignore_eos=True))
    engine.step()
    metrics = engine.metrics()
    assert (metrics["num_requests_running"], metrics["num_requests_waiting"]) == (2, 1)
    assert 0 < metrics["kv_cache_usage_perc"] < 1
    run(engine)
    metrics = engine.metrics()
    assert (metrics["num_requests_running"], metrics["num_requests_waiting"]) == (0, 0)
    assert metrics["prompt_tokens_total"] == 120
    assert metrics["generation_tokens_total"] == 12
    assert metrics["prefix_cache_queries_total"] == 120
    assert metrics["request_success_total"]["length"] == 3


def test_an_idle_engine_steps_to_nothing():
    assert make_engine().step() == Progress([], [])


def test_close_ends_requests_and_closes_the_runner():
    runner = FakeRunner()
    engine = make_engine(runner)
    engine.add([1], greedy())
    engine.close()
    assert runner.closed
    check_idle(engine)
