"""What a model needs and what a device can do with it, without loading: the data behind ``mili plan``.

Knows how to find a model's config and a device's memory; the arithmetic is ``mili.memory``'s. Reads JSON files only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mili.config import EngineConfig, ModelConfig
from mili.memory import MemoryPlan, format_bytes, host_memory, plan_memory
from mili.models.hub import resolve_model


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The plan of one model on one device."""

    folder: Path
    model: ModelConfig
    dtype: str
    device: str  # "cpu" or "gpu"
    memory: MemoryPlan

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), in reading order, for a table."""
        memory, model = self.memory, self.model
        heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} KV heads of {model.head_dim}"
        return [
            ("model", str(self.folder)),
            ("network", f"{model.num_hidden_layers} layers of {model.hidden_size}; {heads}"),
            ("dtype", self.dtype),
            ("device", self.device),
            ("memory free", f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)}"),
            ("weights", format_bytes(memory.weight_bytes)),
            ("activations, at most", format_bytes(memory.activation_bytes)),
            ("KV cache per token", format_bytes(memory.kv_bytes_per_token)),
            ("KV cache", f"{format_bytes(memory.kv_bytes)}: {memory.num_kv_tokens} tokens in {memory.num_pages} pages"),
            ("longest request", f"{memory.max_model_len} tokens (max_model_len)"),
            ("full requests at once", str(memory.max_concurrency)),
        ]


def plan_model(
    model: str | Path | None = None,
    engine: EngineConfig | None = None,
    *,
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    device_memory: tuple[int, int] | None = None,
) -> ModelPlan:
    """Plan ``model`` (as ``resolve_model`` takes it) for the device the options name.

    ``device_memory`` is (free, total) bytes of a device that is not here; then "auto" means a GPU. Raises ConfigError
    when the model cannot run, with the option that would make it fit.
    """
    engine = engine or EngineConfig()
    folder = resolve_model(model, revision, weights=False)
    config = ModelConfig.from_pretrained(folder, hf_overrides)
    on_cpu = engine.device_kind == "cpu"
    if device_memory is None:
        device_memory, on_cpu = _device_memory(engine)
    memory = plan_memory(config, engine, *device_memory, on_cpu=on_cpu)
    return ModelPlan(folder, config, engine.resolve_dtype(config), "cpu" if on_cpu else "gpu", memory)


def _device_memory(engine: EngineConfig) -> tuple[tuple[int, int], bool]:
    """((free, total) bytes, whether it is the CPU) of the device the options name."""
    if engine.device_kind == "cpu":
        return host_memory(), True
    from mili.runner import device_memory, resolve_device  # imports MAX, which only asking a GPU is worth

    device = resolve_device(engine)
    return device_memory(device), bool(device.is_host)
