"""Continuous batching: which tokens of which requests run in the next step, and on which pages.

Iteration-level scheduling (Yu et al., Orca, OSDI 2022) with chunked prefill (Agrawal et al., Sarathi-Serve, OSDI 2024),
paged memory and preemption by recompute (Kwon et al., vLLM, SOSP 2023).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pluggy
from fi_core.errors import ArgumentError, CapacityError

from .held_pages import HeldPages
from .hookspecs import plugin_manager
from .pages import PagePool
from .policy import SchedulingPolicy
from .prefix import PrefixCache
from .requests import Finished, PlannerConfig, Request, StepEntry, StepOrderError, StepPlan, StepStats
from .sharing import Sharer, Sharing


@dataclass
class _Draft:
    """A step while it is being planned."""

    budget: int
    entries: dict[str, StepEntry] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_preempted: int = 0
    admitted: set[str] = field(default_factory=set)
    # (prefix node, next whole page of tokens) of every request that fills pages in this step
    filling: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    num_cached_tokens: int = 0


class StepPlanner:
    """Plans steps over one page pool: ``submit`` requests, alternate ``plan`` and ``commit`` until ``plan`` is None.

    Decoding requests come first in a step, then prefills, each in the policy's order; then waiting requests are
    admitted in that order. A request is admitted once there are pages for all its known tokens. When pages run out, the
    prefix cache gives up what nobody uses, and then the running request that the policy orders last is preempted: its
    pages are freed and it waits to be recomputed. A waiting request preempts only running ones ordered after it. The
    request ordered first therefore always advances, and none is lost. Not thread-safe.
    """

    def __init__(self, pool: PagePool, config: PlannerConfig, hooks: pluggy.PluginManager | None = None) -> None:
        """``hooks``: a manager with ``add_scheduler_hooks`` applied; None: the built-in policies and caches alone."""
        self._pool = pool
        self._config = config
        self._hooks = plugin_manager() if hooks is None else hooks
        policy = self._hooks.hook.fi_scheduling_policy(name=config.policy, config=config.policy_config)
        if policy is None:
            raise ArgumentError("config.policy", "a name that a plugin answers to", repr(config.policy))
        cache_config = {**config.prefix_cache_config, "pool": pool}
        cache = self._hooks.hook.fi_prefix_cache(name=config.prefix_cache, config=cache_config)
        if cache is None:
            raise ArgumentError("config.prefix_cache", "a name that a plugin answers to", repr(config.prefix_cache))
        self._policy: SchedulingPolicy = policy
        self._cache: PrefixCache = cache
        self._held = HeldPages(pool, cache)
        self._sharer = (
            None if config.sharing is None else Sharer(config.sharing, pool.page_size, config.max_prefix_depth)
        )
        self.sharing: Sharing | None = None
        """What the last plan chose of shared prefixes, and why (None: PlannerConfig.sharing is None)."""
        self._requests: dict[str, Request] = {}
        # _requests in two parts, so that a step does not cost more the longer the queue is: those that were admitted, and
        # the others in the policy's order.
        self._running: dict[str, Request] = {}
        self._waiting: list[Request] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._in_flight: StepPlan | None = None

    @property
    def in_flight(self) -> StepPlan | None:
        """The plan that waits for its commit."""
        return self._in_flight

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that are neither finished nor aborted, by arrival."""
        return tuple(request.request_id for request in self._requests.values() if not request.is_aborted)

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_new_tokens: int,
        priority: int = 0,
        stop_tokens: Collection[int] = (),
        samples: Sequence[str] = (),
    ) -> None:
        """Add a request; raises CapacityError naming it when the whole pool could not hold it. ``samples``: ids of further
        requests for the same prompt, which is computed once: they branch off where it ends, sharing its pages until they
        write to them. Should the first end before, the next takes its place."""
        if len(prompt) == 0:
            raise ArgumentError(f"request {request_id!r}: prompt", "at least one token", "none")
        for name, value, lowest in (("max_new_tokens", max_new_tokens, 1), ("priority", priority, None)):
            if not isinstance(value, int) or (lowest is not None and value < lowest):
                expected = "an int" if lowest is None else "a positive int"
                raise ArgumentError(f"request {request_id!r}: {name}", expected, value)
        new = [
            Request(name, list(prompt), len(prompt), max_new_tokens, priority, arrival, frozenset(stop_tokens))
            for arrival, name in enumerate((request_id, *samples), self._num_arrivals)
        ]
        request = new[0]
        needed = self._pool.pages_for(request.max_kv_tokens)
        if needed > self._pool.num_pages:
            tokens = f"{len(prompt)} prompt + {max_new_tokens} new tokens"
            limit = f"at most {self._pool.num_pages} pages of {self._pool.page_size} tokens (the whole pool)"
            raise CapacityError(f"request {request_id!r}", limit, f"{needed} pages ({tokens})")
        self._add(new)
        self._hold(new)

    def fork(self, request_id: str, new_request_id: str, last_token: int | None = None) -> None:
        """Add a request that goes on from where ``request_id`` stands, sharing its pages until one of them writes.

        Between steps only. The fork inherits everything but its arrival, and its last token if ``last_token`` is given (one
        must have been generated, which no step has run yet); where no place in the batch is left it waits.
        """
        if self._in_flight is not None:
            raise StepOrderError("fork() while a step is in flight: commit it first")
        parent = self._find(request_id)
        if last_token is not None and (parent.num_generated == 0 or parent.num_computed == len(parent.tokens)):
            raise ArgumentError("last_token", "None before a token was generated", last_token)
        tokens = list(parent.tokens) if last_token is None else [*parent.tokens[:-1], last_token]
        child = Request(
            new_request_id, tokens, parent.prompt_len, parent.max_new_tokens, parent.priority,
            self._num_arrivals, parent.stop_tokens,
        )  # fmt: skip
        self._add([child])
        if parent.request_id in self._running:
            self._branch(parent, child, parent.num_computed)
        else:
            insort(self._waiting, child, key=self._policy.key)

    def abort(self, request_id: str) -> None:
        """End a request now; if it takes part in the step in flight, its pages are freed by that step's ``commit``,
        which does not remember what the step was to compute of it: the step may have failed."""
        request = self._find(request_id)
        request.is_aborted = True
        if self._in_flight is None or all(entry.request_id != request_id for entry in self._in_flight.entries):
            self._remove(request)

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is no request. ``fi_on_batch`` is called with it; if that raises, the plan
        is ``in_flight`` all the same. Raises StepOrderError when the last plan was not committed."""
        if self._in_flight is not None:
            raise StepOrderError(f"plan() before commit() of step {self._in_flight.step_idx}")
        if not self._requests:
            return None
        draft = _Draft(self._config.max_tokens_per_step)
        for request in sorted(self._running.values(), key=lambda r: (r.num_remaining > 1, self._policy.key(r))):
            if request.request_id in self._running:
                self._schedule(request, draft)
        self._admit_waiting(draft)
        assert draft.entries, "the request ordered first can always run"
        plan = self._arranged(draft)
        self._num_steps += 1
        self._in_flight = plan
        stats = StepStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            num_tokens=self._config.max_tokens_per_step - draft.budget,
            num_free_pages=self._pool.num_free,
            num_admitted=len(draft.admitted),
            num_preempted=draft.num_preempted,
            num_cached_tokens=draft.num_cached_tokens,
        )
        self._hooks.hook.fi_on_batch(plan=plan, stats=stats)
        return plan

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Finished]:
        """Record that ``plan`` ran: ``sampled`` has the token of each entry with ``samples`` (aborted ones may lack).

        Returns the requests that finished, in entry order; their pages are free or in the prefix cache.
        """
        if plan is not self._in_flight:
            raise StepOrderError(f"commit() of step {plan.step_idx}, which is not in flight")
        wanted = {entry.request_id for entry in plan.entries if entry.samples}
        needed = {request_id for request_id in wanted if not self._requests[request_id].is_aborted}
        if not needed <= set(sampled) <= wanted:
            raise ArgumentError("sampled", f"a token of each of {sorted(needed)}", f"tokens of {sorted(sampled)}")
        self._in_flight = None
        finished = []
        for entry in plan.entries:
            request = self._requests[entry.request_id]
            if request.is_aborted:
                self._remove(request)
                continue
            request.num_computed += entry.num_new_tokens
            if entry.samples:
                self._branch_samples(request)
                request.tokens.append(sampled[entry.request_id])
            reason = self._finish_reason(request) if entry.samples else None
            if reason is not None:
                self._remove(request)
                generated = tuple(request.tokens[request.prompt_len :])
                finished.append(Finished(request.request_id, reason, generated))
            elif entry.start < request.prompt_len:
                self._held.remember(request)
        return finished

    def drop(self, plan: StepPlan) -> None:
        """End every request of ``plan``, which could not be run or not to its end; called instead of ``commit``. What it was
        to compute is not remembered."""
        if plan is not self._in_flight:
            raise StepOrderError(f"drop() of step {plan.step_idx}, which is not in flight")
        for entry in plan.entries:
            self._requests[entry.request_id].is_aborted = True
        self.commit(plan, {})

    def check_integrity(self) -> None:
        """Compare the pool with what requests and cache hold; raises PoolIntegrityError at the first bad page."""
        owners = {f"request {request.request_id!r}": request.pages for request in self._requests.values()}
        self._pool.check_integrity({**owners, "prefix cache": list(self._cache.pages())})

    def _arranged(self, draft: _Draft) -> StepPlan:
        """The plan of a step, its entries ordered so that those who share a prefix are neighbours."""
        entries, sharer = draft.entries, self._sharer
        if sharer is None:
            return StepPlan(self._num_steps, tuple(entries.values()), tuple(draft.copies))
        pages: dict[str, tuple[int, ...] | None] = {}
        for name, entry in entries.items():
            request = self._requests[name]
            known = not request.has_moved and name in sharer.forest
            pages[name] = None if known else entry.pages[: entry.start // self._pool.page_size]
            request.has_moved = False
        q_lens = {name: entry.num_new_tokens for name, entry in entries.items()}
        kv_lens = {name: entry.start + entry.num_new_tokens for name, entry in entries.items()}
        self.sharing = sharer.arrange(pages, q_lens, kv_lens)
        ordered = tuple(entries[name] for name in self.sharing.order)
        return StepPlan(self._num_steps, ordered, tuple(draft.copies), self.sharing.levels)

    def _add(self, requests: Sequence[Request]) -> None:
        """Take in new requests, all or none; the caller says where they wait."""
        for index, request in enumerate(requests):
            name = request.request_id
            if name in self._requests or any(name == other.request_id for other in requests[:index]):
                raise ArgumentError("request_id", "a new id", f"{name!r}, which is in use")
        self._requests.update((request.request_id, request) for request in requests)
        self._num_arrivals += len(requests)

    def _hold(self, samples: list[Request]) -> None:
        """Let the first of some samples of a prompt wait in the queue, and the others for it."""
        first, *others = samples
        first.held, first.held_by = others, None
        for other in others:
            other.held_by = first
        insort(self._waiting, first, key=self._policy.key)

    def _branch_samples(self, request: Request) -> None:
        """A prompt has been computed: the samples that waited for it go on by themselves, from its last token, whose logits each
        draws from."""
        if not request.held:
            return
        self._held.remember(request)
        for sample in request.held:
            sample.held_by = None
            self._branch(request, sample, request.prompt_len - 1)
        request.held = []

    def _branch(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Let a new request share the pages of the first ``num_tokens`` tokens of a running one, or wait if the batch is full."""
        if len(self._running) >= self._config.max_batch:
            insort(self._waiting, child, key=self._policy.key)
            return
        self._held.share(parent, child, num_tokens)
        self._running[child.request_id] = child

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        self._running[request.request_id] = request

    def _find(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None or request.is_aborted:
            raise ArgumentError("request_id", "a request that is waiting or running", repr(request_id))
        return request

    @staticmethod
    def _finish_reason(request: Request) -> Literal["length", "stop"] | None:
        if request.tokens[-1] in request.stop_tokens:
            return "stop"
        return "length" if request.num_generated >= request.max_new_tokens else None

    def _schedule(self, request: Request, draft: _Draft) -> None:
        """Put the next tokens of a running request into the draft, if budget and pages allow."""
        count = min(request.num_remaining, self._config.prefill_chunk, draft.budget)
        if count == 0 or not self._reserve(request, request.num_computed + count, draft):
            return
        start, end = request.num_computed, request.num_computed + count
        pages = request.first_pages(self._pool.pages_for(end))
        tokens = tuple(request.tokens[start:end])
        draft.entries[request.request_id] = StepEntry(
            request.request_id, start, tokens, pages, end == len(request.tokens)
        )
        draft.budget -= count
        if start < request.prompt_len and request.node is not None:
            if start % self._pool.page_size + count >= self._pool.page_size:
                draft.filling.add(self._next_page(request, start))

    def _next_page(self, request: Request, start: int) -> tuple[int, tuple[int, ...]]:
        """Identifies the whole page of tokens that follows what the prefix tree holds of a request."""
        begin = start - start % self._pool.page_size
        return id(request.node), tuple(request.tokens[begin : begin + self._pool.page_size])

    def _reserve(self, request: Request, num_tokens: int, draft: _Draft) -> bool:
        """Give a running request pages for ``num_tokens`` that it may write; False: it was preempted."""
        while True:
            missing = max(0, self._pool.pages_for(num_tokens) - len(request.pages))
            shares = self._held.shares_page_to_write(request)
            if not missing and not shares:
                return True
            if self._held.make_room(missing + shares):
                if shares:
                    draft.copies.append(self._held.make_writable(request))
                request.pages += self._pool.allocate(missing)
                return True
            victim = max(self._running.values(), key=self._policy.key)
            self._preempt(victim, draft)
            if victim is request:
                return False

    def _admit_waiting(self, draft: _Draft) -> None:
        if not self._has_place(draft):
            return
        # A copy: admitting takes requests out, and those it preempts wait for the next step.
        for request in tuple(self._waiting):
            # None overtakes a request that lacks pages: it would wait for ever behind shorter ones.
            if not self._admit(request, draft) or not self._has_place(draft):
                return

    def _has_place(self, draft: _Draft) -> bool:
        """Whether the step can take one more request."""
        return draft.budget > 0 and len(self._running) < self._config.max_batch

    def _admit(self, request: Request, draft: _Draft) -> bool:
        """Take pages for all known tokens of a waiting request and schedule it; False: there are not enough.

        A request that waits for a shared page is left as it is and does not hold up others.
        """
        # The last known token always runs: its logits give the next one.
        match = self._cache.match(request.tokens[:-1])
        request.node = match.node
        num_cached = len(match.pages) * self._pool.page_size
        could_share = num_cached + self._pool.page_size < len(request.tokens) and self._config.wait_for_shared_prefix
        if could_share and self._next_page(request, num_cached) in draft.filling:
            request.node = None
            return True
        self._cache.lock(match.node)
        self._pool.fork(match.pages)
        request.pages = list(match.pages)
        known = min(len(request.tokens) + 1, request.max_kv_tokens)
        missing = self._pool.pages_for(known) - len(request.pages)
        while not self._held.make_room(missing):
            victim = max(self._running.values(), key=self._policy.key, default=None)
            if victim is None or self._policy.key(victim) < self._policy.key(request):
                self._held.release(request)
                return False
            self._preempt(victim, draft)
        request.pages += self._pool.allocate(missing)
        request.num_computed = num_cached
        self._start(request)
        draft.admitted.add(request.request_id)
        draft.num_cached_tokens += num_cached
        self._schedule(request, draft)
        return True

    def _preempt(self, request: Request, draft: _Draft) -> None:
        entry = draft.entries.pop(request.request_id, None)
        if entry is not None:
            draft.budget += entry.num_new_tokens
        draft.num_preempted += 1
        draft.admitted.discard(request.request_id)
        self._held.release(request)
        del self._running[request.request_id]
        insort(self._waiting, request, key=self._policy.key)

    def _remove(self, request: Request) -> None:
        if request.request_id in self._running:
            self._held.release(request)
            del self._running[request.request_id]
        elif request.held_by is not None:
            request.held_by.held.remove(request)
        else:
            self._waiting.remove(request)
        if request.held:
            self._hold(request.held)
        del self._requests[request.request_id]
