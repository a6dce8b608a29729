"""Records of the work partition: kinds of tiles, parameters, bounds from capacities, and the work list."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from math import gcd
from typing import TypeAlias

import numpy as np
import torch
from fi_core.errors import ArgumentError, CapacityError
from fi_core.records import Capacity

Int32Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Int64Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

RECORD_WIDTH = 8
"""int32 columns of an item and of a merge record."""
COL_REQUEST, COL_KV_HEAD, COL_Q_TILE, COL_KIND = 0, 1, 2, 3
"""Columns that items and merges share."""
COL_KV_BEGIN, COL_KV_END, COL_SLOT = 4, 5, 6
"""Columns of an item: KV tokens [begin, end), and the slot of its partial result or NO_SLOT."""
COL_HEAD_SLOT, COL_TAIL_BEGIN, COL_TAIL_END = 4, 5, 6
"""Columns of a merge: the slot of the tile's first piece, then slots [tail_begin, tail_end) in ascending order."""
NO_SLOT = -1
"""An item that covers its whole tile writes the output itself."""

MAX_KINDS = 8
UNLIMITED_ROWS = 2**62
"""``max_packed_rows`` of a last kind that serves every request."""
INT32_MAX = 2**31 - 1
MAX_TOTAL_COST = 2**62
"""A line longer than this is refused: positions stay inside 64-bit integers."""

_LIMITS = {
    "q_rows": 2**16,
    "kv_tokens": 2**16,
    "max_packed_rows": UNLIMITED_ROWS,
    "item_cost": 2**24,
    "step_cost": 2**24,
}


def _require_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ArgumentError(f"{owner}.{name}", f"an int from {low} to {high}", value)


@dataclass(frozen=True)
class TileKind:
    """One kind of query tile of a kernel family.

    ``q_rows``: packed query rows a tile (row = token * group_size + head in group). ``kv_tokens``: KV tokens a step.
    ``max_packed_rows``: the kind serves requests with q_len * group_size up to this. ``item_cost`` and ``step_cost``:
    cost of a tile besides its steps, and of one step, in any common unit.
    """

    q_rows: int
    kv_tokens: int
    max_packed_rows: int
    item_cost: int
    step_cost: int

    def __post_init__(self) -> None:
        for item in fields(self):
            _require_int("kind", item.name, getattr(self, item.name), 1, _LIMITS[item.name])


