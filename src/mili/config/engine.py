"""``EngineConfig``: the options of one engine, validated at construction.

Knows ranges and how an option left open follows from the model; touches no device. Nothing changes it afterwards.
"""

import operator
import re
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from mili.config.model import ModelConfig
from mili.errors import ConfigError

ENGINE_DTYPES = ("auto", "bfloat16", "float32")
MAX_PAGE_SIZE = 256
DEFAULT_NUM_BATCHED_TOKENS = {"cpu": 2048, "gpu": 8192}  # a GPU needs thousands of rows to be busy
_DEVICE = re.compile(r"auto|cpu|(?:gpu|cuda)(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine. An unknown keyword is a TypeError, a bad value a ConfigError that names the field."""

    device: str = "auto"  # "auto" | "cpu" | "gpu" | "gpu:N"; "cuda" is accepted for "gpu"
    dtype: str = "auto"  # "auto" follows the checkpoint
    page_size: int = 16  # tokens per KV-cache page
    max_model_len: int | None = None  # tokens of prompt and output together; None: all the model is made for
    max_num_seqs: int = 64  # requests running at once
    max_num_batched_tokens: int | None = None  # token budget of one step
    gpu_memory_utilization: float = 0.9  # share of device memory the engine may use
    kv_cache_memory_bytes: int | None = None  # KV-cache size; None: from what the device has left
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no device-graph capture
    batch_invariant: bool = False  # a GPU's bits as independent of the batch as a CPU's always are
    compiled: str | Path | None = None  # folder of graphs compiled ahead of time; None: compile, and keep in the cache
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be 'auto', 'cpu', 'gpu' or 'gpu:N', got {self.device!r}")
        if self.dtype not in ENGINE_DTYPES:
            raise ConfigError(f"dtype must be one of {ENGINE_DTYPES}, got {self.dtype!r}")
        self._integer("page_size", 1, MAX_PAGE_SIZE)
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size (block_size) must be a power of two, got {self.page_size}")
        self._integer("max_num_seqs", 1)
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                self._integer(name, 1)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 < share <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")
        object.__setattr__(self, "gpu_memory_utilization", float(share))
        for name in ("enable_prefix_caching", "enforce_eager", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.compiled is not None and not Path(self.compiled).is_dir():
            raise ConfigError(f"compiled must be a folder that `mili compile` wrote, got {str(self.compiled)!r}")
        self._integer("seed", 0, 2**64 - 1)
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} must be at least max_num_seqs "
                f"{self.max_num_seqs}: every running request needs one token per step; raise one or lower the other"
            )

    def _integer(self, name: str, minimum: int, maximum: int | None = None) -> None:
        value = getattr(self, name)
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < minimum or (maximum is not None and number > maximum):
            limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ConfigError(f"{name} must be an integer {limit}, got {value!r}")
        object.__setattr__(self, name, number)  # plain, where NumPy's was given

    @property
    def device_kind(self) -> str:
        """ "auto", "cpu" or "gpu"."""
        return "gpu" if self.device.startswith(("gpu", "cuda")) else self.device

    @property
    def device_id(self) -> int:
        """Which GPU, 0 unless the device names one."""
        match = _DEVICE.fullmatch(self.device)
        assert match is not None
        return int(match[1] or 0)

    def resolve_dtype(self, model: ModelConfig) -> str:
        """The dtype of weights, activations and KV cache: "bfloat16" or "float32"."""
        if self.dtype != "auto":
            return self.dtype
        if model.dtype == "float16":
            raise ConfigError(
                "dtype 'auto' cannot follow a checkpoint whose config.json says dtype 'float16': mili computes in "
                "bfloat16 or float32; choose one with dtype= (--dtype), float32 loses nothing"
            )
        return model.dtype

    def resolve_max_model_len(self, model: ModelConfig) -> int:
        """Most tokens one request may hold, prompt and output together."""
        limit = model.context_len
        if self.max_model_len is None:
            return limit
        if self.max_model_len > limit:
            what = "max_position_embeddings"
            if model.rope.type == "yarn":
                what = "original_max_position_embeddings x YaRN factor"
            raise ConfigError(
                f"max_model_len {self.max_model_len} is more than the {limit} tokens the model is made for ({what}); "
                "lower it, or extend the model with YaRN through hf_overrides"
            )
        return self.max_model_len

    def resolve_max_num_batched_tokens(self, *, on_cpu: bool) -> int:
        """Token budget of one step."""
        default = DEFAULT_NUM_BATCHED_TOKENS["cpu" if on_cpu else "gpu"]
        return self.max_num_batched_tokens or max(default, self.max_num_seqs)
