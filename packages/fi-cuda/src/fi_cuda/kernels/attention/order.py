"""Tiles in the order of their length: spec and binding of ``fi/kernels/attention_order.cuh``, and the same list made on the
host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from fi_core.records import Capacity
from fi_scheduler.partition import PartitionParams
from torch import Tensor

from ...launch import LaunchableKernel, RepeatedLaunch
from ...params import ParamsLayout
from ...spec import KernelSpec, kernel_for
from .plan import ITEM_WIDTH

HEADER_WIDTH = 4
"""int32 columns of a list's head: rows, whether the list is used, tiles taken, 0."""

_BINS = 256
_THREADS = 512
_MOST_OVER_SHARES = (11, 10)
_INT32_MAX = 2**31 - 1
_SPREAD = 2654435761


class OrderList(NamedTuple):
    """Where a list lies, int32: ``items`` [max_pairs, ITEM_WIDTH], ``header`` [HEADER_WIDTH], and ``tile_prefix``
    [max_batch + 1], which only the kernel uses."""

    items: Tensor
    header: Tensor
    tile_prefix: Tensor


@dataclass(frozen=True)
class AttentionOrderSpec(KernelSpec):
    """The tiles of a prefill plan: tokens of a q tile and of a warpgroup, keys a step, workers, all KV heads, costs as in
    TileKind; ``shift``: tiles whose steps differ in lower bits only count as equally long; ``short_q_len``: batches in which
    no request has more new tokens have an empty list."""

    tile_tokens: int
    group_tokens: int
    tokens: int
    short_q_len: int
    causal: bool
    windowed: bool
    shift: int
    workers: int
    heads: int
    item_cost: int
    step_cost: int

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

    def cost_of_bin(self, place: int) -> int:
        """The cost of a tile of a bin at most."""
        return self.item_cost + self.step_cost * (((_BINS - place) << self.shift) - 1)


def order_spec(params: PartitionParams, capacity: Capacity, consumers: int, short_q_len: int = 0) -> AttentionOrderSpec:
    """The spec for one kind of tiles of whole tokens, equally many for each of ``consumers`` warpgroups; ``short_q_len`` as in
    AttentionOrderSpec."""
    (kind,) = params.kinds
    most_steps = -(-capacity.max_kv_len // kind.kv_tokens) + 1
    return AttentionOrderSpec(
        tile_tokens=kind.q_rows // params.group_size,
        group_tokens=kind.q_rows // params.group_size // consumers,
        tokens=kind.kv_tokens,
        short_q_len=short_q_len,
        causal=params.causal,
        windowed=params.window is not None,
        shift=max(0, most_steps.bit_length() - (_BINS - 1).bit_length()),
        workers=params.num_workers,
        heads=params.num_kv_heads,
        item_cost=kind.item_cost,
        step_cost=kind.step_cost,
    )


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
        return self.order.items.shape[0], *(min(limit, _INT32_MAX) for limit in limits)

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
    is_long = bool((q_indptr.diff() > spec.short_q_len).any())
    found = _tiles(q_indptr.tolist(), kv_lens.tolist(), spec, window) if is_long else ()
    tiles = sorted(found, key=lambda tile: tile[0])
    shares = sum(spec.cost_of_bin(place) for place, _ in tiles) * spec.heads
    firsts = range(0, len(tiles) * spec.heads, spec.workers)
    rounds = sum(spec.cost_of_bin(tiles[first // spec.heads][0]) for first in firsts) * spec.workers
    most, over = _MOST_OVER_SHARES
    used = rounds * over <= shares * most
    order.header.numpy()[:] = (len(tiles), used, 0, 0)
    if used and tiles:
        order.items[: len(tiles)].numpy()[:] = np.array([row for _, row in tiles], dtype=np.int32)


def _tiles(
    q_indptr: list[int], kv_lens: list[int], spec: AttentionOrderSpec, window: int | None
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(bin, row) of every tile of a KV head, in the order of the requests."""
    lengths = zip(kv_lens, itertools.pairwise(q_indptr), strict=True)
    longest = max((kv_len for kv_len, (begin, end) in lengths if end > begin), default=0)
    first_bin = spec.bin_of(-(-longest // spec.tokens))
    for request, kv_len in enumerate(kv_lens):
        q_begin, q_len = q_indptr[request], q_indptr[request + 1] - q_indptr[request]
        offset = kv_len - q_len
        for q_tile, begin in enumerate(range(0, q_len, spec.tile_tokens)):
            stop = max(offset + min(begin + spec.tile_tokens, q_len), 0) if spec.causal else kv_len
            start = 0
            if window is not None:
                start = min(max(offset + begin - window + 1, 0), stop) // spec.tokens * spec.tokens
            place = spec.bin_of(-(-(stop - start) // spec.tokens))
            if q_len - begin <= spec.group_tokens:
                spread = (request * _SPREAD) % 2**32 >> 16
                place = first_bin + spread % (place - first_bin + 1)
            row = (request, 0, q_tile, 0, start, stop, -1, 0, q_begin, q_len, kv_len, -1, 0, 0, 0, 0)
            assert len(row) == ITEM_WIDTH
            yield place, row
