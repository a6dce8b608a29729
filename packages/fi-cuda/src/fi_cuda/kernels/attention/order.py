"""Tiles in the order of their length: spec and binding of ``fi/kernels/attention_order.cuh``, and the same list made on the
host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from fi_core.records import AttentionSpec, Capacity
from fi_scheduler.partition import PartitionParams
from torch import Tensor

from ...launch import LaunchableKernel, RepeatedLaunch
from ...params import ParamsLayout
from ...spec import KernelSpec, kernel_for
from .plan import ITEM_WIDTH, NO_STEPS, ShortSteps
from .prefill_tuning import PrefillTuning, first_key_unit

HEADER_WIDTH = 4
"""int32 columns of a list's head: rows, whether the list is used, tiles taken, 0."""

_SLOTS_A_WORKER = 3

_BINS = 256
_THREADS = 512
_MOST_OVER_SHARES = (11, 10)
_MOST_OF_PIECES_OVER_SHARES = (21, 20)
_PRODUCTS_WITH_MARGIN = 800e12
"""FLOP/s of 16-bit products over cached keys, and a seventh more."""
_LEAST_GAIN = (29, 30)
_PIECE_STEPS = 4
"""What a piece's way through memory costs, in steps: its rows are written in float32 and read again."""
_INT32_MAX = 2**31 - 1
_SPREAD = 2654435761


class OrderList(NamedTuple):
    """Where a list lies, int32: ``items`` [rows of order_rows, ITEM_WIDTH], ``header`` [HEADER_WIDTH], and ``tile_prefix``
    [max_batch + 1], which only the kernel uses."""

    items: Tensor
    header: Tensor
    tile_prefix: Tensor


