"""Shared prefixes: specs of ``fi/kernels/attention_prefix.cuh`` and ``attention_prefix_plan.cuh``, the plan's memory and its
planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from fi_core.contract import target_of
from fi_core.errors import ArgumentError, CapacityError
from fi_core.records import AttentionSpec, Batch, Capacity
from fi_core.registry import registry
from fi_scheduler.regions import Region, RegionBuilder
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import KernelSpec, join_constants, kernel_for
from .call import STRIDE_PARAMS, TENSOR_PARAMS, CallForm
from .plan import ITEM_WIDTH
from .prefill import PrefillSpec, prefill_fields
from .prefill_tuning import WARPGROUP_ROWS, PrefillTuning, box_tokens, built_in_prefill_tuning, prefill_tuning_for

TUNED_OP = "attention_prefix"
"""What ``fi_tuning`` is asked for."""

MAX_PREFIXES = 4096
"""Nodes that a plan may be made for: one block compares each with those before it."""
MAX_DEPTH = 31
"""Nodes around one request: a lane of a warp reads each part's place."""

_NODE_WIDTH, _REQUEST_WIDTH, _SEGMENT_WIDTH, _HEADER_WIDTH = 12, 8, 4, 4
_PLAN_THREADS = 512
_TABLE_SIZES = ((64, 256), (256, 256), (1024, 1024))
"""(nodes, requests) that tables in shared memory hold; for more they lie in global memory."""
_INT32_MAX = 2**31 - 1
_PIECES_OF_WORKER = 3
"""Further pieces of nodes and of requests' own keys, for each worker: more are not made."""


