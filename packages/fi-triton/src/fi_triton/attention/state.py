"""The Triton attention family as a plan's kernel: planning on the host or the device, and the launches of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fi_core.prefixes import SharedPrefixes
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, PackedMask, ResolvedLayer
from fi_scheduler.partition import partition
from torch import Tensor

from ..launch import on_device
from .kernel import attention_kernel
from .levels import LevelCall, LevelLayout, Levels
from .merge import merge_kernel
from .plan_kernel import DeviceWorkList, plan_on_device
from .tuning import block_dim
from .work_lists import TABLE_FORMS, lists_in, merge_grid, work_list_of
from .workspace import Layout

_MASK_FORMS = {"kv": 1, "new": 2}
_MERGED_AT_ONCE = 8
_MERGE_ROWS = 4


class TritonAttention:
    """The ``AttentionKernel`` protocol."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        num_bytes = Layout.of(spec, capacity, torch.device(device)).num_bytes
        if capacity.max_prefixes:
            levels = LevelLayout.of(spec, capacity, torch.device(device))
            num_bytes += levels.num_bytes + levels.nodes.num_bytes
        return num_bytes

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> TritonAttentionState:
        return TritonAttentionState(spec, capacity, torch.device(device))


class TritonAttentionState:
    """The ``AttentionState`` protocol: one buffer with a work list for each distinct window of the spec, and the batch's
    tensors, which the kernels read by address."""

    def __init__(self, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._layout = layout = Layout.of(spec, capacity, device)
        self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        self._lists = lists_in(self._buffer, layout)
        self._partials = layout.partials.of(self._buffer)
        self._partial_lses = layout.partial_lses.of(self._buffer)
        self._no_mask = PackedMask(self._buffer, layout.cuts.of(self._buffer))
        self._levels = Levels(spec, capacity, device) if capacity.max_prefixes else None
        self._batch: Batch | None = None
        self._planner = "not yet updated"

    @property
    def workspace(self) -> Sequence[Tensor]:
        return (self._buffer,) if self._levels is None else (self._buffer, *self._levels.workspace)

    def describe(self) -> Sequence[str]:
        layout, tuning = self._layout, self._layout.tuning
        params = next(iter(layout.params.values()))
        tiles = ", ".join(f"{kind.q_rows} rows x {kind.kv_tokens} KV tokens" for kind in params.kinds)
        split = f"at most {params.max_splits} pieces a tile" if params.max_splits else "equal shares for the workers"
        return (
            f"tiles: {tiles}; {tuning.num_warps} warps, {tuning.num_stages} stages",
            f"work: {params.num_workers} workers, {split}, {len(layout.lists)} work lists",
            f"planner: {self._planner}",
            f"slots for partial results: {layout.bounds.num_slots}, of {tuning.slot_rows} rows each",
            *([] if self._levels is None else [self._levels.describe()]),
        )

    def update(self, batch: Batch) -> None:
        """Plan on the device where the lengths are there, else on the host with one copy of lists and lengths (and one of
        each other tensor of a CPU batch). With shared prefixes a CPU batch is copied and planned on the device."""
        if self._levels is not None:
            if batch.kv_lens.device != self._device:
                lengths = (item.to(self._device, non_blocking=True) for item in (batch.q_indptr, batch.kv_lens))
                batch = _moved(batch, *lengths)
        elif batch.kv_lens.device.type == "cpu":
            self._planner = "host, fi_scheduler.partition"
            self._batch = self._plan_on_host(batch)
            return
        self._batch = batch
        with on_device(self._device):
            lens = batch.kv_lens if self._levels is None else self._levels.update(batch)
            if self._device.type == "cpu":
                self._planner = "host, fi_scheduler.partition"
                self._partition_in(self._buffer, batch.q_indptr, lens)
                return
            self._planner = "device, three kernels" if self._levels is None else "device, eight kernels"
            requests, cuts = self._layout.requests.of(self._buffer), self._layout.cuts.of(self._buffer)
            for window, params in self._layout.params.items():
                plan_on_device(batch.q_indptr, lens, params, requests, cuts, self._lists[window])

    def _partition_in(self, memory: Tensor, q_indptr: Tensor, kv_lens: Tensor) -> None:
        """Write the work list of each window into ``memory``, on the CPU."""
        for window, lists in lists_in(memory, self._layout).items():
            written = partition(q_indptr, kv_lens, self._layout.params[window], out=work_list_of(lists))
            lists.num_merges.fill_(len(written.merges))

    def _plan_on_host(self, batch: Batch) -> Batch:
        layout = self._layout
        on_cpu = self._device.type == "cpu"
        # Pinned memory comes from torch's caching allocator, which reuses a block only after the copy that reads it.
        staging = self._buffer if on_cpu else torch.empty(layout.host_bytes, dtype=torch.uint8, pin_memory=True)
        self._partition_in(staging, batch.q_indptr, batch.kv_lens)
        if on_cpu:
            return batch
        for values, region in ((batch.q_indptr, layout.q_indptr), (batch.kv_lens, layout.kv_lens)):
            region.of(staging)[: values.shape[0]] = values
        self._buffer[: layout.host_bytes].copy_(staging, non_blocking=True)
        q_indptr = layout.q_indptr.of(self._buffer)[: batch.size + 1]
        return _moved(batch, q_indptr, layout.kv_lens.of(self._buffer)[: batch.size])

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        batch = self._batch
        assert batch is not None, "the plan calls update first"
        lists = self._lists[layer.window]
        tuning = self._layout.tuning
        params = self._layout.params[layer.window]
        numbers, strides = _numbers(kv, layer), _strides(q, kv, out, lse, batch)
        with on_device(self._device):
            attention_kernel[(params.num_workers,)](
                *self._pointers(lists, q, kv, out, lse, batch, layer),
                *numbers,
                0 if self._levels is None else self._levels.own_rows,
                *strides,
                tuning.rows,
                tuning.step,
                tuning.big_rows,
                tuning.big_step,
                tuning.num_stages,
                *self._constants(kv, layer, batch, lse),
                num_warps=tuning.num_warps,
                num_stages=tuning.num_stages,
            )
            if self._layout.bounds.max_merges > 0 and params.max_splits != 1:
                self._merge(lists, out, lse, batch, layer)
            if self._levels is not None:
                self._levels.run(LevelCall(q, kv, batch, layer, out, lse, numbers, (*strides[:8], *strides[11:])))

    def _pointers(
        self,
        lists: DeviceWorkList,
        q: Tensor,
        kv: KVCache,
        out: Tensor,
        lse: Tensor | None,
        batch: Batch,
        layer: ResolvedLayer,
    ) -> tuple[Tensor, ...]:
        """The kernel's tensors in order; an absent one is replaced by one of its type that the kernel then never reads."""
        k, v = kv.typed()
        ints, floats = lists.worker_indptr, self._partial_lses
        mask = batch.mask or self._no_mask
        indptr = batch.table_indptr if batch.table_indptr is not None else batch.kv_indptr
        return (
            ints,
            lists.items,
            q,
            k,
            v,
            out,
            floats if lse is None else lse,
            self._partials,
            floats,
            batch.q_indptr,
            batch.kv_lens,
            ints if batch.table is None else batch.table,
            ints if batch.table_row is None else batch.table_row,
            ints if indptr is None else indptr,
            mask.bits,
            mask.indptr,
            floats if layer.sinks is None else layer.sinks,
            floats if layer.alibi_slopes is None else layer.alibi_slopes,
            kv.k_scale if isinstance(kv.k_scale, Tensor) else floats,
            kv.v_scale if isinstance(kv.v_scale, Tensor) else floats,
            *self._state_tensors(),
        )

    def _state_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each request's own part begins, and where the results of such parts go."""
        levels = self._levels
        if levels is None:
            return self._lists[next(iter(self._lists))].num_merges, self._partials, self._partial_lses
        return levels.own_begins, levels.states, levels.state_lses

    def _constants(self, kv: KVCache, layer: ResolvedLayer, batch: Batch, lse: Tensor | None) -> tuple[Any, ...]:
        spec = self._spec
        dim_vo = spec.head_dim_vo or 0
        return (
            spec.group_size,
            spec.head_dim,
            block_dim(spec.head_dim),
            dim_vo,
            block_dim(dim_vo),
            spec.page_size or 0,
            TABLE_FORMS[spec.table],
            batch.table_row is not None,
            spec.causal,
            layer.window is not None,
            layer.soft_cap is not None,
            layer.alibi_slopes is not None,
            layer.sinks is not None,
            0 if batch.mask is None else _MASK_FORMS[batch.mask.columns],
            lse is not None,
            isinstance(kv.k_scale, Tensor),
            isinstance(kv.v_scale, Tensor),
            self._levels is not None,
            spec.num_qo_heads,
        )

    def _merge(
        self, lists: DeviceWorkList, out: Tensor, lse: Tensor | None, batch: Batch, layer: ResolvedLayer
    ) -> None:
        tuning, spec = self._layout.tuning, self._spec
        dim_vo = spec.head_dim_vo or 0
        merge_kernel[merge_grid(self._layout.bounds)](
            lists.merges,
            lists.num_merges,
            out,
            self._partial_lses if lse is None else lse,
            self._partials,
            self._partial_lses,
            batch.q_indptr,
            self._partial_lses if layer.sinks is None else layer.sinks,
            *self._state_tensors(),
            out.stride(0),
            out.stride(1),
            0 if lse is None else lse.stride(0),
            0 if self._levels is None else self._levels.own_rows,
            tuning.rows,
            tuning.big_rows,
            _MERGE_ROWS,
            _MERGED_AT_ONCE,
            spec.group_size,
            dim_vo,
            block_dim(dim_vo),
            layer.sinks is not None,
            lse is not None,
            self._levels is not None,
            spec.num_qo_heads,
            num_warps=4,
        )


def _moved(batch: Batch, q_indptr: Tensor, kv_lens: Tensor) -> Batch:
    """A CPU batch with these device lengths and its other tensors on their device."""
    device = q_indptr.device

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    mask, levels = batch.mask, batch.levels
    if mask is not None:
        bits, indptr = (item.to(device, non_blocking=True) for item in (mask.bits, mask.indptr))
        mask = PackedMask(bits, indptr, mask.columns)
    if levels is not None:
        levels = SharedPrefixes(levels.nodes.to(device, non_blocking=True), move(levels.order))
    table, table_row = move(batch.table), move(batch.table_row)
    indptrs = (move(batch.table_indptr), move(batch.kv_indptr))
    return Batch(q_indptr, kv_lens, table, table_row, *indptrs, None, mask, levels)


def _numbers(kv: KVCache, layer: ResolvedLayer) -> tuple[float | int, ...]:
    """softmax scale, soft cap, value scale, window: scales given as numbers are folded in here, tensors in the kernel."""
    k_scale = 1.0 if kv.k_scale is None or isinstance(kv.k_scale, Tensor) else kv.k_scale
    v_scale = 1.0 if kv.v_scale is None or isinstance(kv.v_scale, Tensor) else kv.v_scale
    return layer.scale * k_scale, layer.soft_cap or 1.0, v_scale, layer.window or 0


def _strides(q: Tensor, kv: KVCache, out: Tensor, lse: Tensor | None, batch: Batch) -> tuple[int, ...]:
    strides = [q.stride(0), q.stride(1)]
    for cache in kv.as_nhd():
        page_stride = cache.stride(0) if kv.is_paged else 0
        strides += [page_stride, cache.stride(-3), cache.stride(-2)]
    strides += [out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0)]
    strides.append(0 if batch.table is None else batch.table.stride(0))
    strides += [int(isinstance(scale, Tensor) and scale.numel() > 1) for scale in (kv.k_scale, kv.v_scale)]
    return tuple(strides)


def load_kernel() -> TritonAttention:
    """What the kernel entry loads."""
    return TritonAttention()
