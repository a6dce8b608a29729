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

    Bytes a nanosecond (GB/s): ``read_rate`` of keys and values, ``reread_rate`` when a request reads what others of the same
    batch read too (part of it comes from the L2), ``merge_rate`` of partial results. ``product_rate``: FLOPs a nanosecond
    (TFLOP/s / 1000) of a tile with many query rows. Nanoseconds: ``node_ns`` for each shared prefix and ``batch_ns`` once,
    for a batch that has any.
    """

    read_rate: float
    reread_rate: float
    product_rate: float
    merge_rate: float
    node_ns: float
    batch_ns: float

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

ALWAYS = SharingRates(1.0, 1.0, 1e9, 1e9, 0.0, 0.0)
"""Rates under which every shared page is worth a level: for tests."""


@dataclass(frozen=True)
class SharingCosts:
    """The rates of a device in the units of one model's attention: nanoseconds of a call of one layer."""

    token_ns: float
    reread_ns: float
    pair_ns: float
    row_ns: float
    node_ns: float
    batch_ns: float

    @classmethod
    def of(cls, spec: AttentionSpec, rates: SharingRates) -> SharingCosts:
        """What reading a KV token (of all heads) costs, the first time and again; the products of a query token with a key; and
        a query token's partial result, written, read and merged in float32."""
        dims = spec.head_dim + (spec.head_dim_vo or 0)
        token_bytes = spec.num_kv_heads * dims * spec.kv_dtype.itemsize
        partial_bytes = 2 * 4 * spec.num_qo_heads * ((spec.head_dim_vo or 0) + 1)
        return cls(
            token_ns=token_bytes / rates.read_rate,
            reread_ns=token_bytes / rates.reread_rate,
            pair_ns=2 * dims * spec.num_qo_heads / rates.product_rate,
            row_ns=partial_bytes / rates.merge_rate,
            node_ns=rates.node_ns,
            batch_ns=rates.batch_ns,
        )

    def alone(self, q_lens: Sequence[int], num_tokens: int) -> float:
        """Time of ``num_tokens`` keys that each member reads for itself."""
        first = max(self.token_ns, q_lens[0] * self.pair_ns)
        others = sum(max(self.reread_ns, q_len * self.pair_ns) for q_len in q_lens[1:])
        return num_tokens * (first + others)

    def together(self, q_lens: Sequence[int], num_tokens: int) -> float:
        """Time of the same keys read once for all members."""
        rows = sum(q_lens)
        return num_tokens * max(self.token_ns, rows * self.pair_ns) + rows * self.row_ns + self.node_ns


@dataclass(frozen=True)
class Verdict:
    """What the model says of one group's next shared tokens: ``level``, nanoseconds ``alone`` and ``together``, and whether the
    choice reads them once."""

    level: SharedLevel
    alone: float
    together: float
    taken: bool

    def __str__(self) -> str:
        level = self.level
        members = level.member_end - level.member_begin
        what = f"{members} requests share tokens {level.kv_begin} to {level.kv_end}"
        times = f"{self.together / 1e3:.1f} us once, {self.alone / 1e3:.1f} us apart"
        return f"{what}: {times} -> {'read once' if self.taken else 'each for itself'}"


@dataclass(frozen=True)
class Sharing:
    """The choice for a step: ``order`` of its requests, ``levels`` over it (parents first), ``saved_ns`` a layer, and what was
    found of each group."""

    order: tuple[str, ...]
    levels: tuple[SharedLevel, ...]
    saved_ns: float
    verdicts: tuple[Verdict, ...]

    def explain(self) -> list[str]:
        """Lines for a person."""
        head = f"{len(self.levels)} shared prefixes, {self.saved_ns / 1e3:.1f} us a layer saved"
        return [head, *(f"  {verdict}" for verdict in self.verdicts)]


class Sharer:
    """Follows the requests of the steps and chooses which of their shared prefixes are read once.

    ``arrange`` is called with each step's requests. What did not change since the last step costs a look-up a request; the
    choice is made anew when the forest or the numbers of new tokens differ.
    """

    def __init__(self, costs: SharingCosts, page_size: int, max_depth: int = 4) -> None:
        """``max_depth``: most shared prefixes around one request (Capacity.max_prefix_depth)."""
        self.forest = PrefixForest()
        self._costs = costs
        self._page_size = page_size
        self._max_depth = max_depth
        self._found: Sharing | None = None
        self._key: tuple[int, tuple[int, ...]] | None = None

    def arrange(self, pages: Mapping[str, Sequence[int] | None], q_lens: Mapping[str, int]) -> Sharing:
        """The sharing of a step. ``q_lens``: new tokens of each of its requests; ``pages``: of each, the whole pages before its
        new tokens, or None where they are as at the last call."""
        forest = self.forest
        for request_id in forest.request_ids - pages.keys():
            forest.remove(request_id)
        for request_id, held in pages.items():
            if held is not None:
                forest.put(request_id, held)
            elif request_id not in forest:
                raise ArgumentError("pages", f"those of {request_id!r}, which the last step had not", None)
        if self._key is None or self._key[0] != forest.version or self._found is None:
            order = tuple(forest.order())
        else:
            order = self._found.order
        key = forest.version, tuple(q_lens[request_id] for request_id in order)
        if key != self._key or self._found is None:
            self._found = self._choose(order, key[1])
            self._key = key
        return self._found

    def _choose(self, order: tuple[str, ...], q_lens: tuple[int, ...]) -> Sharing:
        choice = _Choice(self._costs, self._page_size, q_lens)
        spans = dict(_spans(self.forest.root))
        saved = choice.best(self.forest.root, 0, 0, self._max_depth, spans)
        worth = saved > self._costs.batch_ns
        verdicts = tuple(choice.walk(self.forest.root, 0, 0, self._max_depth, spans, worth))
        levels = tuple(verdict.level for verdict in verdicts if verdict.taken)
        return Sharing(order, levels, saved - self._costs.batch_ns if worth else 0.0, verdicts)


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
                taken = verdict.alone - verdict.together + self._below(group, group.end, depth - 1, spans)
            known = self._known[key] = max(skipped, taken), taken > skipped
        return known[0]

    def _below(self, group: PrefixGroup, covered: int, depth: int, spans: Mapping[PrefixGroup, int]) -> float:
        children = (child for child in group.groups.values() if child in spans)
        return sum(self.best(child, spans[child], covered, depth, spans) for child in children)

    def walk(
        self, group: PrefixGroup, begin: int, covered: int, depth: int, spans: Mapping[PrefixGroup, int], worth: bool
    ) -> Iterator[Verdict]:
        """The verdicts of ``best``'s choice, parents first; without ``worth`` nothing is taken."""
        taken = worth and self._known[begin, group.end, covered << 8 | depth][1]
        if group.end > covered:
            yield self._verdict(group, begin, covered, taken)
        if taken:
            covered, depth = group.end, depth - 1
        for child in group.groups.values():
            if child in spans:
                yield from self.walk(child, spans[child], covered, depth, spans, worth)

    def _verdict(self, group: PrefixGroup, begin: int, covered: int, taken: bool) -> Verdict:
        end = begin + group.size
        level = SharedLevel(begin, end, covered * self._page_size, group.end * self._page_size)
        q_lens, num_tokens = self._q_lens[begin:end], level.kv_end - level.kv_begin
        return Verdict(level, self._costs.alone(q_lens, num_tokens), self._costs.together(q_lens, num_tokens), taken)
