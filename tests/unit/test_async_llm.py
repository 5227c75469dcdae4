"""`AsyncLLM` on a fake device: what readers see, what aborts free, and what a death leaves behind."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mili import LLM, AsyncLLM, ConfigError, EngineDeadError, QueueFullError, RequestError, SamplingParams
from mili.engine_thread import MAX_FAILED_STEPS
from support import fake_llm

LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def short(**fields):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **fields})


@pytest.fixture
def runners(monkeypatch):
    return fake_llm.install(monkeypatch)


@pytest.fixture
def llm(runners):
    llm = AsyncLLM()
    yield llm
    llm.close()


def slow_down(runner, monkeypatch, seconds=0.005):
    plain = runner.submit
    monkeypatch.setattr(runner, "submit", lambda *args, **options: (time.sleep(seconds), plain(*args, **options))[1])


async def read(llm, prompt, params, request_id=None):
    return [output async for output in llm.generate(prompt, params, request_id)]


async def settled(llm):
    """Wait until nothing runs; then no page is held."""
    await asyncio.wait_for(llm.wait_idle(), 10)
    await llm.reset_prefix_cache()  # runs between two steps, so after every abort sent before it
    assert llm.get_metrics()["kv_cache_usage_perc"] == 0.0
    assert llm.get_metrics()["num_requests_running"] == llm.get_metrics()["num_requests_waiting"] == 0
    assert llm.num_unfinished == 0
    assert not llm._thread._streams
    assert not llm._thread._urgent and not llm._thread._fresh


def test_a_stream_equals_the_synchronous_output(llm):
    async def main():
        outputs = await read(llm, "def f(x):", short(n=2, temperature=1.0, seed=3, logprobs=1))
        assert outputs[-1].finished
        assert not any(output.finished for output in outputs[:-1])
        for index in range(2):
            assert "".join(output.outputs[index].delta for output in outputs) == outputs[-1].outputs[index].text
        whole = await llm.complete("def f(x):", short(n=2, temperature=1.0, seed=3, logprobs=1))
        await settled(llm)
        return outputs[-1], whole

    last, whole = asyncio.run(main())
    with LLM() as reference:
        (expected,) = reference.generate("def f(x):", short(n=2, temperature=1.0, seed=3, logprobs=1), use_tqdm=False)
    for output in (last, whole):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
        assert [c.logprobs for c in output.outputs] == [c.logprobs for c in expected.outputs]
        assert [c.text for c in output.outputs] == [c.text for c in expected.outputs]
    assert whole.outputs[0].delta == whole.outputs[0].text


def test_many_requests_share_steps_and_end_once(llm, runners):
    async def main():
        ids = [list(range(i, i + 20)) for i in range(40)]
        outputs = await asyncio.gather(*(llm.complete(prompt, short()) for prompt in ids))
        await settled(llm)
        return outputs

    outputs = asyncio.run(main())
    assert len({output.request_id for output in outputs}) == 40
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    assert runners[0].num_steps < 40 * 8 / 4, "requests run together"
    assert llm.get_metrics()["request_success_total"]["length"] == 40


def test_a_slow_reader_gets_merged_outputs_and_nobody_waits_for_it(llm):
    async def main():
        slow = llm.generate([1, 2, 3], LONG)
        outputs = [await anext(slow)]
        quick = await asyncio.wait_for(llm.complete([4, 5, 6], LONG), 10)
        assert len(quick.outputs[0].token_ids) == 200
        async for output in slow:
            outputs.append(output)
        assert len(outputs) < 150
        assert "".join(output.delta for output in outputs) == outputs[-1].text
        assert len(outputs[-1].outputs[0].token_ids) == 200
        await settled(llm)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["break", "cancel", "abort", "cancel complete"])
def test_a_reader_that_leaves_takes_its_request_along(llm, runners, monkeypatch, how):
    slow_down(runners[0], monkeypatch)

    async def main():
        started = asyncio.Event()

        async def reader():
            last = None
            async for output in llm.generate([1, 2, 3], LONG, "r"):
                last = output
                started.set()
                if how == "break":
                    break
            return last

        task = asyncio.create_task(llm.complete([1, 2, 3], LONG) if how == "cancel complete" else reader())
        if how == "cancel complete":
            while not runners[0].num_steps:
                await asyncio.sleep(0.001)
        else:
            await asyncio.wait_for(started.wait(), 10)
        if how.startswith("cancel"):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "abort":
            await llm.abort("r")
            output = await task
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
        else:
            await task
            await asyncio.sleep(0)
        steps = runners[0].num_steps
        await settled(llm)
        assert runners[0].num_steps <= steps + 2
        assert runners[0].num_steps < 100

    asyncio.run(main())


def test_refusals_raise_before_anything_is_queued(llm):
    async def main():
        for prompt, params, message in (
            ([], short(), "empty"),
            (list(range(3000)), short(), "3000 tokens"),
            ([9_999_999], short(), "out of range"),
            (["a", "b"], short(), "one prompt at a time"),
        ):
            with pytest.raises(RequestError, match=message):
                await llm.complete(prompt, params)
        await settled(llm)

    asyncio.run(main())


def test_an_id_in_use_is_refused_and_its_owner_goes_on(llm, runners, monkeypatch):
    slow_down(runners[0], monkeypatch)

    async def main():
        owner = asyncio.create_task(llm.complete([1, 2], short(max_tokens=20), "same"))
        await asyncio.sleep(0.02)
        with pytest.raises(RequestError, match="'same' is in use"):
            await llm.complete([1, 2], short(), "same")
        assert (await owner).finished
        await settled(llm)

    asyncio.run(main())


def test_a_refused_reader_that_leaves_does_not_end_the_owner_of_its_id(llm, runners, monkeypatch):
    slow_down(runners[0], monkeypatch)

    async def main():
        owner = asyncio.create_task(llm.complete([1, 2], short(max_tokens=20), "same"))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(llm.complete([1, 2], short(), "same"))
        while llm.num_unfinished < 2:
            await asyncio.sleep(0)
        second.cancel()  # before it hears that its id is in use
        with pytest.raises((asyncio.CancelledError, RequestError)):
            await second
        output = await owner
        assert output.outputs[0].finish_reason == "length"
        await settled(llm)

    asyncio.run(main())


def test_an_old_reader_that_leaves_does_not_end_a_later_request_with_its_id(llm, runners, monkeypatch):
    slow_down(runners[0], monkeypatch)

    async def main():
        old = llm.generate([1, 2], short(), "same")
        await anext(old)
        await asyncio.wait_for(llm.wait_idle(), 10)  # it has ended, and its last output is not read
        new = asyncio.create_task(llm.complete([1, 2], short(max_tokens=20), "same"))
        await asyncio.sleep(0.02)
        await old.aclose()
        assert (await new).outputs[0].finish_reason == "length"
        await settled(llm)

    asyncio.run(main())


def test_streams_advance_no_faster_than_the_event_rate(runners):
    llm = AsyncLLM(max_event_rate=1 / 60)

    async def main():
        outputs = await read(llm, [1, 2, 3], LONG)
        assert [len(output.outputs[0].token_ids) for output in outputs][-1] == 200
        assert len(outputs) <= 3, "the first, perhaps one of a round that was due, and the last"
        assert len(outputs[0].outputs[0].token_ids) < 200, "the first token does not wait"
        assert "".join(output.delta for output in outputs) == outputs[-1].text
        await settled(llm)

    asyncio.run(main())
    llm.close()
    with pytest.raises(ConfigError, match="max_event_rate must be above 0 per second, got 0"):
        AsyncLLM(max_event_rate=0)


def test_streams_share_the_event_rate_evenly(runners, monkeypatch):
    rate, num_streams = 200, 40
    llm = AsyncLLM(max_event_rate=rate, max_num_seqs=num_streams)
    slow_down(runners[0], monkeypatch)

    async def main():
        started = time.monotonic()
        streams = await asyncio.gather(*(read(llm, [1, 2, 3 + i], LONG) for i in range(num_streams)))
        seconds = time.monotonic() - started
        between = [len(outputs) - 2 for outputs in streams]
        assert min(between) >= 1
        assert max(between) - min(between) <= 2
        assert sum(between) <= rate * seconds + num_streams + 1
        await settled(llm)

    asyncio.run(main())
    llm.close()


@pytest.mark.parametrize(("is_host", "rate"), [(True, 500.0), (False, 4000.0)])
def test_the_event_rate_left_to_the_device(monkeypatch, is_host, rate):
    fake_llm.install(monkeypatch, device=SimpleNamespace(is_host=is_host, id=0))
    llm = AsyncLLM(max_event_rate=None)
    assert llm.max_event_rate == rate
    llm.close()


def test_the_queue_is_bounded(runners, monkeypatch):
    llm = AsyncLLM(max_num_seqs=2, max_queue=3)
    slow_down(runners[0], monkeypatch)

    async def main():
        tasks = [asyncio.create_task(llm.complete([i, 2], LONG)) for i in range(5)]
        await asyncio.sleep(0.05)
        assert llm.num_unfinished == 5
        with pytest.raises(QueueFullError, match="5 completions are running or waiting, the limit is 5"):
            await llm.complete([7], short())
        with pytest.raises(RequestError, match="n is 6"):
            await llm.complete([7], short(n=6, temperature=1.0))
        tasks[0].cancel()
        tasks[4].cancel()
        await asyncio.gather(*tasks[:1], *tasks[4:], return_exceptions=True)
        while llm.num_unfinished == 5:
            await asyncio.sleep(0.001)
        assert (await llm.complete([7], short())).finished
        await asyncio.gather(*tasks[1:4])
        await settled(llm)

    asyncio.run(main())
    llm.close()
    with pytest.raises(ConfigError, match="max_queue"):
        AsyncLLM(max_queue=-1)


def test_a_failing_step_fails_its_requests_only(monkeypatch):
    runners = fake_llm.install(monkeypatch, fail_at={3})
    llm = AsyncLLM()

    async def main():
        with pytest.raises(RuntimeError, match="on fire"):
            await llm.complete([1, 2, 3], short())
        assert (await llm.complete([1, 2, 3], short())).finished
        llm.check_health()
        await settled(llm)

    asyncio.run(main())
    llm.close()
    assert runners[0].closed


def test_an_engine_that_only_fails_is_dead(monkeypatch):
    fake_llm.install(monkeypatch, fail_at=set(range(2, 1000)))
    llm = AsyncLLM()

    async def main():
        dead = asyncio.create_task(llm.wait_dead())
        for _ in range(MAX_FAILED_STEPS):
            with pytest.raises(RuntimeError, match="on fire"):
                await llm.complete([1, 2, 3], short())
        death = await asyncio.wait_for(dead, 10)
        assert "on fire" in str(death.__cause__.__cause__)
        with pytest.raises(EngineDeadError, match="5 steps in a row failed"):
            llm.check_health()
        for call in (llm.complete([1], short()), llm.reset_prefix_cache()):
            with pytest.raises(EngineDeadError):
                await call

    asyncio.run(main())
    llm.close()


def test_a_death_ends_every_request_and_later_ones(llm, monkeypatch):
    async def main():
        reader = asyncio.create_task(read(llm, [1, 2], LONG))
        waiter = asyncio.create_task(llm.complete([1, 2], LONG))
        await asyncio.sleep(0.01)
        monkeypatch.setattr(llm._engine._scheduler, "schedule", lambda: 1 / 0)
        for task in (reader, waiter):
            with pytest.raises(EngineDeadError, match="division by zero"):
                await asyncio.wait_for(task, 10)
        assert llm.num_unfinished == 0
        assert isinstance(await llm.wait_dead(), EngineDeadError)

    asyncio.run(main())


def test_close_ends_readers_and_waits_for_the_thread(runners):
    llm = AsyncLLM()

    async def main():
        task = asyncio.create_task(llm.complete([1, 2], LONG))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(llm.close)
        with pytest.raises(EngineDeadError, match="closed"):
            await task
        with pytest.raises(EngineDeadError, match="closed"):
            await llm.complete([1], short())

    asyncio.run(main())
    llm.close()
    assert runners[0].closed
    assert not llm._thread._thread.is_alive()


def test_a_loop_that_ends_early_leaves_nothing_behind(llm):
    async def leaves():
        stream = llm.generate([1, 2, 3], LONG)
        await anext(stream)

    async def stays():
        assert (await llm.complete([1, 2, 3], short())).finished
        await settled(llm)

    for _ in range(3):
        asyncio.run(leaves())
    asyncio.run(stays())
    assert len(llm._mailboxes) == 1, "closed loops are forgotten"


def test_an_idle_engine_sleeps(llm):
    async def main():
        await llm.complete([1], short())
        assert llm.seconds_since_progress == 0.0

    asyncio.run(main())
    thread = Path(f"/proc/self/task/{llm._thread._thread.native_id}/schedstat")
    time.sleep(0.1)  # for what the last request left to do
    before = thread.read_text().split()
    time.sleep(0.3)
    assert thread.read_text().split() == before, "the engine's thread was not scheduled once"


def test_on_step_hears_of_every_token(runners):
    stats = []
    llm = AsyncLLM(on_step=stats.append)
    asyncio.run(llm.complete([1, 2, 3], short()))
    llm.close()
    assert sum(step.num_tokens for step in stats) == 3 + 7
    assert sum(len(step.inter_token_seconds) for step in stats) == 7
