"""Who takes part in the next step, and with how many tokens.

It knows requests, counts and the KV cache's verbs; it knows no arrays, devices, text or stop strings.
Invariant: every running request arrived before every waiting one. So `running` is in order of arrival, the youngest is
its last element, and a preempted request goes to the front of `waiting` without a search.

One step is `schedule`, a forward pass by the caller, `record`. Only `record` counts tokens as computed, so a step that
failed in between can be scheduled again, or its requests finished. One further step may be planned between the two.

Why every request ends: the oldest running one is served first, and preempting everything younger leaves it the whole
cache, where `max_request_len` guarantees that it fits.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from mili.cache import KVCache, PageLease, SharedPage
from mili.outputs import FinishReason
from mili.request import InFlight, Request, RequestStatus, ScheduledRequest

_NOTHING: Mapping[Request, InFlight] = MappingProxyType({})


class Scheduler:
    """Continuous batching with chunked prefill, optimistic admission and preemption.

    Running requests come first, then waiting ones in order of arrival. The mix of prefill and decode under one token
    budget follows Sarathi-Serve (Agrawal et al. 2024); preemption by recomputation, vLLM.
    """

    def __init__(
        self, cache: KVCache, max_num_seqs: int, max_num_batched_tokens: int, max_logit_rows: int = 256
    ) -> None:
        """Args:
        cache: Holds the pages of the running requests; this scheduler is its only user.
        max_num_seqs: Most requests running at once.
        max_num_batched_tokens: Most tokens in one step.
        max_logit_rows: Most prompt tokens in one step, all requests together, that are computed for
            `prompt_logprobs`: each needs a row of logits as wide as the vocabulary.
        """
        assert max_num_seqs > 0 and max_num_batched_tokens > 0 and max_logit_rows > 0
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_logit_rows = max_logit_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # prompt tokens that were looked up in the prefix cache, over all requests
        self.num_cached_tokens = 0  # of those, found
        self._num_arrivals = 0

    @property
    def max_request_len(self) -> int:
        """Most tokens one request can ever hold: a full cache, and one sampled token that needs no place in it."""
        return self.cache.num_usable_pages * self.cache.page_size + 1

    @property
    def has_unfinished(self) -> bool:
        """Whether another step has something to do."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queues a new request, whose `max_len` must not exceed `max_request_len`."""
        assert request.status is RequestStatus.WAITING and request.arrival < 0, "a request is added once"
        assert request.max_len <= self.max_request_len, f"{request.max_len} tokens can never fit"
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.append(request)

    def schedule(self, in_flight: Mapping[Request, InFlight] = _NOTHING) -> list[ScheduledRequest]:
        """Plans a step: takes the pages it needs, admits and preempts. Empty only if there are no requests.

        Nothing counts as computed before `record`.

        Args:
            in_flight: The step submitted last, if it is not recorded. The plan is for the step behind it: what is in
                flight counts as computed, with one token more for who samples there. Nobody is preempted then, and the
                plan is also empty if it depends on what `record` will do with pages: schedule again after that.
        """
        plan: list[ScheduledRequest] = []
        budget, logit_rows = self.max_num_batched_tokens, self.max_logit_rows
        upcoming: set[SharedPage | None] = set()  # pages that this step's prefills are about to compute and share
        flying: set[SharedPage | None] = set()  # the same of the step in flight
        cache = self.cache
        num_running, num_ending = len(self.running), 0
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            index += 1
            lease, num_computed, num_known = request.lease, request.num_computed, len(request.token_ids)
            assert lease is not None
            if in_flight and (part := in_flight.get(request)) is not None:
                if num_computed < len(request.prompt_token_ids):
                    if cache.would_swap(lease, request.token_ids[: num_computed + part.num_new_tokens]):
                        return []  # this step would read other pages than one planned later: see `Flight`
                    flying.add(cache.next_shared_page(lease, request.token_ids))
                num_computed += part.num_new_tokens
                num_known += part.logit_row >= 0
                if num_known >= request.max_len:
                    num_ending += 1
                    continue
            num_new = num_known - num_computed
            if num_new > 1:
                num_new = min(num_new, budget)
                if request.num_prompt_unscored:
                    num_new = min(num_new, logit_rows)
                    logit_rows -= num_new
                upcoming.add(cache.next_shared_page(lease, request.token_ids))
            num_tokens = num_computed + num_new
            # Compared here first because that settles all but one in page_size decodes without a call.
            if num_tokens > lease.num_pages * cache.page_size:
                if in_flight and not cache.grow(lease, num_tokens):
                    return []
                if not self._make_room(request, lease, num_tokens):
                    break
            if num_new:
                plan.append(ScheduledRequest(request, num_new))
                budget -= num_new
        if len(self.running) == num_running:  # after a preemption nobody is admitted: the pages are needed here
            num_places = self.max_num_seqs - (num_running - num_ending)
            if not self._admit(plan, num_places, budget, logit_rows, upcoming, flying):
                return []
        assert plan or in_flight or not self.has_unfinished, "requests wait but none can run"
        return plan

    def record(self, plan: Sequence[ScheduledRequest], sampled: Iterable[int]) -> list[Request]:
        """Takes in the results of the step that ran `plan`, before any other verb of this scheduler is called.

        Counts the tokens as computed, shares full prompt pages, appends the sampled tokens and finishes requests on
        EOS, a stop token id (neither before `min_tokens`) or length.

        Args:
            plan: What `schedule` returned.
            sampled: One token id for each request of `plan` that has all its tokens computed by this step, in plan
                order. The others are in mid-prompt and have nothing to sample from.

        Returns:
            The requests that got a token, in the order of `sampled`.
        """
        tokens = iter(sampled)
        received: list[Request] = []
        some_ended = False
        for request, num_new in plan:
            token_ids = request.token_ids
            first = request.num_computed
            request.num_computed = num_computed = first + num_new
            num_prompt = len(request.prompt_token_ids)
            if first < num_prompt:
                assert request.lease is not None
                self.cache.commit(request.lease, token_ids[:num_computed])
                request.num_prompt_scored = max(request.num_prompt_scored, min(num_computed, num_prompt - 1))
            if num_computed < len(token_ids):
                continue
            token = next(tokens)
            token_ids.append(token)
            received.append(request)
            if token in request.stop_ids and len(token_ids) - num_prompt >= request.params.min_tokens:
                is_eos = token in request.eos_token_ids and not request.params.ignore_eos
                self._end(request, FinishReason.STOP, None if is_eos else token)
                some_ended = True
            elif len(token_ids) >= request.max_len:
                self._end(request, FinishReason.LENGTH, None)
                some_ended = True
        assert next(tokens, None) is None, "more tokens sampled than the plan asked for"
        if some_ended:
            self.running = [request for request in self.running if not request.finished]
        return received

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends an unfinished request for a reason that the caller found, such as a stop string."""
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        self._end(request, reason, stop_reason)

    def abort(self, request: Request) -> None:
        """Ends a request with `FinishReason.ABORT`; does nothing if it has finished."""
        if not request.finished:
            self.finish(request, FinishReason.ABORT)

    def _admit(
        self,
        plan: list[ScheduledRequest],
        num_places: int,
        budget: int,
        logit_rows: int,
        upcoming: set[SharedPage | None],
        flying: set[SharedPage | None],
    ) -> bool:
        """Moves requests from the front of `waiting` to `running` and to `plan` while there is room for them.

        False if the next one had better wait until the step in flight is recorded, for a page of its prompt.

        Admission is optimistic: a request needs pages for the tokens it has now, not for all it may generate. Each
        running request has one page left to grow by, so that an admission is not undone by the next few steps.
        """
        cache = self.cache
        while self.waiting and budget and num_places > 0:
            request = self.waiting[0]
            token_ids = request.token_ids
            num_unscored = request.num_prompt_unscored
            if num_unscored and not logit_rows:
                return True
            # A position that must be scored must be computed, so the match has to end before it.
            lease = cache.acquire(token_ids[: request.num_prompt_scored + 1] if num_unscored else token_ids)
            shared_page = cache.next_shared_page(lease, token_ids)
            # A page that this step computes anyway can be shared in the next: n completions of a prompt prefill once.
            is_sharing = shared_page is not None and not num_unscored
            is_upcoming = is_sharing and (shared_page in upcoming or shared_page in flying)
            if is_upcoming or not cache.grow(lease, len(token_ids), headroom=len(self.running)):
                cache.release(lease, ())
                return not (is_sharing and shared_page in flying)
            self.waiting.popleft()
            num_places -= 1
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            request.lease = lease
            request.num_computed = lease.num_shared * cache.page_size
            if request.num_preemptions == 0:
                request.num_cached = request.num_computed
                self.num_queried_tokens += request.num_prompt_tokens
                self.num_cached_tokens += request.num_cached
            num_new = min(len(token_ids) - request.num_computed, budget)
            if num_unscored:
                num_new = min(num_new, logit_rows)
                logit_rows -= num_new
            upcoming.add(shared_page)
            plan.append(ScheduledRequest(request, num_new))
            budget -= num_new
        return True

    def _make_room(self, request: Request, lease: PageLease, num_tokens: int) -> bool:
        """Grows `lease`, preempting from the youngest on; False if `request` itself had to go."""
        while not self.cache.grow(lease, num_tokens):
            victim = self.running.pop()
            self._release(victim)
            victim.status = RequestStatus.WAITING
            victim.num_computed = 0
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Marks a request as finished and gives up its pages; the caller takes it out of its queue."""
        if request.lease is not None:
            self._release(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def _release(self, request: Request) -> None:
        """Ends the lease; what was computed stays in the prefix cache until its pages are needed."""
        assert request.lease is not None
        self.cache.release(request.lease, request.token_ids[: request.num_computed])
        request.lease = None
