"""Which shared prefixes a step reads once: a cost model over the forest, and the choice that it makes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec

from .forest import PrefixForest, PrefixGroup
from .requests import SharedLevel


@dataclass(frozen=True)
class SharingRates:
    """How fast a device attends, as far as sharing a prefix changes it; ``benchmarks/fit_sharing.py`` measures them.

    Bytes a nanosecond (GB/s) of keys and values: ``read_rate`` from memory; ``attend_rate`` of all that requests attend
    to, wherever it comes from (what others of the batch read too comes from the L2 in part); ``own_rate`` of what requests
    read for themselves in a batch that shares something. ``product_rate``: FLOPs a nanosecond of tiles with many query rows.
    ``merge_rate``: bytes a nanosecond of partial results. Nanoseconds: ``node_ns`` for each shared prefix, ``batch_ns`` once, for
    a batch that has any. ``reuse_bytes``: of prefixes of so many bytes in all, requests find in the L2 what others have read.
    """

    read_rate: float
    attend_rate: float
    own_rate: float
    product_rate: float
    merge_rate: float
    node_ns: float
    batch_ns: float
    reuse_bytes: float

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, (int, float)) or value < 0 or (item.name.endswith("rate") and value == 0):
                raise ArgumentError(f"rates.{item.name}", "a positive number", repr(value))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_file(cls, path: Path) -> SharingRates:
        """Rates that ``to_json`` wrote; raises ArgumentError naming what is missing or unknown."""
        values = json.loads(path.read_text())
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ArgumentError(f"rates in {path}", f"numbers for {sorted(names)}", sorted(values))
        return cls(**values)


_DEEPEST = 32
"""Groups within groups that the choice looks at: it is recursive, and what lies deeper belongs to few requests."""

ALWAYS = SharingRates(1.0, 1.0, 1.0, 1e9, 1e9, 0.0, 0.0, 1e15)
"""Rates under which every shared page is worth a level: for tests."""


@dataclass(frozen=True)
class SharingCosts:
    """The rates of a device in the units of one model's attention: nanoseconds of a call of one layer.

    Without levels a batch takes the longer of two times: memory's for the tokens that are stored (and, where those that requests
    share are more than ``reuse_tokens``, for some that are read again), and the multiprocessors' for all that are attended to.
    With levels its parts add up: the shared prefixes, each request's own tokens, partial results.
    """

    token_ns: float
    attend_ns: float
    own_ns: float
    pair_ns: float
    row_ns: float
    node_ns: float
    batch_ns: float
    reuse_tokens: float

    @classmethod
    def of(cls, spec: AttentionSpec, rates: SharingRates) -> SharingCosts:
        """A KV token of all heads read from memory, attended to, and attended to as a request's own; the products of a query
        token with a key; and a query token's partial result, written, read and merged in float32."""
        dims = spec.head_dim + (spec.head_dim_vo or 0)
        token_bytes = spec.num_kv_heads * dims * spec.kv_dtype.itemsize
        partial_bytes = 2 * 4 * spec.num_qo_heads * ((spec.head_dim_vo or 0) + 1)
        return cls(
            token_ns=token_bytes / rates.read_rate,
            attend_ns=token_bytes / rates.attend_rate,
            own_ns=token_bytes / rates.own_rate,
            pair_ns=2 * dims * spec.num_qo_heads / rates.product_rate,
            row_ns=partial_bytes / rates.merge_rate,
            node_ns=rates.node_ns,
            batch_ns=rates.batch_ns,
            reuse_tokens=rates.reuse_bytes / token_bytes,
        )

    def each(self, q_lens: Sequence[int], num_tokens: int) -> float:
        """Time of ``num_tokens`` keys that each member of a batch with levels reads for itself."""
        return num_tokens * sum(max(self.own_ns, q_len * self.pair_ns) for q_len in q_lens)

    def once(self, q_lens: Sequence[int], num_tokens: int) -> float:
        """Time of the same keys read once for all members."""
        rows = sum(q_lens)
        return num_tokens * max(self.token_ns, rows * self.pair_ns) + rows * self.row_ns + self.node_ns

    def without_levels(self, q_lens: Sequence[int], kv_lens: Sequence[int], num_shared: int, num_again: int) -> float:
        """Time of a batch whose requests each read for themselves; ``num_shared``: tokens that several requests have in common,
        ``num_again``: how many times more than once they are read, in all."""
        pairs = zip(q_lens, kv_lens, strict=True)
        attended = sum(kv_len * max(self.attend_ns, q_len * self.pair_ns) for q_len, kv_len in pairs)
        found = num_again if num_shared <= self.reuse_tokens else num_again * self.reuse_tokens / num_shared
        return max((sum(kv_lens) - found) * self.token_ns, attended)

    def with_levels(self, q_lens: Sequence[int], kv_lens: Sequence[int], saved: float) -> float:
        """Time of a batch with levels that save ``saved`` against each request reading everything for itself."""
        pairs = zip(q_lens, kv_lens, strict=True)
        own = sum(kv_len * max(self.own_ns, q_len * self.pair_ns) for q_len, kv_len in pairs)
        return self.batch_ns + own - saved


