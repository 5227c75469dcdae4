"""mili: a small inference engine for Qwen3 whose kernels are its own.

Public names only. Each is imported when first used, so that `import mili` stays cheap: MAX, NumPy and the tokenizer
load with the first `LLM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mili.async_llm import AsyncLLM
    from mili.config import EngineConfig, ModelConfig
    from mili.errors import (
        ConfigError,
        EngineDeadError,
        MiliError,
        QueueFullError,
        RequestError,
        UnsupportedModelError,
        WeightError,
    )
    from mili.llm import LLM
    from mili.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
    from mili.sampling_params import SamplingParams
    from mili.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "Logprob",
    "MiliError",
    "ModelConfig",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedModelError",
    "WeightError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562); `AttributeError` for anything else."""
    for module, names in _modules().items():
        if name in names:
            value = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'mili' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _modules() -> dict[str, tuple[str, ...]]:
    return {
        "mili.async_llm": ("AsyncLLM",),
        "mili.config": ("EngineConfig", "ModelConfig"),
        "mili.errors": (
            "ConfigError",
            "EngineDeadError",
            "MiliError",
            "QueueFullError",
            "RequestError",
            "UnsupportedModelError",
            "WeightError",
        ),
        "mili.llm": ("LLM",),
        "mili.outputs": ("CompletionOutput", "FinishReason", "Logprob", "RequestMetrics", "RequestOutput"),
        "mili.sampling_params": ("SamplingParams",),
        "mili.structured_outputs": ("StructuredOutputsParams",),
    }
