"""The routing policy of `mili.ray`, in Ray Serve's own request router interface.

Among replicas that are not much busier than the least busy one, those that have served the longest beginning of the
prompt come first. Ray's `PrefixCacheAffinityRouter` does the same but cannot be imported without vLLM or SGLang.
Invariant: every replica is offered, so a full or dead first choice never holds a request up.
"""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from mili.ray.asgi import HttpRequest
from mili.ray.prefix import PrefixIndex


class PrefixRouter(RequestRouter):
    """Prefix-aware while load is even, least-loaded otherwise."""

    def initialize_state(self, max_imbalance: int, capacity: int) -> None:
        """Called by Serve with `request_router_kwargs`.

        Args:
            max_imbalance: Most requests that a replica may have more than the least busy one and still be preferred.
            capacity: Blocks of text remembered for each replica.
        """
        self._max_imbalance = max_imbalance
        self._index = PrefixIndex(capacity)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in ranks; Serve takes the least busy one of the first rank that has room."""
        blocks = _blocks(pending_request)
        queued = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas}
        limit = min(queued.values(), default=0) + self._max_imbalance
        matched = {
            r.replica_id: self._index.match(str(r.replica_id), blocks) if queued[r.replica_id] <= limit else -1
            for r in candidate_replicas
        }
        best = max(matched.values(), default=0)
        # Of equally busy replicas Serve takes the first: for a prompt the one that remembers least, else any.
        ordered = random.sample(candidate_replicas, len(candidate_replicas))
        if blocks:
            ordered.sort(key=lambda r: self._index.size(str(r.replica_id)))
        first = [r for r in ordered if matched[r.replica_id] == best]
        rest = [r for r in ordered if matched[r.replica_id] != best]
        return [first, rest] if rest else [first]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember who serves the prompt."""
        self._index.record(str(replica_id), _blocks(pending_request))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget the replicas that are gone; their caches went with them."""
        super().update_replicas(replicas)
        self._index.retain({str(replica.replica_id) for replica in replicas})


def _blocks(pending_request: PendingRequest | None) -> tuple[bytes, ...]:
    if pending_request is None or not pending_request.args:
        return ()
    (request,) = pending_request.args
    assert isinstance(request, HttpRequest)
    return request.prefix_blocks
