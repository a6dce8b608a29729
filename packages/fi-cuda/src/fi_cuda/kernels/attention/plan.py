"""Planning on the device: spec and binding of ``fi/kernels/attention_plan.cuh``, and the same rows made on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from fi_core.records import Capacity
from fi_scheduler.partition import (
    COL_HEAD_SLOT,
    COL_KIND,
    COL_KV_BEGIN,
    COL_KV_END,
    COL_REQUEST,
    COL_SLOT,
    COL_TAIL_END,
    NO_SLOT,
    RECORD_WIDTH,
    PartitionParams,
    TileKind,
    include_folder,
    partition,
)
from torch import Tensor

from ...compile import INCLUDE_FOLDER
from ...launch import LaunchableKernel, RepeatedLaunch
from ...params import ParamsLayout
from ...source import KernelSource
from ...spec import KernelSpec, kernel_for

ITEM_WIDTH = 16
"""int32 columns of an item's row: the scheduler's eight, then q_begin, q_len, kv_len, merge_idx (-1 with slot -1),
head_slot, tail_begin, tail_end (0 with slot -1), 0."""
START_WIDTH = 32
"""int32 columns of a worker's start: the range of its items, and from column 16 on its first item's row."""

_COL_Q_BEGIN, _COL_Q_LEN, _COL_KV_LEN, _COL_MERGE = 8, 9, 10, 11
_COL_FIRST_ITEM = START_WIDTH - ITEM_WIDTH
_MERGED = slice(12, 15)

_WORKERS_PER_BLOCK = 4
_TABLE_SIZES = ((256, 256), (1024, 512), (4096, 1024))
"""(requests that the tables in shared memory hold, threads a block); for more requests the tables lie in global memory."""
_THREADS_FOR_MORE = 512
_PREFIXES = 4
_NARROW_LIMIT = 2**29
_INT32_MAX = 2**31 - 1


def table_bytes(max_batch: int, integer_bytes: int = 8) -> int:
    """Bytes of the kernel's tables of ``max_batch`` requests: four prefix sums, and the lengths."""
    return _PREFIXES * integer_bytes * (max_batch + 1) + 4 * (2 * max_batch + 1)


def scratch_bytes(max_batch: int) -> int:
    """Bytes of global memory that a plan for ``max_batch`` requests needs; 0 where shared memory holds the tables."""
    return 0 if max_batch <= _TABLE_SIZES[-1][0] else table_bytes(max_batch)


