"""Memory plans against sums done by hand, and every refusal with the option that would fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mili.config import EngineConfig, ModelConfig
from mili.errors import ConfigError
from mili.memory import (
    CPU_KV_BYTES,
    MemoryPlan,
    activation_bytes,
    format_bytes,
    host_memory,
    kv_bytes_per_token,
    plan_memory,
    weight_bytes,
)
from mili.plan import plan_model
from support.checkpoints import tiny_config, write_checkpoint

GIB = 1 << 30
QWEN3_0_6B = tiny_config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
)


def model(tmp_path: Path, config: dict[str, Any] = QWEN3_0_6B) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_pretrained(tmp_path)


def plan(config: ModelConfig, free: int, *, on_cpu: bool = True, total: int = 0, **options: Any) -> MemoryPlan:
    return plan_memory(config, EngineConfig(**options), free, total or free, on_cpu=on_cpu)


def test_sizes_of_qwen3_0_6b(tmp_path: Path) -> None:
    config = model(tmp_path)
    assert kv_bytes_per_token(config, "bfloat16") == 112 * 1024  # as published for this model
    assert kv_bytes_per_token(config, "float32") == 224 * 1024
    assert weight_bytes(config, "bfloat16", on_cpu=False) == 2 * 596_049_920  # its published parameter count


def test_weight_bytes_are_those_on_disk(tmp_path: Path) -> None:
    values = write_checkpoint(tmp_path, tiny_config(attention_bias=True))
    config = ModelConfig.from_pretrained(tmp_path)
    on_disk = 2 * sum(value.size for value in values.values())
    assert weight_bytes(config, "bfloat16", on_cpu=False) == on_disk
    assert weight_bytes(config, "bfloat16", on_cpu=True) == on_disk  # every matrix is whole panels
    odd = model(tmp_path, tiny_config(vocab_size=129))
    padding = 2 * 31 * 64 * 2  # embed_tokens and lm_head, 31 rows of 64, two bytes
    assert weight_bytes(odd, "bfloat16", on_cpu=True) == weight_bytes(odd, "bfloat16", on_cpu=False) + padding


def test_a_plan_adds_up(tmp_path: Path) -> None:
    config = model(tmp_path)
    got = plan(config, 64 * GIB, max_model_len=4096, kv_cache_memory_bytes=GIB)
    page_bytes = 16 * 112 * 1024
    assert got.num_pages == GIB // page_bytes
    assert got.kv_bytes == got.num_pages * page_bytes <= GIB
    assert got.num_kv_tokens == (got.num_pages - 1) * 16
    assert got.max_concurrency == (got.num_pages - 1) // 256


def test_cpu_default_is_modest(tmp_path: Path) -> None:
    config = model(tmp_path)
    assert CPU_KV_BYTES - 16 * 112 * 1024 < plan(config, 64 * GIB, max_model_len=4096).kv_bytes <= CPU_KV_BYTES
    room = (
        8 * GIB
        - weight_bytes(config, "bfloat16", on_cpu=True)
        - activation_bytes(config, EngineConfig(max_model_len=4096), on_cpu=True)
    )
    assert 0.39 * room < plan(config, 8 * GIB, max_model_len=4096).kv_bytes <= 0.4 * room
    one = plan(config, 64 * GIB)  # one request of 40960 tokens is more than the default
    assert one.max_concurrency == 1 and one.num_pages == 40960 // 16 + 1
    few = plan(config, 64 * GIB, max_model_len=64, max_num_seqs=2)  # and two small ones are less
    assert few.num_pages == 2 * (64 // 16 + 1)


def test_gpu_uses_its_share_of_the_total(tmp_path: Path) -> None:
    config = model(tmp_path)
    got = plan(config, 139 * GIB, total=140 * GIB, on_cpu=False)
    used = got.kv_bytes + got.weight_bytes + got.activation_bytes
    assert 0 <= 0.9 * 140 * GIB - used < 16 * 112 * 1024 + 1
    crowded = plan(config, 20 * GIB, total=140 * GIB, on_cpu=False)  # a neighbour holds the rest
    assert crowded.kv_bytes + crowded.weight_bytes + crowded.activation_bytes <= 20 * GIB


def test_slots_stay_int32(tmp_path: Path) -> None:
    tiny = model(tmp_path, tiny_config())
    got = plan(tiny, 4096 * GIB, on_cpu=False)
    assert got.num_pages * got.page_size < 2**31


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("free", [3 * GIB, 4 * GIB])
def test_too_little_memory_names_the_length_that_fits(tmp_path: Path, on_cpu: bool, free: int) -> None:
    config = model(tmp_path)
    with pytest.raises(ConfigError) as error:
        plan(config, free, on_cpu=on_cpu)
    message = str(error.value)
    assert "max_model_len 40960" in message
    assert ("gpu_memory_utilization" in message) is not on_cpu
    fits = int(re.search(r"--max-model-len\) to at most (\d+)", message)[1])  # type: ignore[index]
    assert plan(config, free, on_cpu=on_cpu, max_model_len=fits).max_concurrency == 1
    with pytest.raises(ConfigError):
        plan(config, free, on_cpu=on_cpu, max_model_len=fits + 1000)


def test_too_small_a_budget_names_the_budget_that_fits(tmp_path: Path) -> None:
    config = model(tmp_path)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes is 1000000") as error:
        plan(config, 64 * GIB, kv_cache_memory_bytes=1_000_000)
    needed = int(re.search(r"--kv-cache-memory-bytes\) to at least (\d+)", str(error.value))[1])  # type: ignore[index]
    assert plan(config, 64 * GIB, kv_cache_memory_bytes=needed).max_concurrency == 1
    with pytest.raises(ConfigError):
        plan(config, 64 * GIB, kv_cache_memory_bytes=needed - 1)


def test_too_large_a_budget_names_the_budget_that_fits(tmp_path: Path) -> None:
    config = model(tmp_path)
    with pytest.raises(ConfigError, match="does not fit") as error:
        plan(config, 16 * GIB, kv_cache_memory_bytes=32 * GIB)
    fits = int(re.search(r"at most (\d+)", str(error.value))[1])  # type: ignore[index]
    assert plan(config, 16 * GIB, kv_cache_memory_bytes=fits).max_concurrency >= 1


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    for on_cpu in (True, False):
        with pytest.raises(ConfigError, match=r"weights take 1\.11 GiB"):
            plan(model(tmp_path), GIB, on_cpu=on_cpu)


def test_steps_that_do_not_fit(tmp_path: Path) -> None:
    config = model(tmp_path)
    with pytest.raises(ConfigError, match=r"lower max_num_batched_tokens .* or raise gpu_memory_utilization"):
        plan(config, 24 * GIB, on_cpu=False, max_num_batched_tokens=200_000, gpu_memory_utilization=0.3)
    with pytest.raises(ConfigError, match="lower max_num_batched_tokens") as error:
        plan(config, 24 * GIB, on_cpu=False, max_num_batched_tokens=10**9)
    assert "raise gpu" not in str(error.value), "all of the memory is not enough"


def test_plan_model_reads_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    got = plan_model(tmp_path, EngineConfig(device="cpu", dtype="float32"), hf_overrides={"num_hidden_layers": 3})
    assert (got.dtype, got.device, got.model.num_hidden_layers) == ("float32", "cpu", 3)
    rows = dict(got.rows())
    assert rows["KV cache per token"] == "1.50 KiB" and rows["longest request"].startswith("256 tokens")
    elsewhere = plan_model(tmp_path, EngineConfig(device="gpu"), device_memory=(139 * GIB, 140 * GIB))
    assert elsewhere.device == "gpu" and elsewhere.memory.total_bytes == 140 * GIB
    assert plan_model(engine=EngineConfig(device="cpu")).model.vocab_size == 8192  # the bundled model


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * GIB // 2, "1.50 GiB"), (2**52, "4096.00 TiB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_host_memory_of_this_machine() -> None:
    free, total = host_memory()
    assert 0 < free <= total


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_host_memory_obeys_the_container(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\nHugePages_Total: 0\n")
    assert host_memory(tmp_path) == (600 * 1024, 1000 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    write(group, "memory.max", "max\n")
    assert host_memory(tmp_path) == (600 * 1024, 1000 * 1024)
    write(group, "memory.max", "500000\n")
    write(group, "memory.current", "300000\n")
    write(group, "memory.stat", "anon 200000\ninactive_file 100000\n")
    assert host_memory(tmp_path) == (300_000, 500_000)
