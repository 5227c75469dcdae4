"""Which replica has served which beginnings of prompts: what prefix-aware routing remembers.

A prompt's text is cut into blocks, and each block's hash covers everything before it, so equal hashes mean equal
beginnings. Knows neither Ray nor tokens: blocks of text stand in for the pages of the replicas' caches.
Invariant: a replica's memory never holds more than `capacity` blocks; the least recently used go first.
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

BLOCK_CHARS = 64  # about one page of 16 tokens
MAX_BLOCKS = 1024  # of one prompt; what comes after hardly helps to choose a replica
PREFIX_CAPACITY = 65536  # blocks remembered for each replica: about 4 M characters, 6 MB


def prefix_blocks(body: bytes) -> tuple[bytes, ...]:
    """The chained block hashes of the prompt in an HTTP body, empty when there is none or it is not JSON."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(fields, dict):
        return ()
    if "messages" in fields:  # templates put the tools before the messages
        text = _dump(fields.get("tools")) + _dump(fields["messages"])
    else:
        prompt = fields.get("prompt", "")
        text = prompt if isinstance(prompt, str) else _dump(prompt)
    data = text[: BLOCK_CHARS * MAX_BLOCKS]
    blocks: list[bytes] = []
    for start in range(
        0, len(data) - BLOCK_CHARS + 1, BLOCK_CHARS
    ):  # a last part that is no whole block can still grow
        block = data[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass")
        blocks.append(blake2b(block, digest_size=8, key=blocks[-1] if blocks else b"").digest())
    return tuple(blocks)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


class PrefixIndex:
    """For each replica, by its id, the blocks it has probably cached."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: blocks remembered for each replica."""
        assert capacity > 0
        self._capacity = capacity
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def match(self, replica: str, blocks: Sequence[bytes]) -> int:
        """How many of the first `blocks` the replica has served."""
        known: Mapping[bytes, None] = self._blocks.get(replica, {})
        return next((i for i, block in enumerate(blocks) if block not in known), len(blocks))

    def size(self, replica: str) -> int:
        """How many blocks are remembered for the replica."""
        return len(self._blocks.get(replica, ()))

    def record(self, replica: str, blocks: Sequence[bytes]) -> None:
        """Note that the replica serves a prompt of these blocks."""
        known = self._blocks.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # so that a prompt's end is forgotten before its beginning
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def retain(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        self._blocks = {replica: known for replica, known in self._blocks.items() if replica in replicas}
