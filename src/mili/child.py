"""One of a request's `n` completions on its way through the engine: all that is known of it, in one place.

It gathers; the parts are mutated by the engine only. Invariant: a child's row of a step is made of the child alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mili.batch import ForwardBatch
from mili.completion import Completion
from mili.grammar import GrammarState
from mili.request import Request
from mili.request_group import RequestGroup
from mili.sampling import SamplerState, SamplingBatch, SamplingRow


@dataclass(eq=False, slots=True)
class Child:
    """The scheduler's side, the caller's side, and how the next token is drawn."""

    group: RequestGroup
    request: Request
    completion: Completion
    sampler: SamplerState
    grammar: GrammarState | None  # of its structured_outputs


def sampling_batch(batch: ForwardBatch, children: Sequence[Child]) -> SamplingBatch:
    """The rows of `batch`, whose plan has one request of each of `children`."""
    rows = []
    for index, kind, position in batch.logit_owners:
        child = children[index]
        if kind == "sample":
            row = child.sampler.row()
            rows.append(row if child.grammar is None else row._replace(mask=child.grammar.mask))
        else:
            params, token_ids = child.request.params, child.request.token_ids
            assert params.prompt_logprobs is not None
            rows.append(SamplingRow.scoring(token_ids[position], params.prompt_logprobs))
    return SamplingBatch.build(rows)
