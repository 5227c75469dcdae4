"""The memory plan: how many KV-cache pages fit beside the weights, computed before anything is loaded.

Knows sizes, which follow from the two configurations; knows no device beyond the bytes it has. Invariant: a
``MemoryPlan`` that exists holds at least one request of ``max_model_len`` tokens; otherwise ``plan_memory`` raised and
named the option, with the value, that would make it fit.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from mili.config import EngineConfig, ModelConfig
from mili.errors import ConfigError
from mili.models.packing import PANEL_ROWS
from mili.models.weights import expected_tensors

CPU_KV_BYTES = 4 << 30  # default KV cache on the CPU: at most this ...
CPU_KV_SHARE = 0.4  # ... and at most this share of what the weights leave free
LOGIT_ROWS = 256  # rows of logits allowed for beside one per running request: prompt log-probabilities
GPU_RESERVE_BYTES = 512 << 20  # driver context, code and kernel workspace
_SLOT_LIMIT = 2**31 - 1  # slots are int32


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the device's memory goes. Sizes in bytes unless the name says otherwise."""

    free_bytes: int  # before loading
    total_bytes: int
    weight_bytes: int
    activation_bytes: int  # upper bound of one step's temporaries
    kv_bytes_per_token: int
    page_size: int  # tokens
    num_pages: int  # with the scratch page 0, which no request is given
    max_model_len: int  # tokens

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return self.num_pages * self.page_size * self.kv_bytes_per_token

    @property
    def num_kv_tokens(self) -> int:
        """Tokens the cache holds."""
        return (self.num_pages - 1) * self.page_size

    @property
    def max_concurrency(self) -> int:
        """Requests of ``max_model_len`` tokens that fit at once."""
        return (self.num_pages - 1) // -(-self.max_model_len // self.page_size)


