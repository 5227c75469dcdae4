"""The GPU's side of the runner on the CPU, under models whose captured graphs are eager calls (bundled model)."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from max.dtype import DType

from mili import LLM, SamplingParams, StructuredOutputsParams, device_graphs
from mili.device_graphs import DecodeGraphs
from mili.transfers import Landings

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=40, ignore_eos=True, logprobs=3)
SEVERAL = SamplingParams(temperature=1.0, n=3, seed=2, max_tokens=30, stop=["\n\n"])


class Capturable:
    """A model that "captures" by executing and "replays" by executing into the captured outputs.

    On a GPU copies and launches are done in the order of one queue. The CPU copies on its own time, so here every
    execution first waits for the copies that were asked for before it.
    """

    def __init__(self, model, device) -> None:
        self._execute, self._device = model.execute, device
        self.captured: dict[int, list] = {}
        self.num_replays = 0
        self.num_executed = 0  # replays included

    def execute(self, *inputs):
        self._device.synchronize()
        self.num_executed += 1
        return self._execute(*inputs)

    def capture(self, key, *inputs):
        self.captured[key] = self.execute(*inputs)
        return list(self.captured[key])

    def replay(self, key, *inputs):
        self.num_replays += 1
        for output, value in zip(self.captured[key], self.execute(*inputs), strict=True):
            bits(output)[...] = bits(value)

    def release_captured_graph(self, key):
        del self.captured[key]


def bits(buffer):
    """The array that shares a buffer's memory; NumPy has no bfloat16."""
    return (buffer.view(DType.uint16, buffer.shape) if buffer.dtype is DType.bfloat16 else buffer).to_numpy()


def make_llm(looks_ahead: bool, **options) -> LLM:
    llm = LLM(device="cpu", max_num_seqs=16, **options)
    if looks_ahead:
        runner = llm._loaded.engine._runner
        runner._forward = Capturable(runner._forward, runner.device)
        runner._sampler = Capturable(runner._sampler, runner.device)
        runner._landings = Landings(runner.device, max_rows=16 + 256)
        runner._graphs = DecodeGraphs(runner._forward, runner._sampler, runner.device, runner._fixed, page_size=16)
        assert runner.looks_ahead
    return llm


def fingerprint(output) -> list:
    completions = [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in output.outputs]
    return completions if output.prompt_logprobs is None else [*completions, output.prompt_logprobs]


