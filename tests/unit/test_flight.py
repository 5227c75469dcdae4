"""Steps enqueued behind one that is still on its way: when they are, and that nobody can tell from the outputs."""

import pytest

from mili.outputs import FinishReason
from mili.sampling_params import SamplingParams, StructuredOutputsParams
from support.fake_runner import FakeRunner
from unit.test_engine import check_idle, greedy, make_engine, random_prompts, run, saying, tokenizer


def ahead(**options) -> FakeRunner:
    return FakeRunner(looks_ahead=True, **options)


def facts(output) -> list:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs) for c in output.outputs]


def serve(runner: FakeRunner, work, **options) -> list:
    engine = make_engine(runner, **options)
    ids = [engine.add(prompt, params) for prompt, params in work]
    outputs = run(engine)
    return [facts(outputs[request_id]) for request_id in ids]


MIXED = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=2, max_tokens=40, stop=["e", "a"], logprobs=3),
    SamplingParams(temperature=1.0, seed=3, max_tokens=40, stop_token_ids=list(range(0, 8000, 9)), min_tokens=4),
    SamplingParams(temperature=1.0, seed=4, max_tokens=25, n=3),
    SamplingParams(temperature=0.0, max_tokens=17, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=17, ignore_eos=True, repetition_penalty=1.3),
]


@pytest.mark.parametrize("num_pages", [600, 24])
@pytest.mark.parametrize("max_num_seqs", [64, 3])
def test_outputs_are_the_same_with_and_without(num_pages, max_num_seqs):
    work = [(prompt, MIXED[index % len(MIXED)]) for index, prompt in enumerate(random_prompts(18))]
    if num_pages == 600:
        work = [pair for pair in work if not pair[1].repetition_penalty > 1]  # one such request keeps all from it
    sizes = {"num_pages": num_pages, "max_model_len": 128}
    runner = ahead(**sizes)
    assert serve(runner, work, max_num_seqs=max_num_seqs) == serve(FakeRunner(**sizes), work, max_num_seqs=max_num_seqs)
    assert runner.num_follow_ups > (runner.num_steps // 2 if num_pages == 600 else 0)


def test_every_step_but_the_first_follows_another():
    runner = ahead()
    (outputs,) = serve(runner, [([5] * 20, greedy(max_tokens=30, ignore_eos=True))])
    assert len(outputs[0][0]) == 30
    assert (runner.num_steps, runner.num_follow_ups) == (30, 29)


def test_the_next_step_is_submitted_before_this_one_is_fetched():
    runner = ahead()
    engine = make_engine(runner)
    request_id = engine.add([1, 2], greedy(max_tokens=9, ignore_eos=True))
    for step in range(1, 9):
        engine.step()
        assert len(engine.take(request_id).outputs[0].token_ids) == step
        assert runner.num_steps == step + 1
    engine.step()
    assert engine.take(request_id).finished
    assert runner.num_steps == 9, "a step was computed for nobody"


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": {7: 2.0}},
        {"bad_words": ["no"]},
        {"min_tokens": 8},
        {"structured_outputs": StructuredOutputsParams(regex="[ab]{30}")},
    ],
)
def test_a_row_that_depends_on_tokens_is_waited_for(fields):
    runner = ahead()
    plain = (list(range(9)), greedy(max_tokens=8, ignore_eos=True))
    params = SamplingParams(seed=1, max_tokens=8, **fields)
    serve(runner, [plain, ([3, 4], params)])
    assert runner.num_follow_ups == 0


def test_min_tokens_is_waited_for_until_it_is_reached():
    runner = ahead()
    serve(runner, [([3, 4], greedy(min_tokens=3, max_tokens=8, ignore_eos=False, stop_token_ids=[8000]))])
    assert 0 < runner.num_follow_ups < 6


