"""Records of the step planner: configuration, requests, step plans and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fi_core.errors import ArgumentError, FiError

from .prefix import PrefixNode

if TYPE_CHECKING:
    from .sharing import SharingCosts


class StepOrderError(FiError):
    """``plan``, ``commit`` and ``fork`` were called out of turn."""


@dataclass(frozen=True)
class PlannerConfig:
    """Limits and policies of a StepPlanner.

    ``max_tokens_per_step``: most new tokens of one step, over all requests. ``max_batch``: most requests that hold
    pages at once. ``prefill_chunk``: most new tokens of one request in a step. ``policy`` and ``prefix_cache`` are
    names that the hooks fi_scheduling_policy and fi_prefix_cache answer to, each with its settings.
    ``wait_for_shared_prefix``: a request whose next page is being computed for another one this step waits a step and
    shares it. ``sharing``: what attention costs, by which steps name the prefixes that are read once for several requests
    (None: they name none); at most ``max_prefix_depth`` of them around one request.
    """

    max_tokens_per_step: int = 2048
    max_batch: int = 64
    prefill_chunk: int = 512
    policy: str = "priority"
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    prefix_cache: str = "radix"
    prefix_cache_config: Mapping[str, Any] = field(default_factory=dict)
    wait_for_shared_prefix: bool = True
    sharing: SharingCosts | None = None
    max_prefix_depth: int = 4

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_step", "max_batch", "prefill_chunk", "max_prefix_depth"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"config.{name}", "a positive int", value)
        # Every request that decodes then gets its token in every step, and a prefill at least one more.
        if self.max_batch > self.max_tokens_per_step:
            raise ArgumentError(
                "config.max_batch", f"<= max_tokens_per_step={self.max_tokens_per_step}", self.max_batch
            )


@dataclass(eq=False)
class Request:
    """One request inside the planner. ``tokens`` are the prompt and what was generated since.

    ``held``: samples of the same prompt that wait for its end and branch off there; ``held_by``: the request that this one
    waits for so. ``has_moved``: its whole pages are not those that the last step saw.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    max_new_tokens: int
    priority: int
    arrival: int
    stop_tokens: frozenset[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    node: PrefixNode | None = None
    is_aborted: bool = False
    held: list[Request] = field(default_factory=list)
    held_by: Request | None = None
    has_moved: bool = True
    table: tuple[int, ...] = ()

    def first_pages(self, num_pages: int) -> tuple[int, ...]:
        """The first ``num_pages`` pages: the same object from step to step while they stay the same. Whoever changes one sets
        ``table`` to ()."""
        if len(self.table) != num_pages:
            self.table = tuple(self.pages[:num_pages])
        return self.table

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Tokens whose keys and values are not in the pages yet."""
        return len(self.tokens) - self.num_computed

    @property
    def max_kv_tokens(self) -> int:
        """Tokens in the pages when the last one is sampled (which needs no keys and values itself)."""
        return self.prompt_len + self.max_new_tokens - 1


@dataclass(frozen=True)
class StepEntry:
    """What one request does in a step: run ``tokens`` at positions start, start + 1, ...

    ``pages`` hold positions 0 .. start + num_new_tokens - 1 in order; page ids of a request may change between steps.
    ``samples``: the last token's logits give a new token, which ``commit`` expects.
    """

    request_id: str
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens)


class SharedLevel(NamedTuple):
    """Keys and values at positions [kv_begin, kv_end) that the entries [member_begin, member_end) of a step have in common: a
    row of ``fi_core.SharedPrefixes.nodes``."""

    member_begin: int
    member_end: int
    kv_begin: int
    kv_end: int


@dataclass(frozen=True)
class StepPlan:
    """One step. ``copies`` are (source page, destination page), to be done in this order before the step writes. ``levels``
    are the prefixes worth reading once, parents first; the members of each are neighbours in ``entries``."""

    step_idx: int
    entries: tuple[StepEntry, ...]
    copies: tuple[tuple[int, int], ...]
    levels: tuple[SharedLevel, ...] = ()

    def copy_rounds(self) -> list[list[tuple[int, int]]]:
        """``copies`` in rounds that follow each other; the copies of a round may be done in any order, or at once.

        There is more than one round only when a preemption freed a page that was just copied from or to.
        """
        rounds: list[list[tuple[int, int]]] = []
        used: set[int] = set()
        written: set[int] = set()
        for source, destination in self.copies:
            if not rounds or destination in used or source in written:
                rounds.append([])
                used, written = set(), set()
            rounds[-1].append((source, destination))
            used |= {source, destination}
            written.add(destination)
        return rounds


@dataclass(frozen=True)
class StepStats:
    """Counts of one step. ``num_cached_tokens``: prompt tokens that admitted requests found in the prefix cache."""

    num_running: int
    num_waiting: int
    num_tokens: int
    num_free_pages: int
    num_admitted: int
    num_preempted: int
    num_cached_tokens: int


@dataclass(frozen=True)
class Finished:
    """A request that ended: "length" (max_new_tokens), "stop" (a stop token, which is the last of ``tokens``)."""

    request_id: str
    reason: Literal["length", "stop"]
    tokens: tuple[int, ...]
