"""Planning of shared prefixes: spec of ``fi/kernels/attention_prefix_plan.cuh``, the plan's memory and its planner."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import torch
from fi_core.errors import CapacityError
from fi_core.records import AttentionSpec, Batch, Capacity
from fi_scheduler.regions import Region, RegionBuilder
from torch import Tensor

from ...launch import LaunchableKernel, RepeatedLaunch
from ...params import ParamsLayout
from ...source import KernelSource
from ...spec import KernelSpec, join_constants, kernel_for
from .plan import ITEM_WIDTH, LIMIT_PARAMS, LIST_PARAMS, AttentionPlanSpec, DevicePlanner
from .prefill_tuning import WARPGROUP_ROWS, box_tokens
from .prefix import PrefixTuning
from .tuning import HOPPER_MEMORY_GBS

MAX_PREFIXES = 4096
"""Nodes that a plan may be made for: one block compares each with those before it."""
MAX_DEPTH = 31
"""Nodes around one request that are used, the outer ones: a lane of a warp reads each part's place."""

_NODE_WIDTH, _PLACE_WIDTH, _SEGMENT_WIDTH, _HEADER_WIDTH = 16, 12, 4, 4
_TABLE_SIZES = ((64, 64, 128), (64, 256, 256), (256, 256, 256), (1024, 1024, 512))
"""(nodes, requests) that tables in shared memory hold, and threads a block: few, as every warp runs every instruction. For more
the tables lie in global memory."""
_THREADS_FOR_MORE = 512
_LEAST_SHARING_TOKENS = 4096
"""Query tokens of nodes, each level counted, for which there is room however large the plan."""
_INT32_MAX = 2**31 - 1
# See SharingTimes; the rest of a call takes 12 us on either side.
_UNIT_PS, _LEVELS_PS, _UNSHARED = 91_000, 9_500_000, 1.07
_READ_SHARE, _ATTEND_GBS, _PRODUCTS_A_NS, _REUSE_BYTES = 0.92, 9154, 450_000, 120_000_000
_PIECES_OF_WORKER = 3
"""Further pieces of nodes and of requests' own keys, for each worker: more are not made."""