def weight_bytes(model: ModelConfig, dtype: str, *, on_cpu: bool) -> int:
    """Bytes of the loaded weights; on the CPU matrices are padded to whole panels of output rows."""

    def elements(shape: tuple[int, ...]) -> int:
        if on_cpu and len(shape) == 2:
            shape = (-(-shape[0] // PANEL_ROWS) * PANEL_ROWS, shape[1])
        return math.prod(shape)

    return sum(elements(shape) for shape in expected_tensors(model).values()) * itemsize(dtype)


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """Bytes of one token's keys and values over all layers."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * itemsize(dtype)


def activation_bytes(model: ModelConfig, engine: EngineConfig, *, on_cpu: bool) -> int:
    """Upper bound of what one full step needs beside weights and cache: every temporary of a layer counted as live."""
    tokens = engine.resolve_max_num_batched_tokens(on_cpu=on_cpu)
    rows = min(tokens, engine.max_num_seqs + LOGIT_ROWS)
    heads = 3 * model.num_attention_heads + 2 * model.num_key_value_heads  # q twice, its result, k and v
    per_token = 4 * model.hidden_size + heads * model.head_dim + 3 * model.intermediate_size
    logits = 2 * rows * model.vocab_size * 4  # float32, and the sampler's edited copy
    rope = engine.resolve_max_model_len(model) * model.head_dim * 4
    return tokens * per_token * itemsize(engine.resolve_dtype(model)) + logits + rope


def plan_memory(
    model: ModelConfig, engine: EngineConfig, free_bytes: int, total_bytes: int, *, on_cpu: bool
) -> MemoryPlan:
    """Divide a device's memory, of which ``free_bytes`` are free before loading.

    KV cache: ``kv_cache_memory_bytes`` if given; on a GPU ``gpu_memory_utilization`` of the total less weights and
    activations; on the CPU a modest default, at most what ``max_num_seqs`` full requests use and at least one of them.
    Raises ConfigError when one request of ``max_model_len`` does not fit.
    """
    dtype = engine.resolve_dtype(model)
    max_model_len = engine.resolve_max_model_len(model)
    weights = weight_bytes(model, dtype, on_cpu=on_cpu)
    activations = activation_bytes(model, engine, on_cpu=on_cpu) + (0 if on_cpu else GPU_RESERVE_BYTES)
    per_token = kv_bytes_per_token(model, dtype)
    page_bytes = per_token * engine.page_size
    one_request = (-(-max_model_len // engine.page_size) + 1) * page_bytes  # and the scratch page
    usable = free_bytes if on_cpu else min(free_bytes, int(engine.gpu_memory_utilization * total_bytes))
    room = usable - weights - activations
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
        # A budget the caller chose is checked against the device itself, not against the share of it.
        if budget > (room := free_bytes - weights - activations):
            raise ConfigError(
                f"kv_cache_memory_bytes {budget} ({format_bytes(budget)}) does not fit: "
                f"{_account(free_bytes, weights, activations)}; lower it to at most {max(room, 0)}"
            )
    elif on_cpu:
        most = one_request * engine.max_num_seqs
        budget = min(room, max(one_request, min(CPU_KV_BYTES, int(CPU_KV_SHARE * room), most)))
    else:
        budget = room
    if budget < one_request:
        tokens = max(budget // page_bytes - 1, 0) * engine.page_size
        smallest = replace(engine, max_num_seqs=1, max_num_batched_tokens=1)
        with_small_steps = room + activation_bytes(model, engine, on_cpu=on_cpu)
        with_small_steps -= activation_bytes(model, smallest, on_cpu=on_cpu)
        with_all = free_bytes - weights - activations
        raise ConfigError(
            f"one request of max_model_len {max_model_len} needs {one_request} bytes ({format_bytes(one_request)}) of "
            f"KV cache, but {_shortage(engine, budget, usable, weights, activations, on_cpu)}; "
            f"{_remedy(engine, tokens, one_request, with_small_steps, with_all, on_cpu)}"
        )
    num_pages = min(budget // page_bytes, _SLOT_LIMIT // engine.page_size)
    return MemoryPlan(
        free_bytes, total_bytes, weights, activations, per_token, engine.page_size, num_pages, max_model_len
    )


def _shortage(engine: EngineConfig, budget: int, usable: int, weights: int, activations: int, on_cpu: bool) -> str:
    if engine.kv_cache_memory_bytes is not None:
        return f"kv_cache_memory_bytes is {budget}"
    share = "" if on_cpu else f" (gpu_memory_utilization {engine.gpu_memory_utilization:g})"
    return _account(usable, weights, activations) + share


def _remedy(
    engine: EngineConfig, tokens: int, one_request: int, with_small_steps: int, with_all: int, on_cpu: bool
) -> str:
    """What would help; `tokens` fit, and there is so much room with the smallest steps, or with all of the memory."""
    remedies = []
    if tokens:
        remedies.append(f"set max_model_len (--max-model-len) to at most {tokens}")
    if engine.kv_cache_memory_bytes is not None:
        remedies.append(f"set kv_cache_memory_bytes (--kv-cache-memory-bytes) to at least {one_request}")
    else:
        if not tokens and with_small_steps >= one_request:
            remedies.append("lower max_num_batched_tokens (--max-num-batched-tokens) or max_num_seqs (--max-num-seqs)")
        if not on_cpu and engine.gpu_memory_utilization < 1.0 and with_all >= one_request:
            remedies.append("raise gpu_memory_utilization (--gpu-memory-utilization)")
    return " or ".join(remedies or ["use a smaller model, a smaller dtype or a device with more memory"])


def _account(usable: int, weights: int, activations: int) -> str:
    left = max(usable - weights - activations, 0)
    return (
        f"of {format_bytes(usable)} usable, weights take {format_bytes(weights)} and activations "
        f"{format_bytes(activations)}, which leaves {format_bytes(left)}"
    )


def format_bytes(count: int) -> str:
    """``count`` in the largest binary unit that keeps it at 1 or above: "1.12 GiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes of this machine's memory, or of the container's limit where that is lower."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        return total, total
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line}
    free, total = fields["MemAvailable"], fields["MemTotal"]
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = root / folder
        if not (group / limit).exists() or (text := (group / limit).read_text().strip()) == "max":
            continue
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        held = int((group / used).read_text()) - int(stat.get("inactive_file", 0))  # that cache is given back on demand
        free, total = min(free, max(int(text) - held, 0)), min(total, int(text))
    return free, total


def itemsize(dtype: str) -> int:
    """Bytes of one value of a dtype that mili computes in."""
    return {"bfloat16": 2, "float32": 4}[dtype]
