"""Attention whose batches may share prefixes, as a plan's kernel: a list of nodes' and requests' tiles, one launch a call. A
batch without levels is served as if the plan had none, and so are calls with a window, which see few of the shared keys. Where
levels do not pay, as the planner finds on the GPU, the same launch does what the decode kernel would."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from fi_core.prefixes import SharedPrefixes
from fi_core.protocols import AttentionKernel, AttentionState
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from torch import Tensor

from ...entries import MAX_SHORT_QUERY
from ...spec import kernel_for
from ...tensor_map import Box, tensor_map_of
from .boxes import column_maps_of
from .call import CallForm
from .mixed_state import attention_mixed, attention_short
from .prefill_tuning import BOX_ROW_BYTES, WARPGROUP_ROWS, WARPGROUP_WARPS, box_tokens
from .prefix import prefix_spec, prefix_tuning_for
from .prefix_plan import MAX_DEPTH, PrefixLayout, PrefixPlanner, SharingTimes, prefix_plan_spec
from .state import Addressing, Call, DecodeState, address_of, cache_strides_of, near_strides_of, scale_of
from .tuning import memory_gbs, num_processors

_MAX_CALLS = 4096


class PrefixAttention:
    """The ``AttentionKernel`` protocol."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        where = torch.device(device)
        layout = PrefixLayout.of(spec, capacity, prefix_tuning_for(spec, where), num_processors(where))
        return layout.num_bytes + attention_apart.workspace_bytes(spec, capacity, device)

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> PrefixState:
        return PrefixState(spec, capacity, torch.device(device))


