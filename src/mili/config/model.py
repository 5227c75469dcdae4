"""``ModelConfig``: what ``config.json`` says about the network, checked before anything is loaded.

Knows field names as transformers spells them, in their old and new forms; knows no weights and no devices.
Invariant: a ``ModelConfig`` that exists describes a dense Qwen3 that mili can run; every refusal names the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mili.config._fields import Fields, read_json_object
from mili.config.rope import RopeConfig, normalise, parse_rope
from mili.errors import ConfigError, UnsupportedModelError

ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128)  # what the attention kernels are compiled for
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_KIND_KEYS = ("architectures", "model_type", "hidden_act", "quantization_config", "dtype", "torch_dtype")
_SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
_HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps")
_OTHER_KEYS = ("use_sliding_window", "sliding_window", "layer_types", "tie_word_embeddings", "eos_token_id")
# Every field that is read, hence every field that may be overridden.
_KEYS = frozenset(_ROPE_KEYS + _KIND_KEYS + _SIZE_KEYS + _HEAD_KEYS + _OTHER_KEYS)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense Qwen3, in the words of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # independent of hidden_size / num_attention_heads
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str  # one of DTYPES: what the checkpoint says, not what the engine computes in
    eos_token_ids: frozenset[int]

    @classmethod
    def from_pretrained(cls, path: Path | str, hf_overrides: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Read ``config.json`` (and the stop tokens of ``generation_config.json``) in the folder ``path``.

        ``hf_overrides`` replaces fields; the rope objects are merged key by key, so that switching YaRN on need not
        repeat ``rope_theta``. Raises UnsupportedModelError for a model mili cannot run, ConfigError for a bad field.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give the folder that holds config.json")
        file = folder / "config.json"
        if not file.exists():
            raise ConfigError(f"{folder} has no config.json; a model folder holds config.json and *.safetensors files")
        values = read_json_object(file)
        rope = normalise(values, str(file))
        overrides = dict(hf_overrides or {})
        if unknown := sorted(str(key) for key in overrides if key not in _KEYS):
            raise ConfigError(f"hf_overrides: unknown field {unknown[0]!r}; known fields: {', '.join(sorted(_KEYS))}")
        for old, new in (("torch_dtype", "dtype"), ("dtype", "torch_dtype")):
            if old in overrides:
                values.pop(new, None)
        if any(key in overrides and overrides[key] is None for key in ("rope_scaling", "rope_parameters")):
            rope = {key: value for key, value in rope.items() if key == "rope_theta"}  # null switches scaling off
        rope |= normalise(overrides, "hf_overrides")
        values |= overrides
        generation = folder / "generation_config.json"
        stops = Fields(read_json_object(generation), str(generation)) if generation.exists() else None
        return _parse(Fields(values, str(file)), rope, stops)

    @property
    def context_len(self) -> int:
        """Longest sequence the model is made for, in tokens.

        With YaRN the length before extension times ``factor``, as vLLM computes it: some checkpoints keep the old
        ``max_position_embeddings`` beside YaRN and some write the extended one.
        """
        if self.rope.type == "yarn":
            return int(self.rope.original_max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings


def _parse(fields: Fields, rope: Mapping[str, Any], generation: Fields | None) -> ModelConfig:
    _refuse_unsupported(fields)
    vocab_size = fields.integer("vocab_size")
    hidden_size = fields.integer("hidden_size")
    num_attention_heads = fields.integer("num_attention_heads")
    max_position_embeddings = fields.integer("max_position_embeddings")
    eos = fields.token_ids("eos_token_id") | (generation.token_ids("eos_token_id") if generation else frozenset())
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_attention_heads,
        # Written as null it means one per query head; left out it is a field we should not guess.
        num_key_value_heads=fields.integer(
            "num_key_value_heads", num_attention_heads if "num_key_value_heads" in fields else None
        ),
        head_dim=fields.integer("head_dim", hidden_size // num_attention_heads or None),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=parse_rope(rope, max_position_embeddings, fields.source),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        dtype=_dtype(fields),
        # An id outside the vocabulary can never be sampled; kept, it would point outside a row of logits.
        eos_token_ids=frozenset(token for token in eos if token < vocab_size),
    )
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 2:
            raise ConfigError(f"{fields.source}: {name} must be even, got {getattr(config, name)}")
    if config.head_dim not in HEAD_DIMS:
        raise UnsupportedModelError(f"{fields.source}: head_dim must be one of {HEAD_DIMS}, got {config.head_dim}")
    if num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"{fields.source}: num_attention_heads {num_attention_heads} must be a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    layer_types = fields.strings("layer_types")
    if layer_types is not None and len(layer_types) != config.num_hidden_layers:
        raise ConfigError(
            f"{fields.source}: layer_types has {len(layer_types)} entries for "
            f"num_hidden_layers {config.num_hidden_layers}"
        )
    return config


def _refuse_unsupported(fields: Fields) -> None:
    def refuse(name: str, value: object, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{fields.source}: {name} {value!r} is not supported; mili runs {supported}")

    model_type = fields.string("model_type")
    if model_type != MODEL_TYPE:
        raise refuse("model_type", model_type, f"{MODEL_TYPE!r} (dense)")
    architectures = fields.strings("architectures")
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise refuse("architectures", architectures, f"[{ARCHITECTURE!r}]")
    if quantization := fields.mapping("quantization_config"):
        method = quantization.get("quant_method", quantization)
        raise refuse("quantization_config", method, "unquantised checkpoints (bfloat16, float16, float32)")
    hidden_act = fields.string("hidden_act", "silu")
    if hidden_act != "silu":
        raise refuse("hidden_act", hidden_act, "'silu'")
    for layer_type in fields.strings("layer_types") or ():
        if layer_type != "full_attention":
            raise refuse("layer_types entry", layer_type, "'full_attention'")
    # An absent sliding_window is 4096 in transformers' Qwen3Config; only an explicit null means none.
    window = fields.get("sliding_window") if "sliding_window" in fields else 4096
    if fields.boolean("use_sliding_window", False) and window is not None:
        raise refuse("use_sliding_window with sliding_window", window, "full attention (use_sliding_window false)")


def _dtype(fields: Fields) -> str:
    dtype, legacy = (fields.get(name) for name in ("dtype", "torch_dtype"))
    if dtype is not None and legacy is not None and dtype != legacy:
        raise ConfigError(f"{fields.source}: dtype {dtype!r} and torch_dtype {legacy!r} disagree")
    name = "torch_dtype" if dtype is None and legacy is not None else "dtype"
    value = fields.string(name, "float32")  # what transformers assumes of a config that does not say
    if value not in DTYPES:
        raise UnsupportedModelError(f"{fields.source}: {name} {value!r} is not supported; mili reads {DTYPES}")
    return value
