"""Attention of long queries as a plan's kernel: one launch a call, with tensor maps of Q, K and V."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from torch import Tensor

from ...params import TensorMap
from ...spec import kernel_for
from ...tensor_map import Box, tensor_map_of
from .boxes import column_maps_of
from .call import CallForm
from .layout import Layout
from .order import OrderPlanner, fill_order_on_host, has_fast_memory, order_spec
from .plan import NO_STEPS, ShortSteps
from .prefill import prefill_spec
from .prefill_tuning import BOX_ROW_BYTES, WARPGROUP_ROWS, PrefillTuning, box_tokens, run_tokens
from .state import Call, ListState, address_of, cache_strides_of, near_strides_of, scale_of
from .tuning import memory_gbs


class PrefillAttention:
    """The ``AttentionKernel`` protocol."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        return Layout.of_prefill(spec, capacity, torch.device(device)).num_bytes

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> PrefillState:
        return PrefillState(spec, capacity, torch.device(device))


class PrefillState(ListState):
    """Attention of long queries, and of batches in which some are short. Steps that ``left_to_decode``
    holds get no work: a decode kernel that each call follows has it."""

    def __init__(
        self,
        spec: AttentionSpec,
        capacity: Capacity,
        device: torch.device,
        left_to_decode: ShortSteps = NO_STEPS,
    ) -> None:
        super().__init__(spec, capacity, device, Layout.of_prefill(spec, capacity, device))
        assert isinstance(self._layout.tuning, PrefillTuning)
        self._tuning = self._layout.tuning
        self._left_to_decode = left_to_decode
        params = self._layout.params
        self._orders = {window: regions.of(self._buffer) for window, regions in self._layout.orders.items()}
        fast = has_fast_memory(spec, self._tuning, memory_gbs(device))
        self._order_specs = {
            window: order_spec(params[window], capacity, self._tuning, spec.page_size, left_to_decode, fast)
            for window in self._orders
        }
        for order in self._orders.values():
            order.header.zero_()
        self._layout.dense_records.of(self._buffer).zero_()
        if not spec.batch_invariant:  # whose tiles are split by their own length alone
            for window, order in self._orders.items():
                planner = OrderPlanner(self._order_specs[window], capacity, window, order)
                planner.load()
                self._planners.append(planner)
        lands = self._tuning.landing_stages > 0
        by_boxes = lands or spec.kv_dtype == spec.q_dtype
        self._box_tokens = box_tokens(spec.page_size, self._tuning.tokens) if by_boxes else None
        self._run_tokens = run_tokens(spec, self._tuning)
        elements = BOX_ROW_BYTES // spec.q_dtype.itemsize
        self._query_box = Box((WARPGROUP_ROWS // spec.group_size, spec.group_size, elements))

    def describe(self) -> Sequence[str]:
        layout, tuning = self._layout, self._tuning
        params = layout.params[self._spec.windows[0]]
        split = f"at most {params.max_splits} pieces a tile" if params.max_splits else "equal shares for the workers"
        turns = "in turns" if tuning.ping_pong else "at will"
        loader = "rows by a warpgroup"
        if self._box_tokens is not None:
            changed = ", changed in shared memory" if tuning.landing_stages else ""
            boxes = f"boxes of {self._box_tokens} tokens by tensor maps{changed}"
            loader = f"{boxes}; {loader} from a cache that no map describes"
        elif self._run_tokens is not None:
            loader = f"{loader}; {self._run_tokens} that follow each other in memory as a box"
        if tuning.dense_tiles:
            loader = f"{loader}; of requests of {tuning.dense_tiles} tiles and more one leaves them to the others"
        return (
            f"tiles: {params.kinds[0].q_rows} rows x {tuning.tokens} KV tokens; {tuning.consumers} warpgroups {turns},"
            f" {tuning.key_stages} + {tuning.value_stages} stages",
            f"work: {params.num_workers} workers, {split}, {len(layout.lists)} work lists",
            f"K and V: {loader}",
            f"planner: {self._planner}",
            f"slots for partial results: {layout.num_slots}, of {tuning.slot_rows} rows each",
        )

    def _order_on_host(self, batch: Batch, staging: Tensor) -> None:
        for window, regions in self._layout.orders.items():
            order = regions.of(staging)
            if self._spec.batch_invariant:
                order.header.zero_()
            else:
                fill_order_on_host(batch.q_indptr, batch.kv_lens, self._order_specs[window], window, order)

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        if q.shape[0]:
            super().run(q, kv, layer, out, lse)

    def _values(self, shared: Call, q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Any, ...]:
        addressing = self._addresses
        return (
            *shared.cache,
            *shared.workspace,
            out.data_ptr(),
            address_of(lse),
            *addressing.addresses,
            *shared.layer_tensors,
            *shared.cache_strides,
            *out.stride()[:2],
            0 if lse is None else lse.stride(0),
            addressing.table_stride,
            *shared.numbers,
            tensor_map_of(q, self._query_box),
            *shared.maps,
        )

    def _prepare(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> Call:
        lists, layout, tuning = self._lists[layer.window], self._layout, self._tuning
        regions = (layout.arrivals, layout.partials, layout.partial_rows, layout.dense, layout.dense_records)
        workspace = [region.of(self._buffer) for region in regions]
        q_scales, q_scale_stride, q_scale = scale_of(layer.q_scale)
        k_scales, k_scale_stride, k_scale = scale_of(kv.k_scale)
        v_scales, v_scale_stride, v_scale = scale_of(kv.v_scale)
        scale, rope = layer.scale * q_scale * k_scale, layer.rope
        addressing, maps = self._addresses, self._maps_of(kv)
        form = CallForm(
            windowed=layer.window is not None,
            lse=with_lse,
            q_scales=q_scales != 0,
            k_scales=k_scales != 0,
            v_scales=v_scales != 0,
            table_row=addressing.has_rows,
            mask_columns=addressing.mask_columns,
            signed_scale=scale <= 0,
            boxes=maps is not None,
        )
        spec = prefill_spec(self._spec, tuning, form, after_decode=self._left_to_decode != NO_STEPS)
        return Call(
            kv=weakref.ref(kv),
            layer=layer,
            kernel=kernel_for(spec, self._device),
            workspace=tuple(map(address_of, (*lists[:2], *self._orders[layer.window][:2], *workspace))),
            cache=(kv.k.data_ptr(), kv.v.data_ptr()),
            layer_tensors=(
                *(address_of(layer.sinks), address_of(layer.alibi_slopes)),
                address_of(None if rope is None else rope.inv_freq),
                *(q_scales, k_scales, v_scales),
            ),
            cache_strides=(cache_strides_of if spec.has_boxes else near_strides_of)(kv),
            numbers=(
                *(q_scale_stride, k_scale_stride, v_scale_stride, self._spec.num_kv_heads, layout.dense.shape[0]),
                *(layer.window or 0, scale, layer.soft_cap or 1.0, v_scale),
                1.0 if rope is None else rope.config.attention_factor,
            ),
            maps=maps or (),
        )

    def _maps_of(self, kv: KVCache) -> tuple[TensorMap, ...] | None:
        """Tensor maps of K and V, if the copy engine can bring them."""
        tokens = self._box_tokens or self._run_tokens
        return None if tokens is None else column_maps_of(kv, tokens, BOX_ROW_BYTES)


attention_prefill = PrefillAttention()
"""The prefill kernel alone."""
