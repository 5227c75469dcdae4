"""A folder of graphs compiled ahead of time is loaded without compiling, or refused with what it was made for."""

import json
import shutil
from pathlib import Path

import pytest
from max.driver import CPU

import mili
import mili.compiler
from mili import LLM, ConfigError, ModelConfig, SamplingParams
from mili.ahead_of_time import compile_ahead
from mili.compiler import artefact_facts, artefact_paths, target_of
from mili.config import EngineConfig
from mili.step_compiler import Target

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"


@pytest.fixture(scope="module")
def facts():
    return artefact_facts(ModelConfig.from_pretrained(FOLDER), "bfloat16", 16, target_of(CPU()))


@pytest.fixture
def compiled(facts, tmp_path):
    """What `mili compile` writes, from the cache that the other tests fill."""
    cached, there = artefact_paths(facts), artefact_paths(facts, tmp_path)
    if not cached.are_there:
        LLM(dtype="bfloat16").close()
    shutil.copy(cached.forward, there.forward)
    shutil.copy(cached.sampler, there.sampler)
    there.note.write_text(json.dumps(facts))
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args):
        raise AssertionError("something is being compiled")

    monkeypatch.setattr(mili.compiler, "compile_step", refuse)


def test_a_compiled_folder_needs_neither_compiler_nor_cache(compiled, no_compiler, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MILI_CACHE_DIR", str(tmp_path_factory.mktemp("empty")))
    with LLM(compiled=compiled, dtype="bfloat16") as llm:
        (output,) = llm.generate("def f(x):", SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert output.text


def test_another_page_size_is_refused_by_name(compiled, no_compiler):
    with pytest.raises(ConfigError, match=r"made for page_size 16 \(wanted 32\): compile it again"):
        LLM(compiled=compiled, dtype="bfloat16", block_size=32)


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("sources", "sources", "0"),
        ("target", "arch", "sm_90a"),
        ("config", "hidden_size", 7),
        ("max", "max", "26.6.0"),
        ("batch_invariant", "batch_invariant", True),
    ],
)
def test_what_else_it_was_made_for_is_named(compiled, no_compiler, facts, key, name, value):
    made = {**facts, key: {**facts[key], name: value} if isinstance(facts[key], dict) else value}
    for old in compiled.iterdir():
        old.unlink()
    artefact_paths(made, compiled).note.write_text(json.dumps(made))
    with pytest.raises(ConfigError, match=f"made for {name} {value!r} "):
        LLM(compiled=compiled, dtype="bfloat16")


def test_batch_invariance_asks_a_gpu_for_another_graph_and_the_cpu_for_the_same(facts):
    def wanted(target, batch_invariant):
        return artefact_facts(ModelConfig.from_pretrained(FOLDER), "bfloat16", 16, target, batch_invariant)

    gpu = Target("gpu", "sm_90a")
    assert wanted(target_of(CPU()), True) == facts
    assert wanted(gpu, True)["batch_invariant"]
    assert artefact_paths(wanted(gpu, True)) != artefact_paths(wanted(gpu, False))


def test_an_empty_missing_or_damaged_folder_is_refused(compiled, no_compiler, tmp_path_factory, facts):
    with pytest.raises(ConfigError, match="holds no compiled graph"):
        LLM(compiled=tmp_path_factory.mktemp("empty"))
    with pytest.raises(ConfigError, match="must be a folder"):
        LLM(compiled=compiled / "nowhere")
    paths = artefact_paths(facts, compiled)
    paths.sampler.write_bytes(b"not a graph")
    with pytest.raises(ConfigError, match=r"sampler\.mef is not readable: compile it again"):
        LLM(compiled=compiled, dtype="bfloat16")
    paths.sampler.unlink()
    with pytest.raises(ConfigError, match="only a part of its compiled graphs"):
        LLM(compiled=compiled, dtype="bfloat16")


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match="'sm_90a', got 'h200'"):
        compile_ahead(None, Path("unused"), "h200", EngineConfig())