class ApartAttention:
    """The ``AttentionKernel`` protocol for what the kernel for levels lacks (RoPE of keys within attention, FP8 queries over K
    and V of another format): requests read all their keys each for itself."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        return _plain_kernel(capacity).workspace_bytes(spec, _plain(capacity), device)

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> ApartState:
        return ApartState(_plain_kernel(capacity).plan(spec, _plain(capacity), device))


class ApartState:
    """The ``AttentionState`` protocol, over the state of a plan without levels."""

    def __init__(self, plain: AttentionState) -> None:
        self._plain = plain

    @property
    def workspace(self) -> Sequence[Tensor]:
        return self._plain.workspace

    def update(self, batch: Batch) -> None:
        self._plain.update(replace(batch, levels=None))

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        self._plain.run(q, kv, layer, out, lse)

    def describe(self) -> Sequence[str]:
        return ("levels are not used: no kernel for them has this plan's features", *self._plain.describe())


def _plain(capacity: Capacity) -> Capacity:
    return replace(capacity, max_prefixes=0)


def _plain_kernel(capacity: Capacity) -> AttentionKernel:
    """What serves plans without levels, by as many new tokens of a request."""
    return attention_short if capacity.max_q_len <= MAX_SHORT_QUERY else attention_mixed


class PrefixState:
    """The ``AttentionState`` protocol."""

    def __init__(self, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._num_workers = num_processors(device)
        self._tuning = tuning = prefix_tuning_for(spec, device)
        self._layout = layout = PrefixLayout.of(spec, capacity, tuning, self._num_workers)
        self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        for region in (layout.header, layout.barrier):
            region.of(self._buffer).zero_()
        self._unshared = _plain_kernel(capacity).plan(spec, _plain(capacity), str(device))
        # Only against decode alone: where the prefill kernel takes part too, its tiles are as long as a node's.
        plain, num_warps = self._unshared, WARPGROUP_WARPS * (1 + tuning.tiles.consumers)
        self._decode: DecodeState | None = None
        if tuning.choose and isinstance(plain, DecodeState) and plain.serves_as(self._num_workers, num_warps):
            self._decode = plain
        beside = self._decode.planner_of(None) if self._decode and None in spec.windows else None
        self._times = SharingTimes.of(spec, memory_gbs(device))
        plan_spec = prefix_plan_spec(
            *(spec, capacity, tuning, self._num_workers), None if beside is None else beside.spec, self._times
        )
        self._planner = PrefixPlanner(plan_spec, capacity, layout, self._buffer, beside)
        self._planner.load()  # compiling and loading would not be legal in a capture
        self._levels: SharedPrefixes | None = None
        self._addressing: Addressing | None = None
        self._calls: dict[tuple[int, int, bool], Call] = {}
        self._box_tokens = box_tokens(spec.page_size, tuning.tiles.tokens)
        self._query_box = Box((1, spec.group_size, BOX_ROW_BYTES // spec.q_dtype.itemsize))

    @property
    def workspace(self) -> Sequence[Tensor]:
        return (self._buffer, *self._unshared.workspace)

    def describe(self) -> Sequence[str]:
        layout, tuning = self._layout, self._tuning.tiles
        rows = tuning.consumers * (WARPGROUP_ROWS // self._spec.group_size * self._spec.group_size)
        return (
            f"with levels, tiles: {rows} rows x {tuning.tokens} KV tokens, taken by {self._num_workers} blocks; at most"
            f" {layout.max_rows} a KV head, of which {layout.max_node_rows} of nodes",
            f"with levels, rows of partial results: {layout.max_parts}; planner: device, one kernel",
            f"with levels, {self._choice}; of the nodes around a request at most {MAX_DEPTH}, the outer ones",
            *(f"without levels, {line}" for line in self._unshared.describe()),
        )

    @property
    def _choice(self) -> str:
        """Which batches use their nodes."""
        if not self._tuning.choose:
            return "nodes are used as they are given"
        tuning = self._tuning
        costs = (tuning.step_cost, tuning.group_cost, tuning.item_cost, tuning.node_item_cost)
        step, group, item, node_item = (cost / 10 for cost in costs)
        clocks = (
            f"nodes are used that pay by the costs in 1000 clocks: {step} a step, {group} more a further warpgroup, {item} a"
            f" tile, {node_item} of a node"
        )
        if self._decode is None:
            return clocks
        times = self._times
        return (
            f"{clocks}; none if the decode kernel's code is through sooner, by {times.levels_ps / 1e6:g} us and"
            f" {times.unit_ps / 1e3:g} ns for 100 clocks against {times.read_ps / 1e3:g} ns for a token read and"
            f" {times.attend_ps / 1e3:g} ns for one attended to"
        )

    def update(self, batch: Batch) -> None:
        """Plan on the device, one launch (and one a window); tensors on the CPU are copied there first."""
        self._levels = batch.levels
        if batch.levels is None:
            self._unshared.update(batch)
            return
        here = _on_device(batch, self._device)
        if any(window is not None for window in self._spec.windows):
            self._unshared.update(here)
        elif self._decode is not None:
            self._decode.take(here)
        self._planner(here)
        before, now = self._addressing, Addressing.of(here, self._device)
        if before is None or (before.has_rows, before.mask_columns) != (now.has_rows, now.mask_columns):
            self._calls.clear()
        self._addressing = now

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        if self._levels is None or layer.window is not None:
            self._unshared.run(q, kv, layer, out, lse)
            return
        addressing = self._addressing
        assert addressing is not None, "the plan calls update first"
        if q.shape[0] == 0:
            return
        call = self._remembered(kv, layer, lse is not None)
        queries = tensor_map_of(q, self._query_box)
        out_token, out_head, _ = out.stride()
        call.kernel.launch(
            self._device,
            self._num_workers,
            1,
            *call.workspace,
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            *addressing.addresses,
            *call.layer_tensors,
            *call.cache,
            q.data_ptr(),
            *call.cache_strides,
            out_token,
            out_head,
            0 if lse is None else lse.stride(0),
            addressing.table_stride,
            *q.stride()[:2],
            *call.numbers,
            queries,
            *call.maps,
        )

    def _remembered(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> Call:
        """What calls with this cache and layer share: found, or made by ``_prepare``."""
        key = (id(kv), id(layer), not with_lse)
        call = self._calls.get(key)
        if call is None or call.kv() is not kv:
            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            call = self._calls[key] = self._prepare(kv, layer, with_lse)
        return call

    def _prepare(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> Call:
        layout, rope = self._layout, layer.rope
        q_scales, q_scale_stride, q_scale = scale_of(layer.q_scale)
        k_scales, k_scale_stride, k_scale = scale_of(kv.k_scale)
        v_scales, v_scale_stride, v_scale = scale_of(kv.v_scale)
        scale = layer.scale * q_scale * k_scale
        assert self._addressing is not None
        maps = None if self._box_tokens is None else column_maps_of(kv, self._box_tokens, BOX_ROW_BYTES)
        form = CallForm(
            lse=with_lse,
            q_scales=q_scales != 0,
            k_scales=k_scales != 0,
            v_scales=v_scales != 0,
            table_row=self._addressing.has_rows,
            mask_columns=self._addressing.mask_columns,
            signed_scale=scale <= 0,
            boxes=maps is not None,
        )
        part = None if self._decode is None else self._decode.part_of(kv, layer, with_lse, maps is not None)
        lists = (layout.rows, layout.tokens, layout.segments)
        written = (layout.header, layout.barrier, layout.parts, layout.part_logs)
        addresses = (region.of(self._buffer).data_ptr() for region in (*lists, *written))
        beside = (0, 0, 0, 0) if part is None else part.workspace
        return Call(
            kv=weakref.ref(kv),
            layer=layer,
            kernel=kernel_for(
                prefix_spec(self._spec, self._tuning, form, None if part is None else part.spec), self._device
            ),
            workspace=(*beside[:2], *addresses, *beside[2:]),
            cache=(kv.k.data_ptr(), kv.v.data_ptr()),
            layer_tensors=(
                *(address_of(layer.sinks), address_of(layer.alibi_slopes)),
                address_of(None if rope is None else rope.inv_freq),
                *(layout.positions.of(self._buffer).data_ptr(), q_scales, k_scales, v_scales),
            ),
            cache_strides=(cache_strides_of if maps else near_strides_of)(kv),
            numbers=(
                *(q_scale_stride, k_scale_stride, v_scale_stride, self._spec.num_kv_heads, 0, layout.max_segments),
                *(scale, layer.soft_cap or 1.0, v_scale, 1.0 if rope is None else rope.config.attention_factor),
            ),
            maps=(*(maps or ()), *(() if part is None else part.maps)),
        )


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its lengths, nodes and order on ``device``."""
    if not batch.kv_lens.is_cpu or device.type == "cpu":
        return batch
    levels = batch.levels
    assert levels is not None
    order = None if levels.order is None else levels.order.to(device)
    nodes = SharedPrefixes(levels.nodes.to(device), order)
    return replace(batch, q_indptr=batch.q_indptr.to(device), kv_lens=batch.kv_lens.to(device), levels=nodes)


attention_prefix = PrefixAttention()
attention_apart = ApartAttention()
"""What the kernel entries load."""