@pytest.mark.parametrize("params", [GREEDY, SEEDED, SEVERAL], ids=["greedy", "seeded", "several"])
def test_outputs_are_those_of_one_step_at_a_time(params: SamplingParams) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(8000) for _ in range(length)] for length in (1, 5, 15, 16, 17, 64, 100, 3, 33, 31)]
    with make_llm(False) as llm:
        expected = [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with make_llm(True) as llm:
        runner = llm._loaded.engine._runner
        models = (runner._forward, runner._sampler)
        for _ in range(2):  # the second time from the prefix cache
            assert [fingerprint(o) for o in llm.generate(prompts, params, use_tqdm=False)] == expected
        for model in models:
            assert model.num_replays > 30
            assert model.captured
    for model in models:
        assert not model.captured


def test_chunks_of_prompts_follow_each_other_and_share_steps_with_tokens_on_their_way() -> None:
    draw = random.Random(4)
    prompts = [[draw.randrange(8000) for _ in range(length)] for length in (40, 5, 90, 16, 17, 64, 100, 3, 33, 31) * 3]
    mix = [GREEDY, SEEDED, replace(GREEDY, max_tokens=1), replace(GREEDY, prompt_logprobs=2)]
    params = [mix[index % 4] for index in range(len(prompts))]
    with make_llm(False) as llm:
        expected = [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with make_llm(True, max_num_batched_tokens=37) as llm:
        runner, submitted = llm._loaded.engine._runner, []
        submit = runner.submit
        runner.submit = lambda batch, sampling, after: (submitted.append(batch), submit(batch, sampling, after))[1]
        for _ in range(2):
            assert [fingerprint(o) for o in llm.generate(prompts, params, use_tqdm=False)] == expected
    fed = [batch for batch in submitted if batch.feeds and len(batch.token_ids) > len(batch.seq_lens)]
    assert len(fed) > 30


def test_steps_with_masks_are_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with a grammar and without, in one batch that shrinks."""
    prompts = [[draw] * 4 for draw in (5, 6, 7, 8, 9)]
    forms = [
        StructuredOutputsParams(regex=r"[0-9]{12}"),
        None,
        StructuredOutputsParams(choice=["yes", "no"]),
        None,
        None,
    ]
    params = [SamplingParams(temperature=0, max_tokens=20, structured_outputs=form) for form in forms]
    with make_llm(False) as llm:
        expected = [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with make_llm(True) as llm:
        runner = llm._loaded.engine._runner
        assert [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        words = -(-llm.model_config.vocab_size // 32)
        buckets = runner._graphs._buckets.values()
        masked = [bucket for bucket in buckets if bucket.masks is not None]
        assert {bucket.masks.layout.size // bucket.hidden.shape[0] >= words for bucket in masked} == {True}
        assert any(bucket.plain is not None for bucket in buckets)
        assert runner._sampler.num_replays > 10
        assert len(runner._sampler.captured) == sum((b.plain is not None) + (b.masked is not None) for b in buckets)
    monkeypatch.setattr(device_graphs, "_MAX_MASK_WORDS", words)
    with make_llm(True) as llm:  # one row of masks at most: larger batches are sampled eagerly
        runner = llm._loaded.engine._runner
        assert [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert {size[0] for size, bucket in runner._graphs._buckets.items() if bucket.masks is not None} <= {1}
        assert runner._forward.num_replays > runner._sampler.num_replays
    assert expected[0][0][1].isdigit() and expected[2][0][1] in ("yes", "no")


def test_padding_and_old_host_memory_do_not_show() -> None:
    """One bucket, fed from both sides in turn by batches of different sizes and lengths."""
    prompts = [[7] * 40, [8] * 3, [9] * 30, [10]]
    with make_llm(False) as llm:
        expected = [fingerprint(llm.generate([prompt], GREEDY, use_tqdm=False)[0]) for prompt in prompts]
    with make_llm(True) as llm:
        runner = llm._loaded.engine._runner
        first = fingerprint(llm.generate([prompts[0]], GREEDY, use_tqdm=False)[0])
        three = [fingerprint(output) for output in llm.generate(prompts[:3], GREEDY, use_tqdm=False)]
        four = [fingerprint(output) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
        assert (first, three, four) == (expected[0], expected[:3], expected)
        assert sorted(runner._graphs._buckets) == [(1, 16), (4, 16)]
        arrays = runner._graphs._buckets[4, 16].fed.arrays[0]
        np.testing.assert_array_equal(arrays["query_starts"], range(5))


def test_rows_with_edits_replay_the_network_and_are_sampled_eagerly() -> None:
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=r) for r in (1.0, 1.3)]
    prompts = [[3, 4, 5], [6, 7]]
    with make_llm(False) as llm:
        expected = [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with make_llm(True) as llm:
        runner = llm._loaded.engine._runner
        assert [fingerprint(output) for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert (runner._forward.num_replays, runner._sampler.num_replays) == (19, 0)


@pytest.mark.parametrize("looks_ahead", [False, True], ids=["eager", "captured"])
def test_masks_are_made_between_the_launch_of_the_network_and_that_of_the_sampler(looks_ahead, monkeypatch) -> None:
    events: list[str] = []

    def noted(name: str, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    with make_llm(looks_ahead) as llm:
        engine = llm._loaded.engine
        for name, model in (("forward", engine._runner._forward), ("sampler", engine._runner._sampler)):
            if looks_ahead:
                model._execute = noted(name, model._execute)
        if not looks_ahead:
            for name in ("_forward", "_sampler"):
                real = getattr(engine._runner, name)
                monkeypatch.setattr(engine._runner, name, SimpleNamespace(execute=noted(name[1:], real.execute)))
        monkeypatch.setattr(engine._grammars, "advance", noted("masks", engine._grammars.advance))
        form = StructuredOutputsParams(regex="[0-9]{6}")
        (output,) = llm.generate([[5, 6]], SamplingParams(temperature=0, structured_outputs=form), use_tqdm=False)
    assert output.outputs[0].text.isdigit()
    assert events[:2] == ["masks", "forward"]  # of the first token: when the request was added
    once = [event for event, last in zip(events, ["", *events], strict=False) if event != last]  # a capture runs twice
    steps = len(output.outputs[0].token_ids)
    assert once[-3 * (steps - 1) :] == ["forward", "masks", "sampler"] * (steps - 1)
