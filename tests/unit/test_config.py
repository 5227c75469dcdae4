"""config.json in every spelling, every refusal by name, and engine options."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mili.config import EngineConfig, GenerationDefaults, ModelConfig, RopeConfig
from mili.errors import ConfigError, UnsupportedModelError
from mili.models.rope import rope_frequencies, rope_table
from support.checkpoints import tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def read(folder: Path, config: Any = None, overrides: Any = None, generation: Any = None) -> ModelConfig:
    text = config if isinstance(config, str) else json.dumps(tiny_config() if config is None else config)
    (folder / "config.json").write_text(text)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_pretrained(folder, overrides)


def test_fields_are_read(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert dataclasses.asdict(config) | {"rope": None} == {
        **{name: tiny_config()[name] for name in ModelConfig.__slots__ if name in tiny_config()},
        "rope": None,
        "eos_token_ids": frozenset({1}),
    }
    assert config.rope == RopeConfig(10000.0)


def test_both_spellings_give_the_same_config(tmp_path: Path) -> None:
    new = read(tmp_path, tiny_config(rope_parameters={"rope_theta": 1e6, **YARN}))
    old_rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    old = tiny_config(rope_parameters=..., rope_theta=1e6, rope_scaling=old_rope, dtype=..., torch_dtype="bfloat16")
    assert read(tmp_path, old) == new
    plain = tiny_config(rope_parameters=..., rope_theta=1e6, rope_scaling=None, dtype=..., torch_dtype="bfloat16")
    assert read(tmp_path, plain).rope == RopeConfig(1e6)


def test_optional_fields(tmp_path: Path) -> None:
    config = read(tmp_path, tiny_config(head_dim=..., hidden_size=256, tie_word_embeddings=..., dtype=...))
    assert (config.head_dim, config.tie_word_embeddings, config.dtype) == (128, False, "float32")
    assert read(tmp_path, tiny_config(num_key_value_heads=None)).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, ["model_type", "qwen2"]),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, ["model_type", "qwen3_moe"]),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ["architectures", "Qwen3ForSequenceClassification"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, ["rope_type", "llama3"]),
        ({"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, ["rope_type", "linear"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["rope_type", "dynamic"]),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, ["mrope_section"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"use_sliding_window": True, "sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"use_sliding_window": True}, ["sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"head_dim": 32}, ["head_dim", "32", "(64, 128)"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn"]),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        read(tmp_path, tiny_config(**changes))
    assert all(part in str(error.value) for part in [*named, "config.json"])


@pytest.mark.parametrize(
    "allowed", [{"use_sliding_window": False, "sliding_window": 4096}, {"quantization_config": {}}]
)
def test_what_is_switched_off_is_no_obstacle(tmp_path: Path, allowed: dict[str, Any]) -> None:
    assert read(tmp_path, tiny_config(**allowed)) == read(tmp_path)
    read(tmp_path, tiny_config(use_sliding_window=True, sliding_window=None))


REQUIRED = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "rms_norm_eps max_position_embeddings"
)


@pytest.mark.parametrize("field", REQUIRED.split())
def test_missing_fields_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"required field {field} is missing"):
        read(tmp_path, tiny_config(**{field: ...}))


def test_missing_rope_theta_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        read(tmp_path, tiny_config(rope_parameters=...))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "many"),
        ("vocab_size", 1.5),
        ("hidden_size", 0),
        ("num_hidden_layers", -3),
        ("num_hidden_layers", True),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
        ("max_position_embeddings", []),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("eos_token_id", "end"),
        ("eos_token_id", [1, -2]),
        ("architectures", "Qwen3ForCausalLM"),
        ("rope_parameters", [1]),
        ("hidden_size", 65),
        ("intermediate_size", 97),
        ("layer_types", ["full_attention"]),
    ],
)
def test_bad_values_are_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, tiny_config(**{field: value}))
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": {"rope_theta": 1e4, **YARN, "factor": 0.5}}, "factor"),
        ({"rope_parameters": {"rope_theta": 1e4, **YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "type": "yarn", "rope_type": "default"}}, "rope_type"),
        ({"rope_theta": 1e6}, "rope_theta"),  # and rope_parameters says 1e4
        ({"torch_dtype": "float32"}, "torch_dtype"),  # and dtype says bfloat16
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, tiny_config(**changes))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        ModelConfig.from_pretrained(tmp_path / "nothing")
    for text, message in [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ("\ufeff{}", "not valid JSON")]:
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, text)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_pretrained(tmp_path)


def test_stop_tokens_are_merged_and_kept_inside_the_vocabulary(tmp_path: Path) -> None:
    assert read(tmp_path, generation={"eos_token_id": [2, 1, 7]}).eos_token_ids == {1, 2, 7}
    assert read(tmp_path, tiny_config(eos_token_id=None), generation={}).eos_token_ids == frozenset()
    assert read(tmp_path, tiny_config(eos_token_id=[3, 128]), generation={}).eos_token_ids == {3}


def test_overrides(tmp_path: Path) -> None:
    assert read(tmp_path, overrides={"rms_norm_eps": 1e-5}).rms_norm_eps == 1e-5
    for name in ("rope_parameters", "rope_scaling"):
        rope = read(tmp_path, overrides={name: YARN}).rope
        assert (rope.type, rope.theta, rope.factor) == ("yarn", 10000.0, 4.0)  # theta still the file's
    assert read(tmp_path, overrides={"rope_theta": 5e6}).rope.theta == 5e6
    yarn = tiny_config(rope_parameters={"rope_theta": 1e4, **YARN})
    assert read(tmp_path, yarn, overrides={"rope_scaling": None}).rope == RopeConfig(1e4)
    assert read(tmp_path, overrides={"torch_dtype": "float32"}).dtype == "float32"
    assert read(tmp_path, overrides={"dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize(
    "overrides", [{"rope_thetta": 1.0}, {"initializer_range": 0.1}, {"rope_scaling": {"facctor": 2}}]
)
def test_unknown_overrides_are_errors(tmp_path: Path, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rope_thetta|initializer_range|facctor"):
        read(tmp_path, overrides=overrides)


def test_generation_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.from_pretrained(tmp_path).as_dict() == {}
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "do_sample": True}
    read(tmp_path, generation={**given, "max_new_tokens": 9, "pad_token_id": 3})
    expected = {**given, "max_tokens": 9}
    del expected["do_sample"]
    assert GenerationDefaults.from_pretrained(tmp_path).as_dict() == expected
    read(tmp_path, generation={"do_sample": False, "temperature": 0.6})
    assert GenerationDefaults.from_pretrained(tmp_path).temperature == 0.0


@pytest.mark.parametrize(("field", "value"), [("top_p", 1.5), ("temperature", -1), ("top_k", 0.5), ("do_sample", 1)])
def test_bad_generation_defaults_are_named(tmp_path: Path, field: str, value: Any) -> None:
    read(tmp_path, generation={field: value})
    with pytest.raises(ConfigError, match=f"{field} must be"):
        GenerationDefaults.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("device", "gpu:x"),
        ("device", None),
        ("dtype", "float16"),
        ("page_size", 24),
        ("page_size", 0),
        ("page_size", 512),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_seqs", 2.0),
        ("max_num_batched_tokens", -1),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", "0.9"),
        ("kv_cache_memory_bytes", 0),
        ("enable_prefix_caching", 1),
        ("enforce_eager", "no"),
        ("batch_invariant", None),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_engine_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)


def test_numpys_numbers_are_numbers() -> None:
    config = EngineConfig(max_model_len=np.int64(300), seed=np.uint8(3), gpu_memory_utilization=np.float32(0.5))
    assert config == EngineConfig(max_model_len=300, seed=3, gpu_memory_utilization=0.5)
    assert type(config.max_model_len) is type(config.seed) is int and type(config.gpu_memory_utilization) is float


def test_engine_config_is_frozen_and_strict() -> None:
    with pytest.raises(TypeError):
        EngineConfig(block_sizes=16)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("device", "kind", "number"),
    [
        ("auto", "auto", 0),
        ("cpu", "cpu", 0),
        ("gpu", "gpu", 0),
        ("gpu:3", "gpu", 3),
        ("cuda", "gpu", 0),
        ("cuda:1", "gpu", 1),
    ],
)
def test_devices(device: str, kind: str, number: int) -> None:
    config = EngineConfig(device=device)
    assert (config.device_kind, config.device_id) == (kind, number)


def test_token_budget_covers_the_running_requests() -> None:
    assert EngineConfig().resolve_max_num_batched_tokens(on_cpu=True) == 2048
    assert EngineConfig().resolve_max_num_batched_tokens(on_cpu=False) == 8192
    assert EngineConfig(max_num_seqs=4096).resolve_max_num_batched_tokens(on_cpu=True) == 4096
    assert EngineConfig(max_num_batched_tokens=100).resolve_max_num_batched_tokens(on_cpu=False) == 100
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens 8 .* max_num_seqs 16"):
        EngineConfig(max_num_seqs=16, max_num_batched_tokens=8)


def test_float16_needs_a_choice(tmp_path: Path) -> None:
    model = read(tmp_path, tiny_config(dtype="float16"))
    with pytest.raises(ConfigError, match="float16"):
        EngineConfig().resolve_dtype(model)
    assert EngineConfig(dtype="float32").resolve_dtype(model) == "float32"
    assert EngineConfig().resolve_dtype(read(tmp_path)) == "bfloat16"


def test_max_model_len(tmp_path: Path) -> None:
    model = read(tmp_path)
    assert EngineConfig().resolve_max_model_len(model) == 256
    assert EngineConfig(max_model_len=256).resolve_max_model_len(model) == 256
    with pytest.raises(ConfigError, match=r"max_model_len 257 .* 256 tokens .*max_position_embeddings"):
        EngineConfig(max_model_len=257).resolve_max_model_len(model)


def test_yarn_extends_the_length_before_extension(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, **YARN}
    for stated in (256, 1024):  # checkpoints state either the old length or the new one
        model = read(tmp_path, tiny_config(rope_parameters=rope, max_position_embeddings=stated))
        assert EngineConfig().resolve_max_model_len(model) == 1024
    with pytest.raises(ConfigError, match=r"1025 .* 1024"):
        EngineConfig(max_model_len=1025).resolve_max_model_len(model)
    implied = {key: value for key, value in rope.items() if key != "factor"}
    model = read(tmp_path, tiny_config(rope_parameters=implied, max_position_embeddings=1024))
    assert model.rope.factor == 4.0


ROPES = {
    "default 1e6": {"rope_type": "default", "rope_theta": 1e6},
    "default 5e6": {"rope_type": "default", "rope_theta": 5e6},
    "yarn": {"rope_theta": 1e6, **YARN, "original_max_position_embeddings": 32768},
    "no truncation": {"rope_theta": 1e6, **YARN, "original_max_position_embeddings": 32768, "truncate": False},
    "attention factor": {"rope_theta": 1e6, **YARN, "attention_factor": 1.3},
    "mscale": {"rope_theta": 1e4, **YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "mscale alone": {"rope_theta": 1e4, **YARN, "mscale": 0.707},
    "betas": {"rope_theta": 1e6, **YARN, "original_max_position_embeddings": 32768, "beta_fast": 16, "beta_slow": 2},
    "zero betas": {
        "rope_theta": 1e6,
        **YARN,
        "original_max_position_embeddings": 32768,
        "beta_fast": 0,
        "beta_slow": 0,
    },
    "empty ramp": {"rope_theta": 1e6, **YARN, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    "ramp below zero": {"rope_theta": 1e6, **YARN, "original_max_position_embeddings": 4},
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rope_table_equals_transformers(tmp_path: Path, name: str, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    settings = dict(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=ROPES[name])
    rope = read(tmp_path, tiny_config(**settings)).rope
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**tiny_config(**settings, architectures=..., model_type=..., dtype=...)))
    frequencies, factor = rope_frequencies(rope, head_dim)
    inv_freq = theirs.inv_freq.numpy()
    # torch's float32 power is wrong in the last bit for a few dimensions, ours is correctly rounded.
    np.testing.assert_array_max_ulp(frequencies, inv_freq, maxulp=1)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    positions = 9000  # more than a block of the table
    table = rope_table(rope, head_dim, positions)
    assert table.shape == (positions, head_dim) and table.dtype == np.float32 and table.flags.c_contiguous
    cos, sin = theirs(torch.zeros(1), torch.arange(positions)[None])
    expected = np.concatenate([cos[0, :, : head_dim // 2].numpy(), sin[0, :, : head_dim // 2].numpy()], axis=1)
    # One last bit of a frequency is an angle that grows with the position; elsewhere the tables are equal to 1e-6.
    drift = (
        np.abs(frequencies - inv_freq) * np.arange(positions, dtype=np.float32)[:, None]
    )  # [positions, head_dim / 2]
    assert (np.abs(table - expected) <= 1e-6 + 2 * np.concatenate([drift, drift], axis=1)).all()