@dataclass(frozen=True)
class PartitionParams:
    """Everything about a partition that no batch changes.

    ``kinds`` ascend in ``max_packed_rows``; a request takes the first that serves it. ``window``: key j is visible to
    query i iff i - j < window. ``heads_first``: tile order is (head, request, q tile), else (request, q tile, head).
    ``max_splits`` 0 is the balanced partition; above 0 the batch-invariant one with at most that many pieces a tile,
    each of at least ``min_split_steps`` KV steps (the last may be shorter).
    """

    num_workers: int
    num_kv_heads: int
    group_size: int
    kinds: tuple[TileKind, ...]
    causal: bool
    window: int | None
    heads_first: bool = False
    max_splits: int = 0
    min_split_steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name, low, high in (
            ("num_workers", 1, 2**16),
            ("num_kv_heads", 1, 2**16),
            ("group_size", 1, 2**10),
            ("max_splits", 0, 2**16),
            ("min_split_steps", 1, INT32_MAX),
        ):
            _require_int("params", name, getattr(self, name), low, high)
        for name in ("causal", "heads_first"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"params.{name}", "a bool", getattr(self, name))
        if self.window is not None:
            _require_int("params", "window", self.window, 1, INT32_MAX)
        if not 1 <= len(self.kinds) <= MAX_KINDS:
            raise ArgumentError("params.kinds", f"1 to {MAX_KINDS} kinds", len(self.kinds))
        limits = [kind.max_packed_rows for kind in self.kinds]
        if any(low >= high for low, high in zip(limits, limits[1:], strict=False)):
            raise ArgumentError("params.kinds", "max_packed_rows strictly ascending", limits)
        if self.max_splits == 0 and self.min_split_steps != 1:
            raise ArgumentError("params.min_split_steps", "1 with max_splits=0 (balanced)", self.min_split_steps)

    @cached_property
    def packed(self) -> Int64Array:
        """int64 array in the field order of ``fi::scheduler::Params``, read-only."""
        window = -1 if self.window is None else self.window
        head = [self.num_workers, self.num_kv_heads, self.group_size, len(self.kinds), self.causal, window]
        head += [self.heads_first, self.max_splits, self.min_split_steps]
        for kind in self.kinds:
            head += [kind.q_rows, kind.kv_tokens, kind.max_packed_rows, kind.item_cost, kind.step_cost]
        head += [0] * (len(_LIMITS) * (MAX_KINDS - len(self.kinds)))
        packed = np.array(head, dtype=np.int64)
        packed.flags.writeable = False
        return packed

    def kind_of(self, packed_rows: int) -> int:
        """Index of the kind that serves a request of ``packed_rows`` rows (the last, if none does)."""
        for kind_idx, kind in enumerate(self.kinds):
            if packed_rows <= kind.max_packed_rows:
                return kind_idx
        return len(self.kinds) - 1

    def num_tiles(self, q_len: int) -> int:
        """Query tiles of a request with ``q_len`` new tokens, for one KV head."""
        packed_rows = q_len * self.group_size
        return -(-packed_rows // self.kinds[self.kind_of(packed_rows)].q_rows)


@dataclass(frozen=True)
class PartitionBounds:
    """Sizes that no batch within a capacity exceeds: query tiles, items, merge records, slots of partial results."""

    num_workers: int
    max_tiles: int
    max_items: int
    max_merges: int
    num_slots: int

    @classmethod
    def from_capacity(cls, params: PartitionParams, capacity: Capacity) -> PartitionBounds:
        """Bounds for every batch within ``capacity``; raises CapacityError when one would not fit the work list."""
        max_rows = capacity.max_q_len * params.group_size
        if max_rows > params.kinds[-1].max_packed_rows:
            limit = f"at most {params.kinds[-1].max_packed_rows} packed rows (the last kind)"
            raise CapacityError("capacity.max_q_len", limit, f"{capacity.max_q_len} * group_size = {max_rows} rows")
        max_tiles = params.num_kv_heads * _max_tiles_per_head(params, capacity)
        if params.max_splits:
            pieces = max_tiles * params.max_splits
            bounds = cls(params.num_workers, max_tiles, pieces, max_tiles, pieces)
        else:
            workers = params.num_workers
            merges = min(workers - 1, max_tiles)
            bounds = cls(workers, max_tiles, max_tiles + 2 * workers, merges, 2 * workers)
        if max(bounds.max_items, bounds.num_slots) > INT32_MAX:
            raise CapacityError("capacity", f"at most {INT32_MAX} items and slots", f"{bounds} for {capacity}")
        tile_cost = max(k.item_cost + -(-capacity.max_kv_len // k.kv_tokens) * k.step_cost for k in params.kinds)
        if max_tiles * tile_cost > MAX_TOTAL_COST:
            raise CapacityError("capacity", f"a total cost of at most {MAX_TOTAL_COST}", max_tiles * tile_cost)
        return bounds


def _max_tiles_per_head(params: PartitionParams, capacity: Capacity) -> int:
    """Most query tiles of a legal batch: the batch size times the upper concave hull of tiles(q_len), at the mean.

    A batch's mean (q_len, tiles) is a convex combination of per-request points, so it lies below the hull. Within a
    kind, tiles(q_len) is a line plus something periodic: one period at each end of its range carries its hull.
    """
    points: dict[int, int] = {0: 0}
    low = 1
    for kind in params.kinds:
        high = min(kind.max_packed_rows // params.group_size, capacity.max_q_len)
        period = kind.q_rows // gcd(kind.q_rows, params.group_size)
        ends = {*range(low, min(low + period, high + 1)), *range(max(low, high - period), high + 1)}
        points.update({q_len: params.num_tiles(q_len) for q_len in ends})
        low = max(low, high + 1)
    hull: list[tuple[int, int]] = []
    for q_len, tiles in sorted(points.items()):
        while len(hull) >= 2:
            (left_q, left), (mid_q, mid) = hull[-2], hull[-1]
            if (mid - left) * (q_len - left_q) > (tiles - left) * (mid_q - left_q):
                break
            hull.pop()
        hull.append((q_len, tiles))
    mean_q_len = Fraction(capacity.max_q_tokens, capacity.max_batch)
    best = Fraction(0)
    for (left_q, left), (right_q, right) in zip(hull, hull[1:], strict=False):
        if mean_q_len > left_q:
            share = min(Fraction(1), (mean_q_len - left_q) / (right_q - left_q))
            best = max(best, left + (right - left) * share)
    return int(capacity.max_batch * best)


@dataclass(frozen=True)
class WorkList:
    """The work of every worker: int32 arrays in host memory, C-contiguous.

    ``worker_indptr`` [W + 1]: worker w does items [worker_indptr[w], worker_indptr[w + 1]). ``items`` [N, 8]:
    columns COL_REQUEST, COL_KV_HEAD, COL_Q_TILE, COL_KIND, COL_KV_BEGIN, COL_KV_END (KV tokens; a window's first
    step may begin before the window), COL_SLOT, 0. ``merges`` [M, 8], one per split tile: the first four columns,
    then COL_HEAD_SLOT, COL_TAIL_BEGIN, COL_TAIL_END, 0. Items stand in worker order, then line order; merges in
    line order.
    """

    worker_indptr: Int32Array
    items: Int32Array
    merges: Int32Array

    @classmethod
    def allocate(cls, num_workers: int, max_items: int, max_merges: int, pinned: bool = False) -> WorkList:
        """Uninitialised buffers; ``pinned`` takes page-locked memory, so that a copy to the GPU can be asynchronous."""
        shapes = ((num_workers + 1,), (max_items, RECORD_WIDTH), (max_merges, RECORD_WIDTH))
        return cls(*(torch.empty(shape, dtype=torch.int32, pin_memory=pinned).numpy() for shape in shapes))

    @classmethod
    def for_bounds(cls, bounds: PartitionBounds, pinned: bool = False) -> WorkList:
        """Buffers that serve as ``out`` for every batch within the bounds' capacity."""
        return cls.allocate(bounds.num_workers, bounds.max_items, bounds.max_merges, pinned)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(worker_indptr, items, merges) as CPU tensors that share the arrays' memory."""
        return torch.from_numpy(self.worker_indptr), torch.from_numpy(self.items), torch.from_numpy(self.merges)
