"""An oracle nobody has seen fail is not an oracle: each planted bug must be found by the machine on guard.

A bug is a piece of source text and its replacement; see `support.mutants`.
"""

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from mili import batch, engine, flight, request_group, scheduler
from mili.cache import kv_cache, page_pool, radix_tree
from support.engine_machine import EngineMachine
from support.kv_cache_machine import KVCacheMachine
from support.mutants import copy_with, mutant
from support.radix_tree_machine import RadixTreeMachine
from support.scheduler_machine import SchedulerMachine

# No shrinking: the failure is expected and nobody reads it.
SEARCH = settings(
    max_examples=1000,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
QUICK = settings(SEARCH, max_examples=20)

EVICTION_CHECK = "if node.lock_count or node.children or queued_at != node.last_access:"

KV_CACHE_BUGS = {
    "skip the duplicate free": (kv_cache, "self._pool.free(private[: len(existing)])", "pass"),
    "free the tree's page instead of the duplicate": (kv_cache, "free(private[: len(existing)])", "free(existing)"),
    "forget to swap pages": (kv_cache, "lease.page_table[first : first + len(existing)] = existing", "pass"),
    "forget to lock at acquire": (kv_cache, "self._tree.lock(node)\n", "pass\n"),
    "forget to lock at commit": (kv_cache, "self._tree.lock(node, above=lease.node)", "pass"),
    "lock the whole path at commit": (kv_cache, "self._tree.lock(node, above=lease.node)", "self._tree.lock(node)"),
    "match the whole prompt": (kv_cache, "(len(token_ids) - 1) // self", "len(token_ids) // self"),
    "share a page that is not full": (kv_cache, "len(computed_token_ids) // self.page_size", "lease.num_pages"),
    "keep the tail at release": (
        kv_cache,
        "self._pool.free(lease.page_table[lease.num_shared",
        "list(lease.page_table[0",
    ),
    "forget to unlock": (kv_cache, "self._tree.unlock(lease.node)", "pass"),
    "lose pages when the table grows": (
        kv_cache,
        "page_table[: lease.num_pages] = lease.page_table[: lease.num_pages]",
        "pass",
    ),
    "evict a locked node": (radix_tree, EVICTION_CHECK, "if node.children:"),
    "split without the locks": (radix_tree, "lock_count=node.lock_count,", ""),
    "count a locked page as evictable": (radix_tree, "self.num_evictable -= len(step.pages)", "pass"),
    "compare only first pages": (
        radix_tree,
        "if tokens[position : position + len(node.tokens)] == node.tokens:",
        "if 1:",
    ),
    "hand out a page and keep it": (page_pool, "del self._free[-count:]", "pass"),
}

RADIX_TREE_BUGS = {
    "evict an inner node": (radix_tree, EVICTION_CHECK, EVICTION_CHECK.replace("node.children or ", "")),
    "believe an old access time": (radix_tree, EVICTION_CHECK, "if node.lock_count or node.children:"),
    "evict in no order": (radix_tree, "heapq.heappop(self._eviction_queue)", "self._eviction_queue.pop()"),
    "evict from the front of a node": (
        radix_tree,
        "evicted += reversed(node.pages[num_kept:])",
        "evicted += node.pages[num_kept:]",
    ),
    "never evict a parent": (radix_tree, "self._queue_if_evictable(parent)", "pass"),
}

SCHEDULER_BUGS = {
    "exceed the token budget": (scheduler, "num_new = min(num_new, budget)", "pass"),
    "admit beyond the token budget": (scheduler, "- request.num_computed, budget)", "- request.num_computed, 99)"),
    "exceed the logit rows": (
        scheduler,
        "num_new = min(num_new, logit_rows)\n                    ",
        "pass\n                    ",
    ),
    "lose the output at preemption": (
        scheduler,
        "victim.num_preemptions += 1",
        "victim.num_preemptions += 1; del victim.token_ids[victim.num_prompt_tokens:]",
    ),
    "preempted to the back of the queue": (scheduler, "self.waiting.appendleft(victim)", "self.waiting.append(victim)"),
    "preempt the oldest": (scheduler, "victim = self.running.pop()", "victim = self.running.pop(0)"),
    "admit out of order": (
        scheduler,
        "request = self.waiting[0]",
        "request = self.waiting[-1]; self.waiting.rotate(1)",
    ),
    "forget the pages of the finished": (scheduler, "if request.lease is not None:", "if False:"),
    "believe more computed than is": (scheduler, "request.token_ids[: request.num_computed])", "request.token_ids)"),
    "score prompt positions from cached pages": (scheduler, "if num_unscored else token_ids)", "if 0 else token_ids)"),
    "stop before min_tokens": (scheduler, ">= request.params.min_tokens", ">= 0"),
    "one token too many": (
        scheduler,
        "elif len(token_ids) >= request.max_len",
        "elif len(token_ids) > request.max_len",
    ),
    "no room for growth": (scheduler, "not self._make_room(request, lease, num_tokens)", "False"),
}

FLIGHT_BUGS = {
    "draw twice from one place of the random stream": ("ints[:, 5] += 1", "pass"),
    "leave the ended where they were": ("positions[is_padding] = 0", "pass"),
    "forget the page that begins": ("num_tokens % page_size == 1 or page_size == 1", "False"),
    "grow too late": ("not cache.grow(lease, num_tokens)", "not cache.grow(lease, num_tokens - 1)"),
    "hand tokens to the ended": ("if not request.finished]", "]"),
    "repeat the position": ("seq_lens=positions + np.int32(1)", "seq_lens=positions"),
}

# Module of the bug, where its copy's class or function is put, text, replacement.
AHEAD_BUGS = {
    "forget what is in flight": (scheduler, engine, "Scheduler", "num_computed += part.num_new_tokens", "pass"),
    "put tokens before what is in flight": (
        batch,
        request_group,
        "ForwardBatch",
        "first += part.num_new_tokens",
        "pass",
    ),
    "feed everybody the first token": (batch, request_group, "ForwardBatch", "logit_row, 1))", "0, 1))"),
    "draw from the same place twice": (
        request_group,
        engine,
        "launch",
        "child.sampler.row(position)",
        "child.sampler.row()",
    ),
}


def must_be_found(machine: type[RuleBasedStateMachine]) -> None:
    # RuntimeError: the device's failure, in somebody it does not concern.
    with pytest.raises((AssertionError, IndexError, ValueError, KeyError, RuntimeError)):
        run_state_machine_as_test(machine, settings=SEARCH)


@pytest.mark.parametrize("bug", KV_CACHE_BUGS)
def test_kv_cache_machine_finds(bug: str) -> None:
    module, old, new = KV_CACHE_BUGS[bug]
    broken = mutant(module, old, new)
    if module is radix_tree:
        broken = copy_with(kv_cache, RadixTree=broken.RadixTree)
    elif module is page_pool:
        broken = copy_with(kv_cache, PagePool=broken.PagePool)
    must_be_found(type("Machine", (KVCacheMachine,), {"cache_class": broken.KVCache}))


@pytest.mark.parametrize("bug", RADIX_TREE_BUGS)
def test_radix_tree_machine_finds(bug: str) -> None:
    must_be_found(type("Machine", (RadixTreeMachine,), {"tree_class": mutant(*RADIX_TREE_BUGS[bug]).RadixTree}))


@pytest.mark.parametrize("bug", SCHEDULER_BUGS)
def test_scheduler_machine_finds(bug: str) -> None:
    must_be_found(type("Machine", (SchedulerMachine,), {"scheduler_class": mutant(*SCHEDULER_BUGS[bug]).Scheduler}))


@pytest.mark.parametrize("bug", FLIGHT_BUGS)
def test_engine_machine_finds(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_group, "Flight", mutant(flight, *FLIGHT_BUGS[bug]).Flight)
    must_be_found(EngineMachine)


@pytest.mark.parametrize("bug", AHEAD_BUGS)
def test_engine_machine_finds_in_steps_planned_ahead(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, user, name, old, new = AHEAD_BUGS[bug]
    monkeypatch.setattr(user, name, getattr(mutant(module, old, new), name))
    must_be_found(EngineMachine)


def test_the_machines_accept_an_unchanged_copy() -> None:
    """So what the tests above see fail is the bug, not the copying."""
    cache_class = copy_with(kv_cache).KVCache
    run_state_machine_as_test(type("Machine", (KVCacheMachine,), {"cache_class": cache_class}), settings=QUICK)
    scheduler_class = copy_with(scheduler).Scheduler
    run_state_machine_as_test(
        type("Machine", (SchedulerMachine,), {"scheduler_class": scheduler_class}), settings=QUICK
    )


def test_a_bug_whose_place_is_gone_is_an_error() -> None:
    with pytest.raises(AssertionError, match="occurs 0 times"):
        mutant(page_pool, "no such text", "")