def counts_in_32_bits(params: PartitionParams, capacity: Capacity) -> bool:
    """Whether 32 bits hold what the kernel counts: known to be so where no request has a second q tile, and twice the
    capacity's cost, its lengths and the products of its lengths that the kernel forms are small."""
    if len(params.kinds) > 1 or params.kinds[0].max_packed_rows > params.kinds[0].q_rows:
        return False
    kind = params.kinds[0]
    tile_cost = kind.item_cost + (capacity.max_kv_len // kind.kv_tokens + 2) * kind.step_cost
    largest = (
        params.num_kv_heads * capacity.max_batch * max(tile_cost, params.max_splits),
        capacity.max_kv_len + kind.kv_tokens,
        capacity.max_q_len * params.group_size,
        params.min_split_steps,
        params.window or 0,
        params.num_workers**2,
    )
    return max(largest) <= _NARROW_LIMIT


LIST_PARAMS = (
    ("scratch", "output"),
    ("starts", "output"),
    ("items", "output"),
    ("worker_indptr", "output"),
    ("merges", "output"),
    ("num_merges", "output"),
    ("max_tiles", "int64"),
)
"""Of a plan's kernel, where the lists are; see ``DevicePlanner.outputs``."""
LIMIT_PARAMS = (
    ("max_q_tokens", "int32"),
    ("max_q_len", "int32"),
    ("max_kv_len", "int32"),
    ("num_requests", "int32"),
    ("window", "int32"),
)
"""What a batch may be, and what it is."""


class ShortSteps(NamedTuple):
    """Steps that the decode kernel serves under a plan that has the prefill kernel too: those in which the latter's
    tiles (``tile_tokens`` new tokens of a request and KV head) weigh at most ``most``: 0 in requests of up to ``q_len`` new
    tokens, ``tall_weight`` in those of more than ``tall_q_len``, and ``weight`` between."""

    q_len: int = 0
    most: int = 0
    tile_tokens: int = 1
    tall_q_len: int = 0
    weight: int = 1
    tall_weight: int = 1

    def weights(self, q_lens: Tensor) -> Tensor:
        """Of a tile of requests with these new tokens."""
        return (q_lens > self.q_len) * self.weight + (q_lens > self.tall_q_len) * (self.tall_weight - self.weight)

    def hold(self, q_indptr: Tensor, heads: int) -> bool:
        """Whether the step with these offsets on the CPU, int32 [B + 1], is one."""
        q_lens = q_indptr.diff()
        tiles = -(-q_lens // self.tile_tokens)
        return int((tiles * self.weights(q_lens)).sum()) * heads <= self.most

    def constants(self) -> str:
        """Of the planner's ``Config``, which counts likewise (``fi/attention/order.cuh``)."""
        return (
            f"static constexpr int kShortQLen = {self.q_len}, kMostShort = {self.most}, kTileTokens = {self.tile_tokens}, "
            f"kTallQLen = {self.tall_q_len}, kManyWeight = {self.weight}, kTallWeight = {self.tall_weight};"
        )


NO_STEPS = ShortSteps()
"""Those of no query, which are no work."""


@dataclass(frozen=True)
class AttentionPlanSpec(KernelSpec):
    """PartitionParams but for the window's length, the size of the tables (``shared_requests`` 0: none in shared
    memory), and whether the kernel counts in 32 bits (``narrow``); ``short``: other steps get no work (None: all do)."""

    num_workers: int
    num_kv_heads: int
    group_size: int
    kinds: tuple[TileKind, ...]
    causal: bool
    windowed: bool
    heads_first: bool
    max_splits: int
    min_split_steps: int
    shared_requests: int
    threads: int
    narrow: bool
    short: ShortSteps | None = None

    stem: ClassVar = "attention_plan"
    overlapping: ClassVar = True
    include_folders: ClassVar[tuple[Path, ...]] = (INCLUDE_FOLDER, include_folder())
    layout: ClassVar = ParamsLayout((("q_indptr", "pointer"), ("kv_lens", "pointer"), *LIST_PARAMS, *LIMIT_PARAMS))

    @property
    def num_threads(self) -> int:
        return self.threads

    @property
    def shared_bytes(self) -> int:
        return table_bytes(self.shared_requests, 4 if self.narrow else 8) if self.shared_requests else 0

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    @property
    def num_blocks(self) -> int:
        """Blocks that have a warp for each worker, and one for the end of the lists."""
        return self.num_workers // _WORKERS_PER_BLOCK + 1

    def source(self) -> KernelSource:
        return self.with_count_type(super().source())

    def with_count_type(self, made: KernelSource) -> KernelSource:
        """The text with the type in which the kernel counts."""
        return replace(made, text=f"#define FI_PARTITION_INT int\n{made.text}") if self.narrow else made

    def config_lines(self) -> list[str]:
        kinds = ", ".join(
            f"{{{kind.q_rows}, {kind.kv_tokens}, {kind.max_packed_rows}, {kind.item_cost}, {kind.step_cost}}}"
            for kind in self.kinds
        )
        short = self.short or NO_STEPS
        head = (self.num_workers, self.num_kv_heads, self.group_size, len(self.kinds), int(self.causal))
        tail = (1 if self.windowed else -1, int(self.heads_first), self.max_splits, self.min_split_steps)
        return [
            f"static constexpr int kNumThreads = {self.threads};",
            f"static constexpr int kWorkersPerBlock = {_WORKERS_PER_BLOCK};",
            f"static constexpr int kSharedRequests = {self.shared_requests};",
            f"static constexpr bool kShortOnly = {str(self.short is not None).lower()};",
            short.constants(),
            "static __device__ constexpr fi::scheduler::Params partition() {",
            f"  return {{{', '.join(map(str, head + tail))}, {{{kinds}}}}};",
            "}",
        ]


@lru_cache(maxsize=1024)
def plan_spec(params: PartitionParams, capacity: Capacity, short: ShortSteps | None = None) -> AttentionPlanSpec:
    """The spec that plans batches within ``capacity``; ``short`` as in AttentionPlanSpec."""
    fitting = ((size, threads) for size, threads in _TABLE_SIZES if capacity.max_batch <= size)
    size, threads = next(fitting, (0, _THREADS_FOR_MORE))
    narrow = counts_in_32_bits(params, capacity)
    return AttentionPlanSpec(
        num_workers=params.num_workers,
        num_kv_heads=params.num_kv_heads,
        group_size=params.group_size,
        kinds=params.kinds,
        causal=params.causal,
        windowed=params.window is not None,
        heads_first=params.heads_first,
        max_splits=params.max_splits,
        min_split_steps=params.min_split_steps,
        shared_requests=size,
        threads=threads if narrow else min(threads, _THREADS_FOR_MORE),  # 64-bit counts take twice the registers
        narrow=narrow,
        short=short,
    )


class DeviceWorkList(NamedTuple):
    """Where a work list lies on a device, int32: ``starts`` [W, START_WIDTH], ``items`` [max_items, ITEM_WIDTH], and the
    scheduler's ``worker_indptr`` [W + 1] and ``merges`` [max_merges or more, 8]; ``num_merges`` [1] are in use."""

    starts: Tensor
    items: Tensor
    worker_indptr: Tensor
    merges: Tensor
    num_merges: Tensor


@dataclass(frozen=True)
class DevicePlanner:
    """One launch that fills ``lists`` for batches within ``capacity``, of at most ``max_tiles`` query tiles
    (PartitionBounds). ``scratch``: scratch_bytes(max_batch) bytes of device memory, uint8. ``short``: other steps get no work."""

    params: PartitionParams
    capacity: Capacity
    max_tiles: int
    lists: DeviceWorkList
    scratch: Tensor
    short: ShortSteps | None = None

    def load(self) -> None:
        """Make the kernel ready to launch, so that the first call does not compile."""
        self._kernel  # noqa: B018

    @cached_property
    def spec(self) -> AttentionPlanSpec:
        return plan_spec(self.params, self.capacity, self.short)

    @cached_property
    def _kernel(self) -> LaunchableKernel:
        return kernel_for(self.spec, self.lists.items.device)

    @cached_property
    def _launch(self) -> RepeatedLaunch:
        return self._kernel.repeated(self.lists.items.device, self.spec.num_blocks)

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """Values of LIST_PARAMS."""
        return self.scratch.data_ptr(), *(tensor.data_ptr() for tensor in self.lists), self.max_tiles

    @cached_property
    def _limits(self) -> tuple[int, ...]:
        capacity = self.capacity
        limits = (capacity.max_q_tokens, capacity.max_q_len, capacity.max_kv_len)
        return tuple(min(limit, _INT32_MAX) for limit in limits)

    def __call__(self, q_indptr: Tensor, kv_lens: Tensor) -> None:
        """Plan int32 ``q_indptr`` [B + 1] and ``kv_lens`` [B] on the lists' device; legal in CUDA-graph capture once
        loaded. A batch beyond the capacity, or with negative lengths, gets no work."""
        launch, given = self._launch, (q_indptr.data_ptr(), kv_lens.data_ptr(), kv_lens.shape[0])
        if launch.packed_for != given:
            launch.pack(*given[:2], *self.outputs, *self._limits, given[2], self.params.window or 0)
            launch.packed_for = given
        launch.launch()


def sharing(q_indptr: Tensor, kv_lens: Tensor, params: PartitionParams) -> PartitionParams:
    """``params`` with as many workers as share the work of these CPU lengths (``num_sharing`` of
    ``fi/attention/work_rows.cuh``); the others have none."""
    if params.max_splits:
        return params
    tiles = partition(q_indptr, kv_lens, replace(params, num_workers=1)).items.astype(np.int64)
    kinds = np.array([(kind.kv_tokens, kind.item_cost, kind.step_cost) for kind in params.kinds], dtype=np.int64)
    kv_tokens, item_cost, step_cost = kinds[tiles[:, COL_KIND]].T
    begin, end = tiles[:, COL_KV_BEGIN], tiles[:, COL_KV_END]
    steps = -(-end // kv_tokens) - begin // kv_tokens
    total = int((item_cost + steps * step_cost).sum())
    least = max(params.kinds[0].item_cost // 3, params.kinds[0].step_cost)
    return replace(params, num_workers=min(max(total // least, 1), params.num_workers))


def fill_on_host(q_indptr: Tensor, kv_lens: Tensor, params: PartitionParams, lists: DeviceWorkList) -> None:
    """Fill ``lists`` in host memory as the kernel would from these CPU lengths; raises as ``partition`` does."""
    work = partition(q_indptr, kv_lens, sharing(q_indptr, kv_lens, params))
    num_items, num_merges = len(work.items), len(work.merges)
    rows = lists.items[:num_items].numpy()
    lengths = q_indptr.numpy(), kv_lens.numpy()
    request = work.items[:, COL_REQUEST]
    rows[:, :RECORD_WIDTH] = work.items
    rows[:, _COL_Q_BEGIN] = lengths[0][request]
    rows[:, _COL_Q_LEN] = lengths[0][request + 1] - lengths[0][request]
    rows[:, _COL_KV_LEN] = lengths[1][request]
    rows[:, _COL_MERGE:] = 0
    rows[:, _COL_MERGE] = -1
    partial = np.flatnonzero(work.items[:, COL_SLOT] != NO_SLOT)
    # Pieces of a tile are neighbours in the list, and merges stand in the order of their tiles.
    tiles = work.items[partial, :COL_KIND]
    begins = np.ones(len(partial), dtype=bool)
    begins[1:] = (tiles[1:] != tiles[:-1]).any(axis=1)
    merge_idx = np.cumsum(begins, dtype=np.int32) - 1
    rows[partial, _COL_MERGE] = merge_idx
    rows[partial, _MERGED] = work.merges[merge_idx, COL_HEAD_SLOT : COL_TAIL_END + 1]
    indptr = np.full(params.num_workers + 1, num_items, dtype=np.int32)
    indptr[: len(work.worker_indptr)] = work.worker_indptr
    lists.worker_indptr.numpy()[:] = indptr
    lists.merges[:num_merges].numpy()[:] = work.merges
    lists.num_merges.fill_(num_merges)
    starts = lists.starts.numpy()
    starts[:] = 0
    starts[:, 0], starts[:, 1] = indptr[:-1], indptr[1:]
    busy = indptr[1:] > indptr[:-1]
    starts[busy, _COL_FIRST_ITEM:] = rows[indptr[:-1][busy]]
