"""Shared prefixes beside a plan's own work list: the nodes' work list, and the launches that read each node's keys once.

The requests' work list then holds their own parts alone. A call launches that list (``kernel.py``), the nodes' list and one merge
of each request's parts (``level_kernel.py``): Hydragen's decomposition (Juravsky et al., 2024, section 3) over a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from fi_scheduler.partition import partition
from fi_scheduler.regions import Region, RegionBuilder
from torch import Tensor

from .level_kernel import node_kernel, node_merge_kernel, parts_kernel
from .level_plan import level_nodes_kernel, level_requests_kernel
from .plan_kernel import plan_on_device
from .tuning import block_dim
from .work_lists import TABLE_FORMS, lists_in, merge_grid, work_list_of
from .workspace import Layout

_NODES_AT_ONCE = 256
_TOKENS_AT_ONCE = 128
_PART_ROWS = 8
_PART_PROGRAMS = 4
_MERGED_AT_ONCE = 8
_MERGE_ROWS = 4


@dataclass(frozen=True)
class LevelLayout:
    """Regions of what levels need besides the work lists. ``states`` float32 [depth + 1, T, heads, Dv] holds the parts of every
    query token, its own part last, and ``state_lses`` their base-2 log-sum-exps; the others are described in level_plan.py."""

    nodes: Layout
    own_begins: Region
    own_lens: Region
    depths: Region
    place_indptr: Region
    rows: Region
    node_rows: Region
    states: Region
    state_lses: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> LevelLayout:
        """The layout of a plan whose capacity has prefixes."""
        tokens, depth, batch = capacity.max_q_tokens, capacity.max_prefix_depth, capacity.max_batch
        node_spec = replace(spec, causal=False, windows=(None,))
        members = Capacity(capacity.max_prefixes, tokens * depth, tokens, capacity.max_kv_len)
        build = RegionBuilder()
        return cls(
            nodes=Layout.of(node_spec, members, device),
            own_begins=build.add((batch,), torch.int32),
            own_lens=build.add((batch,), torch.int32),
            depths=build.add((batch,), torch.int32),
            place_indptr=build.add((batch + 1,), torch.int32),
            rows=build.add((tokens, 4), torch.int32),
            node_rows=build.add((capacity.max_prefixes, 4), torch.int32),
            states=build.add((depth + 1, tokens, spec.num_qo_heads, spec.head_dim_vo or 0), torch.float32),
            state_lses=build.add((depth + 1, tokens, spec.num_qo_heads), torch.float32),
            num_bytes=build.end,
        )


class Levels:
    """The part of a plan's state that shared prefixes add."""

    def __init__(self, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> None:
        self._spec = spec
        self._capacity = capacity
        self._device = device
        self._layout = layout = LevelLayout.of(spec, capacity, device)
        self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        self._node_buffer = torch.empty(layout.nodes.num_bytes, dtype=torch.uint8, device=device)
        self.own_begins, self.states, self.state_lses = (
            region.of(self._buffer) for region in (layout.own_begins, layout.states, layout.state_lses)
        )
        self._own_lens: Tensor = layout.own_lens.of(self._buffer)
        self._depths, self._place_indptr = layout.depths.of(self._buffer), layout.place_indptr.of(self._buffer)
        self._rows, self._node_rows = layout.rows.of(self._buffer), layout.node_rows.of(self._buffer)
        self._list = lists_in(self._node_buffer, layout.nodes)[None]
        self._node_indptr = layout.nodes.q_indptr.of(self._node_buffer)
        self._node_lens = layout.nodes.kv_lens.of(self._node_buffer)
        self._partials = layout.nodes.partials.of(self._node_buffer)
        self._partial_lses = layout.nodes.partial_lses.of(self._node_buffer)
        self._no_nodes = torch.zeros((0, 4), dtype=torch.int32, device=device)
        self._nodes = self._no_nodes

    @property
    def workspace(self) -> Sequence[Tensor]:
        return self._buffer, self._node_buffer

    @property
    def own_rows(self) -> int:
        """First row of ``states``, as [.., heads, Dv], that belongs to the requests' own parts."""
        return self._capacity.max_prefix_depth * self._capacity.max_q_tokens

    def describe(self) -> str:
        """A line for ``explain``."""
        tuning = self._layout.nodes.tuning
        tiles = f"{tuning.rows} rows" if not tuning.big_rows else f"{tuning.rows} or {tuning.big_rows} rows"
        return (
            f"shared prefixes: up to {self._capacity.max_prefixes}, {self._capacity.max_prefix_depth} deep, in tiles of {tiles}; "
            "a launch for them, one for what is a request's own, and the merge of its parts"
        )

    def update(self, batch: Batch) -> Tensor:
        """Plan the nodes of ``batch``, whose tensors are on the plan's device; returns the lengths of the requests' own parts,
        int32 [B]."""
        levels, size = batch.levels, batch.size
        self._nodes = nodes = self._no_nodes if levels is None else levels.nodes
        order = None if levels is None else levels.order
        has_order, num_nodes = order is not None, nodes.shape[0]
        places = self._place_indptr if order is None else order
        level_requests_kernel[(size + 1,)](
            nodes, num_nodes, places, batch.q_indptr, batch.kv_lens, size, self._capacity.max_q_tokens,
            self._place_indptr, self.own_begins, self._own_lens, self._depths, self._rows,
            has_order, self._capacity.max_prefix_depth, _NODES_AT_ONCE, _TOKENS_AT_ONCE, num_warps=4,
        )  # fmt: skip
        level_nodes_kernel[(num_nodes + 1,)](
            nodes, num_nodes, places, self._place_indptr, size, self._node_rows, self._node_indptr, self._node_lens,
            has_order, _NODES_AT_ONCE, num_warps=4,
        )  # fmt: skip
        self._plan_nodes(num_nodes)
        return self._own_lens[:size]

    def _plan_nodes(self, num_nodes: int) -> None:
        layout = self._layout.nodes
        indptr, lens = self._node_indptr[: num_nodes + 1], self._node_lens[:num_nodes]
        params = layout.params[None]
        if self._device.type == "cpu":
            self._list.num_merges.fill_(len(partition(indptr, lens, params, out=work_list_of(self._list)).merges))
            return
        requests, cuts = layout.requests.of(self._node_buffer), layout.cuts.of(self._node_buffer)
        plan_on_device(indptr, lens, params, requests, cuts, self._list)

    def run(self, call: LevelCall) -> None:
        """Attend to the nodes' keys and merge the parts; the requests' own ones are in ``states`` already."""
        spec, layout, capacity = self._spec, self._layout.nodes, self._capacity
        tuning, params = layout.tuning, layout.params[None]
        depth, max_tokens = capacity.max_prefix_depth, capacity.max_q_tokens
        dims = (spec.head_dim, block_dim(spec.head_dim), spec.head_dim_vo, block_dim(spec.head_dim_vo or 0))
        node_kernel[(params.num_workers,)](
            self._list.worker_indptr, self._list.items, self._nodes, self._node_rows, self._rows, *self._tensors(call),
            *call.numbers, max_tokens, *call.strides,
            tuning.rows, tuning.step, tuning.big_rows, tuning.big_step, tuning.num_stages, spec.group_size, *dims,
            *self._constants(call), spec.num_qo_heads, depth, num_warps=tuning.num_warps, num_stages=tuning.num_stages,
        )  # fmt: skip
        tail = (spec.head_dim_vo, block_dim(spec.head_dim_vo or 0), spec.num_qo_heads, depth)
        if layout.bounds.max_merges > 0:
            node_merge_kernel[merge_grid(layout.bounds)](
                self._list.merges, self._list.num_merges, self._node_rows, self._rows, self.states, self.state_lses,
                self._partials, self._partial_lses, max_tokens,
                tuning.rows, tuning.big_rows, _MERGE_ROWS, _MERGED_AT_ONCE, spec.group_size, *tail, num_warps=4,
            )  # fmt: skip
        batch, layer, out, lse = call.batch, call.layer, call.out, call.lse
        if batch.size:
            parts_kernel[(batch.size, _PART_PROGRAMS)](
                batch.q_indptr, self.own_begins, self._depths, self.states, self.state_lses,
                self.state_lses if layer.sinks is None else layer.sinks, out, self.state_lses if lse is None else lse, max_tokens,
                out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
                _PART_ROWS, *tail, layer.sinks is not None, lse is not None, num_warps=4,
            )  # fmt: skip

    def _tensors(self, call: LevelCall) -> tuple[Tensor, ...]:
        """Tensors of the nodes' kernel from q on; an absent one is replaced by one of its type that is then never read."""
        batch, kv, layer = call.batch, call.kv, call.layer
        k, v = kv.typed()
        ints, floats = self._rows, self._partial_lses
        mask = batch.mask
        return (
            call.q,
            k,
            v,
            self.states,
            self.state_lses,
            self._partials,
            self._partial_lses,
            batch.kv_lens,
            ints if batch.table is None else batch.table,
            ints if batch.table_row is None else batch.table_row,
            ints if batch.table_indptr is None else batch.table_indptr,
            self._buffer if mask is None else mask.bits,
            self._layout.nodes.cuts.of(self._node_buffer) if mask is None else mask.indptr,
            floats if layer.alibi_slopes is None else layer.alibi_slopes,
            kv.k_scale if isinstance(kv.k_scale, Tensor) else floats,
            kv.v_scale if isinstance(kv.v_scale, Tensor) else floats,
        )

    def _constants(self, call: LevelCall) -> tuple[Any, ...]:
        batch, layer, mask = call.batch, call.layer, call.batch.mask
        return (
            self._spec.page_size,
            TABLE_FORMS[self._spec.table],
            batch.table_row is not None,
            layer.window is not None,
            layer.soft_cap is not None,
            layer.alibi_slopes is not None,
            int(mask is not None and mask.columns == "kv"),
            isinstance(call.kv.k_scale, Tensor),
            isinstance(call.kv.v_scale, Tensor),
        )


@dataclass(frozen=True)
class LevelCall:
    """A call of attention, as far as nodes need it: ``numbers`` softmax scale, soft cap, value scale, window; ``strides`` of q,
    K and V, the table and the scales."""

    q: Tensor
    kv: KVCache
    batch: Batch
    layer: ResolvedLayer
    out: Tensor
    lse: Tensor | None
    numbers: tuple[float | int, ...]
    strides: tuple[int, ...]
