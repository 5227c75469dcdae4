import gc
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mili
from mili import LLM, ConfigError, MiliError, RequestError, SamplingParams, runtime_threads
from mili.tokenizer import Tokenizer
from support import fake_llm

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def runners(monkeypatch):
    return fake_llm.install(monkeypatch)


@pytest.fixture
def llm(runners):
    with LLM() as llm:
        yield llm


def check_idle(llm: LLM) -> None:
    cache = llm._loaded.engine._cache
    cache.check_invariants()
    assert cache.usage == 0.0
    assert not llm._loaded.engine._groups
    assert not llm._loaded.engine.has_unfinished


def test_one_prompt_gives_a_list_of_one(llm):
    (output,) = llm.generate("def f(x):", SHORT, use_tqdm=False)
    assert output.prompt == "def f(x):"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("def f(x):")
    assert len(output.outputs[0].token_ids) == 5
    assert output.text == output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
    check_idle(llm)


def test_outputs_are_in_the_order_of_the_prompts(llm):
    prompts = ["a", [5, 6, 7], {"prompt": "b c"}, {"prompt_token_ids": [9]}]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 2, 5, 1)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 2, 5, 1]
    assert [output.prompt for output in outputs] == ["a", None, "b c", None]
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert llm.generate(prompt, param, use_tqdm=False)[0].outputs == output.outputs