@dataclass(frozen=True)
class PrefixTuning:
    """``tiles`` as of prefill; ``slices``: warpgroups that share the keys of a step where one has all rows of a request's tile
    (1, or all of them where steps neither overlap nor take turns). What planning counts with, in hundreds of clocks of a
    multiprocessor: a tile of a request's own keys, a tile of a node (whose rows pass through memory as parts), a step of one
    warpgroup's rows, those of a further one, a step whose keys are shared."""

    tiles: PrefillTuning
    slices: int = 1
    item_cost: int = 15
    node_item_cost: int = 40
    step_cost: int = 20
    group_cost: int = 6
    slice_cost: int = 10

    def __post_init__(self) -> None:
        allowed = (1,) if self.tiles.overlap or self.tiles.ping_pong else (1, self.tiles.consumers)
        if self.slices not in allowed:
            raise ArgumentError("tuning.slices", f"one of {allowed}", self.slices)
        for name in ("item_cost", "node_item_cost", "step_cost", "group_cost", "slice_cost"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < (name != "group_cost"):
                raise ArgumentError(f"tuning.{name}", "an int above 0", getattr(self, name))


def prefix_tuning_for(spec: AttentionSpec, device: torch.device) -> PrefixTuning:
    """The parameters for a plan: the prefill kernel's tiles, and what ``fi_tuning`` returns for "attention_prefix". Raises
    ArgumentError for unknown names or values."""
    built_in = PrefixTuning(prefill_tuning_for(_as_copied(spec), device))
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    names = [item.name for item in fields(PrefixTuning)][1:]
    unknown = set(given or ()) - set(names)
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
    return replace(built_in, **given) if given else built_in


def built_in_prefix_tuning(spec: AttentionSpec) -> PrefixTuning:
    """The same without overrides, for Hopper."""
    return PrefixTuning(built_in_prefill_tuning(_as_copied(spec)))


def _as_copied(spec: AttentionSpec) -> AttentionSpec:
    """FP8 K and V are copied row by row and made wider on the way, whatever prefill does with them."""
    return replace(spec, page_size=1) if spec.kv_is_fp8 else spec


@dataclass(frozen=True)
class PrefixSpec(PrefillSpec):
    """A prefill kernel whose tiles are nodes' and requests' (``levels``); ``slices`` as in PrefixTuning."""

    slices: int = 1

    stem: ClassVar = "attention_prefix"
    cooperative: ClassVar = True  # rows are merged once every block has left its parts
    layout: ClassVar = ParamsLayout(
        (
            ("k", "pointer"),
            ("v", "pointer"),
            ("rows", "pointer"),
            ("tokens", "pointer"),
            ("segments", "pointer"),
            ("header", "output"),
            ("barrier", "output"),
            ("partials", "output"),
            ("partial_rows", "output"),
            *TENSOR_PARAMS,
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            *STRIDE_PARAMS,
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("num_kv_heads", "int32"),
            ("window", "int32"),
            ("max_segments", "int32"),
            ("scale", "float"),
            ("soft_cap", "float"),
            ("v_scale", "float"),
        )
    )

    def config_lines(self) -> list[str]:
        """As ever, the slices beside the other numbers, so that the text stays short."""
        slices = f"static constexpr int kSlices = {self.slices};"
        return join_constants([slices, *(line for line in super().config_lines() if line != slices)])


@dataclass(frozen=True)
class BoxPrefixSpec(PrefixSpec):
    """The same with K and V copied as boxes of tensor maps."""

    tensor_maps: ClassVar = ("queries", "keys", "values")


def prefix_spec(spec: AttentionSpec, tuning: PrefixTuning, form: CallForm) -> PrefixSpec:
    """The kernel of a call."""
    kind = BoxPrefixSpec if form.boxes else PrefixSpec
    tiles = replace(tuning.tiles, copy_order="keys ahead", pieces=1)  # as its loader works
    return kind(**prefill_fields(spec, tiles, form), levels=True, slices=tuning.slices)


def table_bytes(num_nodes: int, num_requests: int) -> int:
    """Bytes of the tables of ``fi/attention/prefix_plan.cuh``."""
    return 4 * (_NODE_WIDTH * num_nodes + _REQUEST_WIDTH * num_requests + 2 * (num_requests + 1))


@dataclass(frozen=True)
class PrefixPlanSpec(KernelSpec):
    """The planning kernel: nodes and requests that its tables in shared memory hold (0: they lie in global memory), tokens of
    a q tile and of a warpgroup, warpgroups, keys a step, what a piece's first key is a multiple of, all KV heads, workers,
    slices and costs as in PrefixTuning."""

    shared_nodes: int
    shared_requests: int
    tile_tokens: int
    group_tokens: int
    consumers: int
    group_size: int
    tokens: int
    align: int
    causal: bool
    heads: int
    workers: int
    item_cost: int
    node_item_cost: int
    step_cost: int
    group_cost: int
    slices: int
    slice_cost: int

    stem: ClassVar = "attention_prefix_plan"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("q_indptr", "pointer"),
            ("kv_lens", "pointer"),
            ("nodes", "pointer"),
            ("order", "pointer"),
            ("rows", "output"),
            ("header", "output"),
            ("tokens", "output"),
            ("segments", "output"),
            ("scratch", "output"),
            ("max_rows", "int32"),
            ("max_parts", "int32"),
            ("max_node_rows", "int32"),
            ("max_node_tokens", "int32"),
            ("max_segments", "int32"),
            ("max_q_tokens", "int32"),
            ("max_q_len", "int32"),
            ("max_kv_len", "int32"),
            ("num_requests", "int32"),
            ("num_nodes", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return _PLAN_THREADS

    @property
    def shared_bytes(self) -> int:
        return table_bytes(self.shared_nodes, self.shared_requests) if self.shared_requests else 0

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1


def prefix_plan_spec(spec: AttentionSpec, capacity: Capacity, tuning: PrefixTuning, workers: int) -> PrefixPlanSpec:
    """The kernel that plans batches of ``spec`` within ``capacity`` for ``workers`` blocks."""
    tiles, group_tokens = tuning.tiles, WARPGROUP_ROWS // spec.group_size
    sizes = (capacity.max_prefixes, capacity.max_batch)
    held = next((size for size in _TABLE_SIZES if all(map(int.__le__, sizes, size))), (0, 0))
    return PrefixPlanSpec(
        shared_nodes=held[0],
        shared_requests=held[1],
        tile_tokens=tiles.consumers * group_tokens,
        group_tokens=group_tokens,
        consumers=tiles.consumers,
        group_size=spec.group_size,
        tokens=tiles.tokens,
        align=box_tokens(spec.page_size, tiles.tokens) or 1,
        causal=spec.causal,
        heads=spec.num_kv_heads,
        workers=workers,
        item_cost=tuning.item_cost,
        node_item_cost=tuning.node_item_cost,
        step_cost=tuning.step_cost,
        group_cost=tuning.group_cost,
        slices=tuning.slices,
        slice_cost=tuning.slice_cost,
    )


@dataclass(frozen=True)
class PrefixLayout:
    """Regions of the buffer of a plan with shared prefixes, laid out from capacities alone.

    ``max_node_rows`` and ``max_node_tokens`` bound rows of the list and query tokens of nodes, each piece counted;
    ``partials`` [parts, head_dim_vo] and ``partial_rows`` [parts] hold normalised rows and their log-sum-exps in base 2.
    """

    max_rows: int
    max_parts: int
    max_node_rows: int
    max_node_tokens: int
    max_segments: int
    rows: Region
    header: Region
    barrier: Region
    tokens: Region
    segments: Region
    scratch: Region
    partials: Region
    partial_rows: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, tuning: PrefixTuning, workers: int) -> PrefixLayout:
        """Raises CapacityError for more nodes or tokens than planning counts."""
        depth = min(capacity.max_prefixes, capacity.max_prefix_depth)
        for name, limit in (("max_prefixes", MAX_PREFIXES), ("max_prefix_depth", MAX_DEPTH)):
            actual = depth if name == "max_prefix_depth" else capacity.max_prefixes
            if actual > limit:
                raise CapacityError(name, f"at most {limit}", actual)
        heads, tile = spec.num_qo_heads, tuning.tiles.consumers * (WARPGROUP_ROWS // spec.group_size)
        sharing = min(capacity.max_q_tokens, capacity.max_batch * min(tile, capacity.max_q_len))
        # A tile of each request that has a part of one, and further ones.
        tiles = min(capacity.max_batch, capacity.max_q_tokens) + capacity.max_q_tokens // tile
        pieces = -(-_PIECES_OF_WORKER * workers // spec.num_kv_heads)
        max_node_rows = capacity.max_prefixes + depth * -(-sharing // tile) + pieces
        max_node_tokens = depth * sharing + pieces * tile
        own_tokens = (sharing + pieces * min(tile, capacity.max_q_len)) * tuning.slices
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
            max_segments=depth + 1,
            rows=build.add((max_rows, ITEM_WIDTH), ints),
            header=build.add((_HEADER_WIDTH,), ints),
            barrier=build.add((1,), ints),
            tokens=build.add((capacity.max_q_tokens,), ints),
            segments=build.add((capacity.max_q_tokens, depth + 1, _SEGMENT_WIDTH), ints),
            scratch=build.add((table_bytes(capacity.max_prefixes, capacity.max_batch),), torch.uint8),
            partials=build.add((max_parts, spec.head_dim_vo or 0), torch.float32),
            partial_rows=build.add((max_parts,), torch.float32),
            num_bytes=build.end,
        )


@dataclass(frozen=True)
class PrefixPlanner:
    """One launch that fills the list in ``buffer`` for batches within ``capacity``."""

    spec: PrefixPlanSpec
    capacity: Capacity
    layout: PrefixLayout
    buffer: Tensor

    def load(self) -> None:
        """Make the kernel ready to launch, so that the first call does not compile."""
        self._kernel  # noqa: B018

    @cached_property
    def _kernel(self) -> LaunchableKernel:
        return kernel_for(self.spec, self.buffer.device)

    @cached_property
    def _outputs(self) -> tuple[int, ...]:
        layout = self.layout
        regions = (layout.rows, layout.header, layout.tokens, layout.segments, layout.scratch)
        return tuple(region.of(self.buffer).data_ptr() for region in regions)

    @cached_property
    def _limits(self) -> tuple[int, ...]:
        layout, capacity = self.layout, self.capacity
        own = (layout.max_rows, layout.max_parts, layout.max_node_rows, layout.max_node_tokens, layout.max_segments)
        limits = (capacity.max_q_tokens, capacity.max_q_len, capacity.max_kv_len)
        return *own, *(min(limit, _INT32_MAX) for limit in limits)

    def __call__(self, batch: Batch) -> None:
        """Plan a batch with levels whose tensors are on the buffer's device; legal in CUDA-graph capture once loaded. A batch
        beyond the capacity, or with negative lengths, gets no work."""
        levels = batch.levels
        assert levels is not None
        self._kernel.launch(
            self.buffer.device,
            1,
            1,
            batch.q_indptr.data_ptr(),
            batch.kv_lens.data_ptr(),
            levels.nodes.data_ptr(),
            0 if levels.order is None else levels.order.data_ptr(),
            *self._outputs,
            *self._limits,
            batch.size,
            levels.nodes.shape[0],
        )