@dataclass(frozen=True)
class AttentionOrderSpec(KernelSpec):
    """The tiles of a prefill plan: tokens of a q tile and of a warpgroup, keys a step, ``unit`` of the position at which a tile's
    keys begin under a window, workers, all KV heads, ``pieces`` of a tile at most and ``slots`` for all of them, costs as in
    TileKind, that of a piece beyond an item's; ``fast_memory``: blocks may all read keys of their own; ``shift``: tiles
    whose steps differ in lower bits only count as equally long; ``short_q_len``, ``most_short``, ``tall_q_len``,
    ``many_weight``, ``tall_weight``: batches that ShortSteps holds have an empty list."""

    tile_tokens: int
    group_tokens: int
    tokens: int
    unit: int
    short_q_len: int
    most_short: int
    tall_q_len: int
    many_weight: int
    tall_weight: int
    causal: bool
    windowed: bool
    shift: int
    workers: int
    heads: int
    pieces: int
    slots: int
    item_cost: int
    step_cost: int
    piece_cost: int
    fast_memory: bool

    stem: ClassVar = "attention_order"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("q_indptr", "pointer"),
            ("kv_lens", "pointer"),
            ("tile_prefix", "output"),
            ("items", "output"),
            ("header", "output"),
            ("max_pairs", "int32"),
            ("max_q_tokens", "int32"),
            ("max_q_len", "int32"),
            ("max_kv_len", "int32"),
            ("num_requests", "int32"),
            ("window", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return _THREADS

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    def bin_of(self, steps: int) -> int:
        """The place of a tile's length in the order: 0 is the longest."""
        return _BINS - 1 - min(steps >> self.shift, _BINS - 1)

    def full_steps(self, steps: int, num_tokens: int) -> int:
        """Steps of a full tile that take as long as ``steps`` of one with ``num_tokens`` tokens: warpgroups without rows stand
        aside, but the others wait for a step's products twice."""
        all_groups = self.tile_tokens // self.group_tokens
        groups = min(-(-num_tokens // self.group_tokens), all_groups)
        return -(-steps * (groups + 2) // (all_groups + 2))

    def cost_of_bin(self, place: int) -> int:
        """The cost of a tile of a bin at most."""
        return self.item_cost + self.step_cost * (((_BINS - place) << self.shift) - 1)


def order_spec(
    params: PartitionParams,
    capacity: Capacity,
    tuning: PrefillTuning,
    page_size: int | None,
    short: ShortSteps = NO_STEPS,
    fast_memory: bool = False,
) -> AttentionOrderSpec:
    """The spec for one kind of tiles of whole tokens, equally many for each of the warpgroups, over pages of ``page_size``
    (None: ragged K and V); ``short``: steps that another kernel serves; ``fast_memory``: what ``has_fast_memory`` says."""
    (kind,) = params.kinds
    most_steps = -(-capacity.max_kv_len // kind.kv_tokens) + 1
    return AttentionOrderSpec(
        tile_tokens=kind.q_rows // params.group_size,
        group_tokens=kind.q_rows // params.group_size // tuning.consumers,
        tokens=kind.kv_tokens,
        unit=first_key_unit(page_size, kind.kv_tokens),
        short_q_len=short.q_len,
        most_short=short.most,
        tall_q_len=short.tall_q_len,
        many_weight=short.weight,
        tall_weight=short.tall_weight,
        causal=params.causal,
        windowed=params.window is not None,
        shift=max(0, most_steps.bit_length() - (_BINS - 1).bit_length()),
        workers=params.num_workers,
        heads=params.num_kv_heads,
        pieces=tuning.pieces,
        slots=order_slots(params, tuning),
        item_cost=kind.item_cost,
        step_cost=kind.step_cost,
        piece_cost=_PIECE_STEPS * kind.step_cost,
        fast_memory=fast_memory,
    )


def has_fast_memory(spec: AttentionSpec, tuning: PrefillTuning, gbs: float) -> bool:
    """Whether memory of ``gbs`` GB/s feeds products at their full pace where blocks share no keys: a byte of a 16-bit key or
    value is multiplied with every packed row of a tile, so a tile has as many operations a byte as it has rows."""
    return spec.kv_dtype.itemsize == 2 and gbs * 1e9 * tuning.slot_rows >= _PRODUCTS_WITH_MARGIN


def order_slots(params: PartitionParams, tuning: PrefillTuning) -> int:
    """Pieces of tiles that a list has at most, each with a slot of its own."""
    return _SLOTS_A_WORKER * params.num_workers if tuning.pieces > 1 else 0


def order_rows(params: PartitionParams, tuning: PrefillTuning, max_tiles: int) -> int:
    """Rows of the longest list for ``max_tiles`` tiles of all heads."""
    return (max_tiles + order_slots(params, tuning)) // params.num_kv_heads


@dataclass(frozen=True)
class OrderPlanner:
    """One launch that fills ``order`` for batches within ``capacity``; ``window`` as in PartitionParams."""

    spec: AttentionOrderSpec
    capacity: Capacity
    window: int | None
    order: OrderList

    def load(self) -> None:
        """Make the kernel ready to launch, so that the first call does not compile."""
        self._kernel  # noqa: B018

    @cached_property
    def _kernel(self) -> LaunchableKernel:
        return kernel_for(self.spec, self.order.items.device)

    @cached_property
    def _launch(self) -> RepeatedLaunch:
        return self._kernel.repeated(self.order.items.device, 1)

    @cached_property
    def _limits(self) -> tuple[int, ...]:
        capacity = self.capacity
        limits = (capacity.max_q_tokens, capacity.max_q_len, capacity.max_kv_len)
        max_pairs = self.order.items.shape[0] - self.spec.slots // self.spec.heads
        return max_pairs, *(min(limit, _INT32_MAX) for limit in limits)

    def __call__(self, q_indptr: Tensor, kv_lens: Tensor) -> None:
        """Order int32 ``q_indptr`` [B + 1] and ``kv_lens`` [B] on the list's device; legal in CUDA-graph capture once
        loaded. A batch beyond the capacity, or with negative lengths, gets no tiles."""
        launch, given = self._launch, (q_indptr.data_ptr(), kv_lens.data_ptr(), kv_lens.shape[0])
        if launch.packed_for != given:
            items, header, tile_prefix = (tensor.data_ptr() for tensor in self.order)
            launch.pack(*given[:2], tile_prefix, items, header, *self._limits, given[2], self.window or 0)
            launch.packed_for = given
        launch.launch()


def fill_order_on_host(
    q_indptr: Tensor, kv_lens: Tensor, spec: AttentionOrderSpec, window: int | None, order: OrderList
) -> None:
    """Fill ``order`` in host memory as the kernel would from these CPU lengths, which are within the capacity."""
    short = ShortSteps(
        *(spec.short_q_len, spec.most_short, spec.tile_tokens),
        *(spec.tall_q_len, spec.many_weight, spec.tall_weight),
    )
    is_short = short.hold(q_indptr, spec.heads)
    found = () if is_short else _tiles(q_indptr.tolist(), kv_lens.tolist(), spec, window)
    tiles = sorted(found, key=lambda tile: tile[0])
    used, num_whole, pieces = arrangement([place for place, _ in tiles], spec)
    rows = [row for _, row in tiles[:num_whole]]
    rows += _in_rounds(tiles[num_whole:], pieces, spec)
    order.header.numpy()[:] = (len(rows), used, 0, 0)
    if used and rows:
        order.items[: len(rows)].numpy()[:] = np.array(rows, dtype=np.int32)


def _in_rounds(
    tiles: list[tuple[int, tuple[int, ...]]], pieces: int, spec: AttentionOrderSpec
) -> list[tuple[int, ...]]:
    """The pieces of tiles with these bins, in order: in every round of a piece a block as many of a bin as in any other, longer
    ones first, and of equally long tiles all first pieces first."""
    rounds = -(-len(tiles) * pieces * spec.heads // spec.workers)
    placed = []
    for place, equal in itertools.groupby(enumerate(tiles), key=lambda tile: tile[1][0]):
        kept = [(idx, row) for idx, (_, row) in equal]
        rows = [_piece_of(row, idx, piece, pieces, spec) for piece in range(pieces) for idx, row in kept]
        placed += [(idx * rounds // len(rows), place, idx, row) for idx, row in enumerate(rows)]
    return [row for *_, row in sorted(placed)]


def arrangement(bins: list[int], spec: AttentionOrderSpec) -> tuple[bool, int, int]:
    """Whether the list of tiles with these bins, in order, is used, how many of them stay whole, and the pieces of each of
    the others; as in ``fi/kernels/attention_order.cuh``."""
    costs, workers, heads = [spec.cost_of_bin(place) for place in bins], spec.workers, spec.heads
    piece_cost = spec.item_cost + spec.piece_cost
    num_rounds = len(bins) * heads // workers
    rounds = sum(costs[idx * workers // heads] for idx in range(num_rounds))
    num_whole = num_rounds * workers // heads
    num_left = (len(bins) - num_whole) * heads
    totals = {1: rounds + (costs[num_whole] if num_left else 0)}
    for pieces in range(2, spec.pieces + 1):
        if num_left * pieces <= spec.slots:
            firsts = (num_whole + first // (heads * pieces) for first in range(0, num_left * pieces, workers))
            lengths = (-(-(costs[place] - spec.item_cost) // pieces) for place in firsts)
            totals[pieces] = rounds + sum(length + piece_cost for length in lengths)
    best = min(totals, key=lambda pieces: (totals[pieces], pieces))
    gain, of = _LEAST_GAIN
    if totals[best] * of > totals[1] * gain:
        best = 1
    shares = sum(costs) * heads + (2 * piece_cost * workers if spec.pieces > 1 else 0)
    most, over = _MOST_OF_PIECES_OVER_SHARES if spec.fast_memory and num_rounds == 0 else _MOST_OVER_SHARES
    used = totals[best] * workers * over <= shares * most
    return used, len(bins) if best == 1 else num_whole, best


def _piece_of(row: tuple[int, ...], idx: int, piece: int, pieces: int, spec: AttentionOrderSpec) -> tuple[int, ...]:
    """The row of a piece of tile ``idx`` in pieces, whose row were it whole is ``row``."""
    request, head, q_tile, kind, start, stop = row[:6]
    num_steps = -(-(stop - start) // spec.tokens)
    stride = -(-num_steps // pieces) * spec.tokens
    begin = min(start + piece * stride, stop)
    slot = idx * spec.heads * pieces
    tile = (request, head, q_tile, kind, begin, min(begin + stride, stop))
    return (*tile, slot + piece, 0, *row[8:11], idx * spec.heads, slot, slot + 1, slot + pieces, pieces)


def _tiles(
    q_indptr: list[int], kv_lens: list[int], spec: AttentionOrderSpec, window: int | None
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(bin, row) of every tile of a KV head, in the order of the requests."""
    lengths = zip(kv_lens, itertools.pairwise(q_indptr), strict=True)
    longest = max((kv_len for kv_len, (begin, end) in lengths if end > begin), default=0)
    if window is not None:
        longest = min(longest, min(longest, window) + spec.tile_tokens + spec.unit)
    first_bin = spec.bin_of(-(-longest // spec.tokens))
    for request, kv_len in enumerate(kv_lens):
        q_begin, q_len = q_indptr[request], q_indptr[request + 1] - q_indptr[request]
        offset = kv_len - q_len
        for q_tile, begin in enumerate(range(0, q_len, spec.tile_tokens)):
            stop = max(offset + min(begin + spec.tile_tokens, q_len), 0) if spec.causal else kv_len
            start = 0
            if window is not None:
                start = min(max(offset + begin - window + 1, 0), stop) // spec.unit * spec.unit
            steps = -(-(stop - start) // spec.tokens)
            place = spec.bin_of(spec.full_steps(steps, q_len - begin))
            if q_len - begin <= spec.group_tokens:
                place = spec.bin_of(steps)
                spread = (request * _SPREAD) % 2**32 >> 16
                place = first_bin + spread % (place - first_bin + 1)
            row = (request, 0, q_tile, 0, start, stop, -1, 0, q_begin, q_len, kv_len, -1, 0, 0, 0, 0)
            assert len(row) == ITEM_WIDTH
            yield place, row
