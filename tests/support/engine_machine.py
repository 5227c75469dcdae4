"""Random walks over an engine that looks ahead: every request gets what it gets alone in one that does not."""

import functools
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import mili
from mili.config import EngineConfig, ModelConfig
from mili.engine import Engine
from mili.outputs import RequestOutput
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer
from support.fake_runner import FakeRunner

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
PAGE_SIZE = 4
MAX_MODEL_LEN = 48


MACHINE_SETTINGS = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


def make_engine(num_pages: int, looks_ahead: bool, **options) -> Engine:
    runner = FakeRunner(
        num_pages=num_pages, page_size=PAGE_SIZE, max_model_len=MAX_MODEL_LEN, vocab_size=90, looks_ahead=looks_ahead
    )
    config = EngineConfig(page_size=PAGE_SIZE, max_model_len=MAX_MODEL_LEN, **options)
    return Engine(runner, tokenizer(), ModelConfig.from_pretrained(FOLDER), config)


def facts(output: RequestOutput) -> list:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs) for c in output.outputs]


@functools.cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list:
    """What a request gets from an engine of its own that takes one step at a time."""
    engine = make_engine(64, False)
    request_id = engine.add(prompt, params)
    while engine.has_unfinished:
        engine.step()
    return facts(engine.take(request_id))


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(13, 40),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(8, 64),
        enable_prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(self, num_pages: int, **options) -> None:
        self.engine = make_engine(num_pages, True, **options)
        self.runner: FakeRunner = self.engine._runner
        self.open: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}

    @rule(
        # Prompts share beginnings: a run of one token, then a tail.
        prompt=st.tuples(st.integers(1, 2), st.integers(1, 12), st.lists(st.integers(0, 2), max_size=3)),
        fields=st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 24),
                "seed": st.integers(0, 3),
                "stop": st.sampled_from([(), (), ("A",), ("x", "7")]),
                "stop_token_ids": st.sampled_from([(), (), (5, 60, 61)]),
                "n": st.sampled_from([1, 1, 1, 2]),
                "logprobs": st.sampled_from([None, None, 2]),
                "prompt_logprobs": st.sampled_from([None, None, None, None, 0]),
                "min_tokens": st.sampled_from([0, 0, 1]),
                "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.5]),
            }
        ),
    )
    def add(self, prompt: tuple[int, int, list[int]], fields: dict) -> None:
        token_ids = (prompt[0],) * prompt[1] + tuple(prompt[2])
        params = SamplingParams(temperature=1.0, ignore_eos=True, **fields)
        self.open[self.engine.add(token_ids, params)] = (token_ids, params)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        for request_id in self.engine.step().finished:
            assert facts(self.engine.take(request_id)) == alone(*self.open.pop(request_id))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        request_id = list(self.open)[which % len(self.open)]
        output = self.engine.abort(request_id)
        for completion, expected in zip(output.outputs, alone(*self.open.pop(request_id)), strict=True):
            assert expected[0][: len(completion.token_ids)] == completion.token_ids

    @precondition(lambda self: self.open)
    @rule()
    def fail_the_next_step(self) -> None:
        self.runner.fail_at = {self.runner.num_steps + 1}
        for _ in range(3):  # the step that is on its way may be the one before
            for request_id in self.engine.step().finished:
                prompt, params = self.open.pop(request_id)
                try:
                    assert facts(self.engine.take(request_id)) == alone(prompt, params)
                except RuntimeError as error:
                    assert error is self.runner.error
        self.runner.fail_at = set()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    @invariant()
    def cache_is_sound(self) -> None:
        self.engine._cache.check_invariants()
        if not self.engine.has_unfinished:
            assert self.engine._cache.usage == 0.0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            while self.engine.has_unfinished:
                self.step()
            assert not self.open
            self.cache_is_sound()