@dataclass(frozen=True)
class Verdict:
    """What the model says of one group's next shared tokens: ``level``, nanoseconds if ``each`` member reads them and if they are
    read ``once``, and whether the best choice of levels does so."""

    level: SharedLevel
    each: float
    once: float
    taken: bool

    def __str__(self) -> str:
        level = self.level
        members = level.member_end - level.member_begin
        what = f"{members} requests share tokens {level.kv_begin} to {level.kv_end}"
        times = f"{self.once / 1e3:.1f} us once, {self.each / 1e3:.1f} us each for itself"
        return f"{what}: {times}{' -> once' if self.taken else ''}"


@dataclass(frozen=True)
class Sharing:
    """The choice for a step: ``order`` of its requests and ``levels`` over it (parents first; none if the best ones do not
    pay). Nanoseconds a layer when it was made: ``without`` levels and with the best ones (``best``, whose ``verdicts`` these
    are)."""

    order: tuple[str, ...]
    levels: tuple[SharedLevel, ...]
    without: float
    best: float
    verdicts: tuple[Verdict, ...]

    def explain(self) -> list[str]:
        """Lines for a person."""
        times = f"{self.best / 1e3:.1f} us a layer with the best choice of them, {self.without / 1e3:.1f} us without"
        return [f"{len(self.levels)} shared prefixes are read once: {times}", *(f"  {item}" for item in self.verdicts)]


class Sharer:
    """Follows the requests of the steps and chooses which of their shared prefixes are read once.

    ``arrange`` is called with each step's requests. What did not change since the last step costs a look-up a request; the best
    levels are found anew when the forest or the numbers of new tokens differ, and whether they pay is asked at every step,
    for requests grow.
    """

    def __init__(self, costs: SharingCosts, page_size: int, max_depth: int = 4) -> None:
        """``max_depth``: most shared prefixes around one request (Capacity.max_prefix_depth)."""
        self.forest = PrefixForest()
        self._costs = costs
        self._page_size = page_size
        self._max_depth = max_depth
        self._order: tuple[str, ...] = ()
        self._q_lens: tuple[int, ...] = ()
        self._version = -1
        self._verdicts: tuple[Verdict, ...] = ()
        self._saved = 0.0
        self._num_shared = self._num_again = 0
        self._found: Sharing | None = None

    def arrange(
        self, pages: Mapping[str, Sequence[int] | None], q_lens: Mapping[str, int], kv_lens: Mapping[str, int]
    ) -> Sharing:
        """The sharing of a step. ``q_lens``: new tokens of each of its requests, ``kv_lens``: all of its tokens; ``pages``: the
        whole pages before its new tokens, or None where they are as at the last call."""
        forest = self.forest
        for request_id in forest.request_ids - pages.keys():
            forest.remove(request_id)
        for request_id, held in pages.items():
            if held is not None:
                forest.put(request_id, held)
            elif request_id not in forest:
                raise ArgumentError("pages", f"those of {request_id!r}, which the last step had not", None)
        changed = forest.version != self._version
        if changed:
            self._order = tuple(forest.order())
        lens = tuple(q_lens[request_id] for request_id in self._order)
        if changed or lens != self._q_lens:
            self._version, self._q_lens, self._found = forest.version, lens, None
            self._choose()
        return self._judged([kv_lens[request_id] for request_id in self._order])

    def _choose(self) -> None:
        """Find the best levels."""
        choice = _Choice(self._costs, self._page_size, self._q_lens)
        root, spans = self.forest.root, dict(_spans(self.forest.root))
        self._saved = choice.best(root, 0, 0, self._max_depth, spans)
        self._verdicts = tuple(choice.walk(root, 0, 0, self._max_depth, spans))
        self._num_shared = self._page_size * sum(len(group.pages) for group in spans)
        self._num_again = self._page_size * sum((group.size - 1) * len(group.pages) for group in spans)

    def _judged(self, kv_lens: Sequence[int]) -> Sharing:
        """Whether the best levels pay for requests of these lengths."""
        costs, lens, found = self._costs, self._q_lens, self._found
        levels = tuple(verdict.level for verdict in self._verdicts if verdict.taken)
        if not levels and found is not None:
            return found
        without = costs.without_levels(lens, kv_lens, self._num_shared, self._num_again)
        best = costs.with_levels(lens, kv_lens, self._saved) if levels else without
        levels = levels if best < without else ()
        if found is None or found.levels != levels:
            found = self._found = Sharing(self._order, levels, without, best, self._verdicts)
        return found


