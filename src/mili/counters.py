"""Running totals of one engine, under the names vLLM's metrics have.

It knows no requests and no clock; the engine counts, this file names. Invariant: totals only grow.
"""

from collections import Counter
from dataclasses import dataclass, field

from mili.outputs import FinishReason


@dataclass(eq=False, slots=True)
class Counters:
    """What has happened since the engine was made; mutated by the engine only."""

    prompt_tokens: int = 0  # of prompts that are computed, whether from the cache or not
    prompt_tokens_cached: int = 0  # of those, reused from the prefix cache
    generation_tokens: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)  # completions, by why they ended
    failed: int = 0  # completions lost to a step that raised

    def as_dict(self) -> dict[str, float | dict[str, int]]:
        """Metric names to values; `request_success_total` by finish reason, every reason present."""
        return {
            "prompt_tokens_total": self.prompt_tokens,
            "prompt_tokens_cached_total": self.prompt_tokens_cached,
            "generation_tokens_total": self.generation_tokens,
            "request_success_total": {str(reason): self.finished[reason] for reason in FinishReason},
            "request_failure_total": self.failed,
        }