def test_who_can_be_admitted_is_in_the_next_step_that_is_submitted():
    runner = ahead()
    engine = make_engine(runner, max_num_seqs=2)
    first = engine.add([1], greedy(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.step()
    assert runner.num_steps == 3
    engine.add([2] * 9, greedy(max_tokens=20, ignore_eos=True))
    engine.add([3], greedy(max_tokens=20, ignore_eos=True))  # waits, and there is no room for it
    engine.step()
    assert runner.num_steps == 4
    assert runner.batches[-1].seq_lens.tolist() == [4, 9], "the second was not admitted at once"
    assert runner.batches[-1].feeds == [(0, 0, 1)], "the first did not go on beside it"
    engine.abort(first)
    outputs = run(engine)
    assert all(len(output.outputs[0].token_ids) == 20 for output in outputs.values())
    assert runner.num_ahead == runner.num_steps - 1


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("budget", [64, 100, 37])
def test_a_chunk_of_prompts_is_submitted_while_the_one_before_is_computed(max_tokens, budget):
    work = [(prompt, greedy(max_tokens=max_tokens, ignore_eos=True)) for prompt in random_prompts(30)]
    options = {"max_num_seqs": 16, "max_num_batched_tokens": budget}
    runner, plain = ahead(num_pages=300), FakeRunner(num_pages=300)
    assert serve(runner, work, **options) == serve(plain, work, **options)
    assert runner.num_ahead >= runner.num_steps - 3
    assert runner.num_steps <= plain.num_steps + 1
    assert max(len(batch.token_ids) for batch in runner.batches) == budget


def test_a_prompt_waits_for_the_pages_that_are_being_computed():
    runner = ahead()
    prompt = list(range(100, 150))
    serve(runner, [([*prompt, index], greedy(max_tokens=2, ignore_eos=True)) for index in range(5)])
    assert [len(batch.token_ids) for batch in runner.batches] == [51, 1 + 4 * 3, 4]


def test_rows_of_the_ended_are_padding_until_a_smaller_batch_will_do():
    runner = ahead(num_pages=200)
    work = [([index + 1] * 5, greedy(max_tokens=10 + 4 * index, ignore_eos=True)) for index in range(8)]
    outputs = serve(runner, work)
    assert [len(output[0][0]) for output in outputs] == [10 + 4 * index for index in range(8)]
    widths = [len(batch.seq_lens) for batch in runner.batches]
    assert sorted(set(widths), reverse=True) == [8, 4, 2, 1]
    assert (runner.batches[11].slots == 0).sum() == 1
    assert runner.num_steps - runner.num_follow_ups == 1  # the prompts


def test_a_stop_string_costs_one_token_that_nobody_sees():
    text = "alpha beta gamma delta"
    runner = saying(text, looks_ahead=True)
    ((completion,),) = serve(runner, [([5], greedy(stop=["a g"]))])
    assert completion[1] == "alpha bet"
    assert runner.num_steps == len(completion[0]) + 1


def test_an_abort_with_a_step_on_its_way_frees_the_pages_for_the_next():
    alone = serve(FakeRunner(num_pages=6, max_model_len=73), [([7] * 60, greedy(max_tokens=12, ignore_eos=True))])
    engine = make_engine(ahead(num_pages=6, max_model_len=73))
    aborted = engine.add([1] * 50, greedy(max_tokens=20, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.abort(aborted)
    engine.reset_prefix_cache()
    assert engine._cache.usage == 0.0
    assert not engine.has_unfinished
    request_id = engine.add([7] * 60, greedy(max_tokens=12, ignore_eos=True))
    assert facts(run(engine)[request_id]) == alone[0]


def test_an_abort_leaves_the_others_their_step():
    prompts = random_prompts(4)
    params = greedy(max_tokens=30, ignore_eos=True)
    alone = [serve(FakeRunner(), [(prompt, params)])[0] for prompt in prompts]
    runner = ahead(num_pages=65)
    engine = make_engine(runner)
    ids = [engine.add(prompt, params) for prompt in prompts]
    for _ in range(6):
        engine.step()
    before = runner.num_steps - runner.num_follow_ups
    output = engine.abort(ids[1])
    assert output.outputs[0].finish_reason is FinishReason.ABORT
    assert output.outputs[0].token_ids == alone[1][0][0][: len(output.outputs[0].token_ids)]
    outputs = run(engine)
    assert [facts(outputs[ids[index]]) for index in (0, 2, 3)] == [alone[index] for index in (0, 2, 3)]
    assert runner.num_steps - runner.num_follow_ups == before, "an abort made a step wait"


def test_nothing_follows_a_step_whose_pages_are_swapped():
    runner = ahead()
    engine = make_engine(runner)
    prompt, params = list(range(48)), greedy(max_tokens=10, ignore_eos=True)
    first = facts(run_one(engine, prompt, params))
    steps, ahead_steps = runner.num_steps, runner.num_follow_ups
    assert facts(run_one(engine, prompt, params)) == first
    # The last page was computed again, as one token has to be: it was given back for the one in the tree.
    assert (runner.num_steps - steps, runner.num_follow_ups - ahead_steps) == (10, 8)


def run_one(engine, prompt, params):
    request_id = engine.add(prompt, params)
    return run(engine)[request_id]


def test_pages_swapped_within_one_step_are_looked_up_again():
    params = SamplingParams(n=3, seed=5, max_tokens=40, ignore_eos=True)
    runner = ahead(num_pages=40)
    # Three times the same page, computed in one step: two are given back, and the other request's growth takes one.
    work = [(list(range(16)), params), (list(range(100, 120)), greedy(max_tokens=30, ignore_eos=True))]
    assert serve(runner, work) == serve(FakeRunner(num_pages=40), work)
    assert runner.num_follow_ups > 30


@pytest.mark.parametrize("step", [2, 3, 6])
@pytest.mark.parametrize("error", [RuntimeError("the device is on fire"), KeyboardInterrupt()])
def test_a_step_that_fails_on_its_way_leaves_a_clean_engine(step, error):
    runner = ahead(fail_at={step}, error=error)
    engine = make_engine(runner)
    request_id = engine.add([1, 2, 3], greedy(max_tokens=9, ignore_eos=True))
    if isinstance(error, Exception):
        while not engine.step().finished:
            pass
    else:
        with pytest.raises(KeyboardInterrupt):
            while True:
                engine.step()
    with pytest.raises(Exception, match=r"on fire|interrupted"):
        engine.take(request_id)
    check_idle(engine)
    assert len(run_one(engine, [4], greedy(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3


def test_a_submission_that_fails_takes_its_requests_down(monkeypatch):
    runner = ahead()
    engine = make_engine(runner)
    request_id = engine.add([1, 2, 3], greedy(max_tokens=9, ignore_eos=True))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "submit", lambda *args, **options: 1 / 0)
        assert engine.step().finished == [request_id]
    with pytest.raises(ZeroDivisionError):
        engine.take(request_id)
    check_idle(engine)
    assert len(run_one(engine, [4], greedy(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3


def test_text_is_the_same():
    ids = tokenizer().encode("one two three four")
    ((completion,),) = serve(saying("one two three four", looks_ahead=True), [([5], greedy())])
    assert (completion[0][:-1], completion[1], completion[2]) == (ids, "one two three four", "stop")