def _spans(root: PrefixGroup) -> Iterator[tuple[PrefixGroup, int]]:
    """(group, where its requests begin in the order) of the groups that are looked at: two requests or more, and not too deep."""
    stack = [(root, 0, 0)]
    while stack:
        group, begin, depth = stack.pop()
        yield group, begin
        begin += len(group.here)
        for child in group.groups.values():
            if child.size > 1 and depth < _DEEPEST:
                stack.append((child, begin, depth + 1))
            begin += child.size


class _Choice:
    """The most that can be saved below each group, given where what is read once ends so far: an exact choice, by trying both
    for every group with the rest of the tree at its best."""

    def __init__(self, costs: SharingCosts, page_size: int, q_lens: tuple[int, ...]) -> None:
        self._costs = costs
        self._page_size = page_size
        self._q_lens = q_lens
        self._known: dict[tuple[int, int, int], tuple[float, bool]] = {}

    def best(self, group: PrefixGroup, begin: int, covered: int, depth: int, spans: Mapping[PrefixGroup, int]) -> float:
        """Nanoseconds saved in ``group``, whose requests begin at ``begin``, when pages up to ``covered`` are read once and
        ``depth`` more levels may be."""
        key = begin, group.end, covered << 8 | depth
        known = self._known.get(key)
        if known is None:
            skipped = self._below(group, covered, depth, spans)
            taken = float("-inf")
            if group.end > covered and depth > 0:
                verdict = self._verdict(group, begin, covered, False)
                taken = verdict.each - verdict.once + self._below(group, group.end, depth - 1, spans)
            known = self._known[key] = max(skipped, taken), taken > skipped
        return known[0]

    def _below(self, group: PrefixGroup, covered: int, depth: int, spans: Mapping[PrefixGroup, int]) -> float:
        children = (child for child in group.groups.values() if child in spans)
        return sum(self.best(child, spans[child], covered, depth, spans) for child in children)

    def walk(
        self, group: PrefixGroup, begin: int, covered: int, depth: int, spans: Mapping[PrefixGroup, int]
    ) -> Iterator[Verdict]:
        """The verdicts of ``best``'s choice, parents first."""
        taken = self._known[begin, group.end, covered << 8 | depth][1]
        if group.end > covered:
            yield self._verdict(group, begin, covered, taken)
        if taken:
            covered, depth = group.end, depth - 1
        for child in group.groups.values():
            if child in spans:
                yield from self.walk(child, spans[child], covered, depth, spans)

    def _verdict(self, group: PrefixGroup, begin: int, covered: int, taken: bool) -> Verdict:
        end = begin + group.size
        level = SharedLevel(begin, end, covered * self._page_size, group.end * self._page_size)
        q_lens, num_tokens = self._q_lens[begin:end], level.kv_end - level.kv_begin
        return Verdict(level, self._costs.each(q_lens, num_tokens), self._costs.once(q_lens, num_tokens), taken)
