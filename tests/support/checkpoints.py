"""Small random Qwen3 checkpoints on disk, in the Hugging Face layout, sound or damaged on purpose.

Written with the ``safetensors`` package, so that the reader under test never checks its own writer's mistakes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "eos_token_id": 1,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of a two-layer Qwen3; a change to ``...`` removes the field."""
    return {key: value for key, value in {**TINY, **changes}.items() if value is not ...}


def checkpoint_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Qwen3 checkpoint, written out independently of ``mili.models.weights``."""
    hidden, inter, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (width, hidden)
            if config.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        if config.get("attention_bias"):
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{layer}.self_attn.q_norm.weight"] = (head,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 values, scaled so that activations stay near 1 and attention is neither flat nor one-hot."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in checkpoint_shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values *= 0.2
        elif "embed" not in name:
            values *= shape[1] ** -0.5
        tensors[name] = values.astype(np.float32)
    return tensors


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as a checkpoint stores them; bfloat16 by truncation, as its bits in uint16."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, np.dtype(dtype))


def write_file(path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> None:
    """One safetensors file; ``dtypes`` gives each tensor's dtype by its NumPy name, or "bfloat16"."""
    save_file({name: stored(values, dtypes[name]) for name, values in tensors.items()}, path, {"format": "pt"})

    def name_bfloat16(header: dict[str, Any]) -> None:  # the one dtype NumPy cannot name
        for name in tensors:
            if dtypes[name] == "bfloat16":
                header[name]["dtype"] = "BF16"

    edit_header(path, name_bfloat16)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    dtype: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    shards: int = 1,
    seed: int = 0,
    generation_config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write ``config.json`` and weights; return the float32 values before rounding to ``dtype``.

    ``tensors`` replaces the random ones, ``dtype`` the config's, ``dtypes`` that of single tensors; several ``shards``
    come with an index.
    """
    config = tiny_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    values = dict(random_tensors(config, seed) if tensors is None else tensors)
    default = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    names = dict.fromkeys(values, default) | dict(dtypes or {})
    if shards == 1:
        write_file(folder / "model.safetensors", values, names)
        return values
    parts = [list(values)[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        write_file(folder / file, {name: values[name] for name in part}, names)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_index(folder, weight_map)
    return values


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """The index of a sharded checkpoint."""
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file with ``edit`` applied to it; the tensor bytes stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def without(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The tensors less those named."""
    dropped = set(names)
    return {name: values for name, values in tensors.items() if name not in dropped}


def write_transformers_checkpoint(
    folder: Path, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **config: Any
) -> Any:
    """Save a random ``Qwen3ForCausalLM`` built from ``Qwen3Config(**config)`` and return it, in evaluation mode.

    Weights are redrawn as ``random_tensors`` draws them: transformers' own initialisation leaves every norm at 1 and
    every bias at 0, where a swapped or forgotten one would go unseen.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    base = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type", "dtype")}
    settings = {**base, **config}
    model = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    # Already on bfloat16's grid: saving as bfloat16 loses nothing.
    values = {name: torch.from_numpy(v).bfloat16().float() for name, v in random_tensors(settings, seed).items()}
    if settings["tie_word_embeddings"]:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.load_state_dict(values, strict=True)
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