def test_prompts_are_added_as_steps_have_room_for_them(runners, monkeypatch):
    prompts = [[7 + index] * 20 for index in range(30)]
    with LLM(max_num_batched_tokens=64) as llm:
        engine, waiting = llm._loaded.engine, []
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (waiting.append(len(engine._scheduler.waiting)), step())[1])
        outputs = llm.generate(prompts, SHORT, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert max(waiting) == 7  # two steps of 64 tokens, and one that begins in the second
        assert len({output.metrics.arrival_time for output in outputs}) == 1
        assert max(len(batch.token_ids) for batch in runners[0].batches) == 64
        alone = llm.generate(prompts[-1], SHORT, use_tqdm=False)
        assert alone[0].outputs == outputs[-1].outputs
        check_idle(llm)


def test_without_params_the_checkpoint_decides(llm, runners):
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    llm.generate([5], use_tqdm=False)
    held = llm.get_metrics()
    assert held["request_success_total"]["length"] + held["request_success_total"]["stop"] == 1


def test_max_tokens_none_runs_to_the_end_of_the_context(monkeypatch):
    fake_llm.install(monkeypatch, next_token=lambda ids: 7)
    with LLM(max_model_len=40) as llm:
        (output,) = llm.generate([5] * 10, SamplingParams(temperature=0.0), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 30
    assert output.outputs[0].finish_reason == "length"


def test_a_bad_prompt_in_a_list_leaves_the_engine_untouched(llm, runners):
    with pytest.raises(RequestError, match="2048 tokens, and max_model_len is 2048"):
        llm.generate([[1], [2], [3] * 2048], SHORT)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate(["a", ""], SHORT)
    with pytest.raises(RequestError, match="2 entries for 1 prompts"):
        llm.generate(["a"], [SHORT, SHORT])
    assert runners[0].num_steps == 0
    assert llm.get_metrics()["request_success_total"]["abort"] == 0, "no prompt was begun"
    check_idle(llm)
    assert llm.generate([1], SHORT, use_tqdm=False)


def test_the_progress_bar_is_optional(llm, capsys):
    llm.generate(["a", "b"], SHORT, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], SHORT)
    assert "2/2" in capsys.readouterr().err


def test_unknown_keywords_are_type_errors(runners, llm):
    for call in (
        lambda: LLM(tensor_parallel_size=2),
        lambda: LLM.plan(tensor_parallel_size=2),
        lambda: llm.generate("a", temprature=1),
        lambda: SamplingParams(best_of=2),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()


def test_bad_options_are_config_errors(runners):
    with pytest.raises(ConfigError, match="block_size"):
        LLM(block_size=3)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        LLM(kv_cache_memory_bytes=1000)
    with pytest.raises(ConfigError, match="no-such-folder"):
        LLM("./no-such-folder")
    assert not runners, "nothing was loaded"


def test_a_failing_engine_closes_its_runner(runners, monkeypatch):
    monkeypatch.setattr("mili.loaded_model.Engine", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLM()
    assert runners[0].closed


def test_options_reach_the_engine(monkeypatch):
    runners = fake_llm.install(monkeypatch)
    with LLM(FOLDER, max_num_batched_tokens=8, max_num_seqs=4, block_size=8, enable_prefix_caching=False) as llm:
        llm.generate([list(range(40)), list(range(40))], SHORT, use_tqdm=False)
        assert llm.get_metrics()["prefix_cache_hits_total"] == 0
    assert max(len(batch.token_ids) for batch in runners[0].batches) == 8
    assert runners[0].page_size == 8
    with LLM(max_num_seqs=1) as llm:
        llm.generate([[1], [2]], SHORT, use_tqdm=False)
    assert max(len(batch.seq_lens) for batch in runners[1].batches) == 1
    with LLM(hf_overrides={"max_position_embeddings": 64}, dtype="float32") as llm:
        assert (llm.max_model_len, llm.dtype, llm.device, llm.model) == (64, "float32", "cpu", "tiny-qwen3-code")


def test_prefix_cache_is_shared_between_calls_and_can_be_reset(llm):
    prompt = list(range(100))
    assert llm.generate(prompt, SHORT, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(prompt, SHORT, use_tqdm=False)[0].num_cached_tokens == 96
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, SHORT, use_tqdm=False)[0].num_cached_tokens == 0


# --- chat ---


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(messages, SHORT, use_tqdm=False)
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.get_tokenizer().apply_chat_template(messages)
    (quiet,) = llm.chat(messages, SHORT, False, chat_template_kwargs={"enable_thinking": False})
    assert quiet.prompt.endswith("<think>\n\n</think>\n\n")


def test_chat_leaves_special_tokens_to_the_template(llm, monkeypatch):
    seen = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **kw: seen.append(kw) or encode(*args, **kw))
    llm.chat([{"role": "user", "content": "Hi"}], SHORT, use_tqdm=False)
    assert seen == [{"add_special_tokens": False}]


def test_chat_takes_several_conversations(llm):
    one, two = [{"role": "user", "content": "A"}], [{"role": "user", "content": "B"}]
    outputs = llm.chat([one, two], [SHORT, SHORT], use_tqdm=False)
    assert [output.prompt.count(letter) for output, letter in zip(outputs, "AB", strict=True)] == [1, 1]
    for bad in ([], [one, []]):
        with pytest.raises(RequestError):
            llm.chat(bad, SHORT)


def test_chat_continues_the_final_message(llm):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
    (output,) = llm.chat(messages, SHORT, False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt.endswith("Hello, I")


# --- stream ---


def test_stream_equals_generate(llm):
    params = SamplingParams(seed=3, max_tokens=20, ignore_eos=True, logprobs=2)
    outputs = list(llm.stream("def f(x):", params))
    (whole,) = llm.generate("def f(x):", params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 21))
    assert "".join(output.delta for output in outputs) == whole.text
    assert [output.finished for output in outputs] == [False] * 19 + [True]
    last = outputs[-1].outputs[0]
    assert (last.token_ids, last.text, last.logprobs) == (
        whole.outputs[0].token_ids,
        whole.text,
        whole.outputs[0].logprobs,
    )
    check_idle(llm)


def test_stream_is_checked_before_the_first_token(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.stream("", SHORT)
    with pytest.raises(RequestError, match="one prompt, got 2"):
        llm.stream(["a", "b"], SHORT)
    llm.stream("never iterated", SHORT)
    check_idle(llm)


def test_leaving_a_stream_aborts_it(llm):
    for output in llm.stream("a", SHORT):
        assert not output.finished
        break
    gc.collect()
    check_idle(llm)
    assert llm.get_metrics()["request_success_total"]["abort"] == 1


def test_streams_and_generate_share_steps(llm, runners):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    alone = [llm.generate(p, params, use_tqdm=False)[0].text for p in ("a", "b")]
    steps = runners[0].num_steps
    first, second = llm.stream("a", params), llm.stream("b", params)
    texts = ["", ""]
    for one, two in zip(first, second, strict=True):
        texts[0] += one.delta
        texts[1] += two.delta
    assert texts == alone
    assert runners[0].num_steps - steps < 12
    third = llm.stream("a", params)
    begun = next(third)
    llm.generate(["b", "c"], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    (rest,) = list(third)
    assert rest.finished
    assert begun.delta + rest.delta == alone[0]
    check_idle(llm)


def test_stream_chat(llm):
    outputs = list(llm.stream_chat([{"role": "user", "content": "Hi"}], SHORT))
    assert "".join(output.delta for output in outputs) == outputs[-1].text
    assert outputs[0].prompt.endswith("<|im_start|>assistant\n")


# --- trouble ---


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_in_a_step_reaches_the_caller_and_nothing_stays(monkeypatch, error):
    runners = fake_llm.install(monkeypatch, fail_at={3}, error=error)
    with LLM(max_num_seqs=2) as llm:
        with pytest.raises(type(error)):
            llm.generate([[1], [2], [3]], SHORT, use_tqdm=False)
        check_idle(llm)
        assert len(llm.generate([[1], [2]], SHORT, use_tqdm=False)) == 2
        runners[0].fail_at = {runners[0].num_steps + 2}
        stream = llm.stream([1], SHORT)
        next(stream)
        with pytest.raises(type(error)):
            next(stream)
        check_idle(llm)


@pytest.mark.parametrize("where", ["acquire", "grow", "commit", "release", "next_shared_page"])
def test_ctrl_c_waits_until_nothing_is_half_done(llm, monkeypatch, where):
    cache = llm._loaded.engine._cache
    verb = getattr(cache, where)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(cache, where, verb)
        signal.raise_signal(signal.SIGINT)
        return verb(*args, **kwargs)

    prompts = [[7] * 20, [8] * 40]
    expected = [output.outputs for output in llm.generate(prompts, SHORT, use_tqdm=False)]
    other = llm.stream([9] * 20, SHORT)
    next(other)
    llm.reset_prefix_cache()
    for begin in (lambda: llm.generate(prompts, SHORT, use_tqdm=False), lambda: list(llm.stream(prompts[1], SHORT))):
        monkeypatch.setattr(cache, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin()
        assert getattr(cache, where) == verb and len(llm._loaded.engine._groups) == 1, "the other stream's"
        cache.check_invariants()
    assert list(other)[-1].finished
    check_idle(llm)
    assert [output.outputs for output in llm.generate(prompts, SHORT, use_tqdm=False)] == expected


@pytest.mark.parametrize("where", ["acquire", "grow", "commit", "release", "next_shared_page"])
def test_streams_collected_in_mid_step_end_after_it(llm, monkeypatch, where):
    cache = llm._loaded.engine._cache
    verb = getattr(cache, where)
    expected = llm.generate([[7] * 20, [8] * 40], SHORT, use_tqdm=False)
    llm.reset_prefix_cache()
    streams = [llm.stream([9] * 20, SHORT) for _ in range(3)]
    for stream in streams:
        next(stream)

    def collected(*args, **kwargs):
        for stream in streams:
            stream.close()  # as Python does wherever it collects garbage
        return verb(*args, **kwargs)

    monkeypatch.setattr(cache, where, collected)
    outputs = llm.generate([[7] * 20, [8] * 40], SHORT, use_tqdm=False)
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    check_idle(llm)


def test_threads_take_turns(llm):
    prompts = [[5 + index] * 9 for index in range(6)]
    expected = [output.outputs for output in llm.generate(prompts, SHORT, use_tqdm=False)]

    def work(number: int) -> bool:
        if number % 2:
            return [list(llm.stream(prompt, SHORT))[-1].outputs[0].token_ids for prompt in prompts] == [
                completion.token_ids for (completion,) in expected
            ]
        return [output.outputs for output in llm.generate(prompts, SHORT, use_tqdm=False)] == expected

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))
    check_idle(llm)


def test_a_process_that_was_forked_is_told_so(llm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        with pytest.raises(MiliError, match="fork"):
            llm.generate([1], SHORT)
    check_idle(llm)


def test_a_fork_of_a_process_with_a_model_loads_none(monkeypatch):
    monkeypatch.setattr(runtime_threads.of_process(), "process", -1)
    with pytest.raises(ConfigError, match="had loaded a model"):
        LLM(device="cpu")


def test_an_open_stream_survives_a_call_that_fails(llm):
    stream = llm.stream("a", SHORT)
    next(stream)
    with pytest.raises(RequestError):
        llm.generate([9000], SHORT)
    assert list(stream)[-1].finished


def test_a_closed_llm_says_so(llm, runners):
    stream = llm.stream([1], SHORT)
    next(stream)
    llm.close()
    llm.close()
    assert runners[0].closed
    for call in (
        lambda: llm.generate([1]),
        lambda: llm.stream([1]),
        llm.get_metrics,
        llm.reset_prefix_cache,
        lambda: next(stream),
    ):
        with pytest.raises(MiliError, match="closed"):
            call()


def test_recommended_parameters_out_of_range_are_a_mistake_of_the_checkpoint(runners, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1e7}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: repetition_penalty must be"):
        LLM(folder)
    assert not runners


def test_plan_takes_the_keywords_of_llm():
    plan = LLM.plan(block_size=32, max_model_len=512, device="cpu", dtype="float32")
    assert (plan.memory.page_size, plan.memory.max_model_len, plan.dtype) == (32, 512, "float32")
    assert LLM.plan(device_memory=(2**33, 2**33)).device == "gpu"


def test_the_bundled_tokenizer_is_returned(llm):
    assert isinstance(llm.get_tokenizer(), Tokenizer)