@dataclass(frozen=True)
class SharingTimes:
    """By what the planner compares its list with the decode kernel, in picoseconds: a hundred clocks of the list's schedule as
    they were measured (``unit_ps``), what a call with levels takes more than one without (``levels_ps``); without levels a
    token of K and V read from memory (``read_ps``) or attended to (``attend_ps``, or ``pair_ps`` for each query token). Of
    ``reuse_tokens`` shared tokens requests find in the L2 what others have read. docs/kernels/shared_prefix.md has the fit."""

    unit_ps: int
    levels_ps: int
    read_ps: int
    attend_ps: int
    pair_ps: int
    reuse_tokens: int

    @classmethod
    def of(cls, spec: AttentionSpec, memory_gbs: float = HOPPER_MEMORY_GBS) -> SharingTimes:
        """For a device whose memory has ``memory_gbs`` GB/s."""
        dims = spec.head_dim + (spec.head_dim_vo or 0)
        token_bytes = spec.num_kv_heads * dims * spec.kv_dtype.itemsize

        def ps(amount: float, per_ns: float) -> int:
            return max(round(1000 * amount / per_ns), 1)

        return cls(
            unit_ps=_UNIT_PS,
            levels_ps=_LEVELS_PS,
            read_ps=ps(_UNSHARED * token_bytes, _READ_SHARE * memory_gbs),
            attend_ps=ps(_UNSHARED * token_bytes, _ATTEND_GBS),
            pair_ps=ps(2 * dims * spec.num_qo_heads, _PRODUCTS_A_NS),
            reuse_tokens=min(_REUSE_BYTES // token_bytes, _INT32_MAX),
        )


def table_bytes(num_nodes: int, num_requests: int) -> int:
    """Bytes of the tables of ``fi/attention/prefix_plan.cuh``."""
    return 4 * ((_NODE_WIDTH + 1) * num_nodes + _PLACE_WIDTH * (num_requests + 1) + num_requests)


_PREFIX_PARAMS = (
    ("q_indptr", "pointer"),
    ("kv_lens", "pointer"),
    ("nodes", "pointer"),
    ("order", "pointer"),
    ("rows", "output"),
    ("header", "output"),
    ("tokens", "output"),
    ("positions", "output"),
    ("segments", "output"),
    ("tables", "output"),
    ("max_rows", "int32"),
    ("max_parts", "int32"),
    ("max_node_rows", "int32"),
    ("max_node_tokens", "int32"),
    ("max_sharing_tokens", "int32"),
    ("max_segments", "int32"),
    ("num_nodes", "int32"),
)


@dataclass(frozen=True)
class PrefixPlanSpec(KernelSpec):
    """The planning kernel: nodes and requests that its tables in shared memory hold (0: they lie in global memory), tokens of
    a q tile and of a warpgroup, warpgroups, keys a step, what a piece's first key is a multiple of, all KV heads, workers,
    costs and choice as in PrefixTuning; ``bounded``: more tokens may share than there is
    room for."""

    table_nodes: int
    table_requests: int
    threads: int
    query_tokens: int
    group_tokens: int
    consumers: int
    group_size: int
    tokens: int
    align: int
    causal: bool
    heads: int
    workers: int
    bounded: bool
    choose: bool
    item_cost: int
    node_item_cost: int
    step_cost: int
    group_cost: int
    times: SharingTimes

    stem: ClassVar = "attention_prefix_plan"
    overlapping: ClassVar = True
    include_folders: ClassVar = AttentionPlanSpec.include_folders
    layout: ClassVar = ParamsLayout((*_PREFIX_PARAMS, *LIMIT_PARAMS))

    @property
    def num_threads(self) -> int:
        return self.threads

    @property
    def shared_bytes(self) -> int:
        return table_bytes(self.table_nodes, self.table_requests) if self.table_requests else 0

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    @property
    def num_blocks(self) -> int:
        return 1

    def config_lines(self) -> list[str]:
        """As ever, in few lines."""
        return join_constants(super().config_lines()) + self._decode_lines()

    def _decode_lines(self) -> list[str]:
        """Those of the decode kernel's plan."""
        return ["static constexpr bool kYields = false;"]


@dataclass(frozen=True)
class YieldingPlanSpec(PrefixPlanSpec):
    """The same with the plan of the decode kernel, which gets the batch if it is through sooner; made by other blocks."""

    decode: AttentionPlanSpec

    layout: ClassVar = ParamsLayout((*_PREFIX_PARAMS, *LIST_PARAMS, *LIMIT_PARAMS))

    @property
    def num_blocks(self) -> int:
        return self.decode.num_blocks + 1

    @property
    def shared_bytes(self) -> int:
        return max(super().shared_bytes, self.decode.shared_bytes)

    def source(self) -> KernelSource:
        return self.decode.with_count_type(super().source())

    def _decode_lines(self) -> list[str]:
        lines = [line for line in self.decode.config_lines() if " kNumThreads = " not in line]
        return ["static constexpr bool kYields = true;", *lines]


def prefix_plan_spec(
    spec: AttentionSpec,
    capacity: Capacity,
    tuning: PrefixTuning,
    workers: int,
    decode: AttentionPlanSpec | None = None,
    times: SharingTimes | None = None,
) -> PrefixPlanSpec:
    """The kernel that plans batches of ``spec`` within ``capacity`` for ``workers`` blocks, and with ``decode`` also the decode
    kernel's lists; ``times`` as on a Hopper GPU if not given."""
    tiles, group_tokens = tuning.tiles, WARPGROUP_ROWS // spec.group_size
    sizes = (capacity.max_prefixes, capacity.max_batch)
    fitting = (size for size in _TABLE_SIZES if all(map(int.__le__, sizes, size[:2])))
    table_nodes, table_requests, threads = next(fitting, (0, 0, _THREADS_FOR_MORE))
    made = PrefixPlanSpec(
        table_nodes=table_nodes,
        table_requests=table_requests,
        threads=threads,
        query_tokens=tiles.consumers * group_tokens,
        group_tokens=group_tokens,
        consumers=tiles.consumers,
        group_size=spec.group_size,
        tokens=tiles.tokens,
        align=box_tokens(spec.page_size, tiles.tokens) or 1,
        causal=spec.causal,
        heads=spec.num_kv_heads,
        workers=workers,
        bounded=_node_tokens(spec, capacity, tuning)[1],
        choose=tuning.choose,
        item_cost=tuning.item_cost,
        node_item_cost=tuning.node_item_cost,
        step_cost=tuning.step_cost,
        group_cost=tuning.group_cost,
        times=times or SharingTimes.of(spec),
    )
    if decode is None:
        return made
    given = {item.name: getattr(made, item.name) for item in fields(made)}
    return YieldingPlanSpec(**given, decode=replace(decode, threads=threads))


def _sharing_tokens(spec: AttentionSpec, capacity: Capacity, tuning: PrefixTuning) -> int:
    """Query tokens of a batch that may take part."""
    tile = tuning.tiles.consumers * (WARPGROUP_ROWS // spec.group_size)
    return min(capacity.max_q_tokens, capacity.max_batch * min(tile, capacity.max_q_len))


def _depth(capacity: Capacity) -> int:
    """Nodes around one request that are used."""
    return min(capacity.max_prefixes, capacity.max_prefix_depth, MAX_DEPTH)


def _node_tokens(spec: AttentionSpec, capacity: Capacity, tuning: PrefixTuning) -> tuple[int, bool]:
    """Query tokens of nodes, each level counted, for which there is room; and whether there may be more, which then share
    nothing. (They would be in requests of many new tokens, which gain least, and their parts take memory.)"""
    depth = _depth(capacity)
    most = depth * _sharing_tokens(spec, capacity, tuning)
    room = max(_LEAST_SHARING_TOKENS, depth * capacity.max_batch)
    return min(most, room), most > room


@dataclass(frozen=True)
class PrefixLayout:
    """Regions of the buffer of a plan with shared prefixes, laid out from capacities alone.

    ``max_node_rows`` and ``max_node_tokens`` bound rows of the list and query tokens of nodes, each piece counted, and
    ``max_sharing_tokens`` the tokens without their pieces;
    ``parts`` [parts, head_dim_vo] and ``part_logs`` [parts] hold normalised rows and their log-sum-exps in base 2.
    """

    max_rows: int
    max_parts: int
    max_node_rows: int
    max_node_tokens: int
    max_sharing_tokens: int
    max_segments: int
    rows: Region
    header: Region
    barrier: Region
    tokens: Region
    positions: Region
    segments: Region
    tables: Region
    parts: Region
    part_logs: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, tuning: PrefixTuning, workers: int) -> PrefixLayout:
        """Raises CapacityError for more nodes or tokens than planning counts."""
        depth = _depth(capacity)
        if capacity.max_prefixes > MAX_PREFIXES:
            raise CapacityError("max_prefixes", f"at most {MAX_PREFIXES}", capacity.max_prefixes)
        heads, tile = spec.num_qo_heads, tuning.tiles.consumers * (WARPGROUP_ROWS // spec.group_size)
        in_nodes, _ = _node_tokens(spec, capacity, tuning)
        sharing = min(_sharing_tokens(spec, capacity, tuning), in_nodes)
        # A tile of each request that has a part of one, and further ones.
        tiles = min(capacity.max_batch, capacity.max_q_tokens) + capacity.max_q_tokens // tile
        pieces = -(-_PIECES_OF_WORKER * workers // spec.num_kv_heads)
        max_node_rows = capacity.max_prefixes + -(-in_nodes // tile) + pieces
        max_node_tokens = in_nodes + pieces * tile
        own_tokens = sharing + pieces * min(tile, capacity.max_q_len)
        max_parts = (max_node_tokens + own_tokens) * heads
        if max_parts > _INT32_MAX:
            raise CapacityError("max_q_tokens", "parts whose number 32 bits hold", max_parts)
        max_rows = max_node_rows + tiles + pieces
        build = RegionBuilder()
        ints = torch.int32
        return cls(
            max_rows=max_rows,
            max_parts=max_parts,
            max_node_rows=max_node_rows,
            max_node_tokens=max_node_tokens,
            max_sharing_tokens=in_nodes,
            max_segments=depth + 1,
            rows=build.add((max_rows, ITEM_WIDTH), ints),
            header=build.add((_HEADER_WIDTH,), ints),
            barrier=build.add((1,), ints),
            tokens=build.add((capacity.max_q_tokens,), ints),
            positions=build.add((capacity.max_q_tokens,), ints),
            segments=build.add((capacity.max_q_tokens, depth + 1, _SEGMENT_WIDTH), ints),
            tables=build.add((table_bytes(capacity.max_prefixes, capacity.max_batch),), torch.uint8),
            parts=build.add((max_parts, spec.head_dim_vo or 0), torch.float32),
            part_logs=build.add((max_parts,), torch.float32),
            num_bytes=build.end,
        )


@dataclass(frozen=True)
class PrefixPlanner:
    """One launch that fills the list in ``buffer`` for batches within ``capacity``, and the lists of ``decode`` if its kernel may
    get the batch instead."""

    spec: PrefixPlanSpec
    capacity: Capacity
    layout: PrefixLayout
    buffer: Tensor
    decode: DevicePlanner | None = None

    def load(self) -> None:
        """Make the kernel ready to launch, so that the first call does not compile."""
        self._kernel  # noqa: B018

    @cached_property
    def _kernel(self) -> LaunchableKernel:
        return kernel_for(self.spec, self.buffer.device)

    @cached_property
    def _launch(self) -> RepeatedLaunch:
        return self._kernel.repeated(self.buffer.device, self.spec.num_blocks)

    @cached_property
    def _outputs(self) -> tuple[int, ...]:
        layout = self.layout
        regions = (layout.rows, layout.header, layout.tokens, layout.positions, layout.segments, layout.tables)
        limits = (layout.max_rows, layout.max_parts, layout.max_node_rows, layout.max_node_tokens)
        addresses = (region.of(self.buffer).data_ptr() for region in regions)
        return *addresses, *limits, layout.max_sharing_tokens, layout.max_segments

    @cached_property
    def _limits(self) -> tuple[int, ...]:
        capacity = self.capacity
        limits = (capacity.max_q_tokens, capacity.max_q_len, capacity.max_kv_len)
        return *(() if self.decode is None else self.decode.outputs), *(min(limit, _INT32_MAX) for limit in limits)

    def __call__(self, batch: Batch) -> None:
        """Plan a batch with levels whose tensors are on the buffer's device; legal in CUDA-graph capture once loaded. A batch
        beyond the capacity, or with negative lengths, gets no work."""
        levels = batch.levels
        assert levels is not None
        tensors = (batch.q_indptr, batch.kv_lens, levels.nodes)
        addresses = (*(tensor.data_ptr() for tensor in tensors), 0 if levels.order is None else levels.order.data_ptr())
        launch, given = self._launch, (*addresses, batch.size, levels.nodes.shape[0])
        if launch.packed_for != given:
            launch.pack(*addresses, *self._outputs, given[-1], *self._limits, batch.size, 0)
            launch.packed_for = given
        launch.launch()
