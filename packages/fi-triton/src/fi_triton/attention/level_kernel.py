"""Attention of all members of a node to the keys that they share, and the merge of a request's parts.

A tile's rows are query tokens of any members, found through ``rows`` (level_plan.py); they see all of the node's keys unless a
window or a mask hides some. Results go to the rows of the node's level: each level has one for every query token and head, so
that no two tiles of a level meet. Last, a request's rows are merged from the outermost level to its own part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import entries_of, load_queries, logit_scale_of, normalised, slopes_of, store_output, store_rows
from .kv_steps import LOG2E, MASK_KV, MASK_NONE, attend_range
from .merge import merge_rows


@triton.jit
def run_node(
    item_ptr, nodes_ptr, node_rows_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, state_ptr, state_lse_ptr, partial_ptr,
    partial_lse_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr, bits_ptr, bits_indptr_ptr,
    slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window, max_tokens,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, SPLIT_EDGES: tl.constexpr, SLOT_ROWS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    HEADS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One item of the nodes' work list with a tile of ROWS packed rows; positions count from the node's first key."""
    node = tl.load(item_ptr)
    kv_head = tl.load(item_ptr + 1)
    q_tile = tl.load(item_ptr + 2)
    kv_begin = tl.load(item_ptr + 4)
    kv_end = tl.load(item_ptr + 5)
    slot = tl.load(item_ptr + 6)
    shift = tl.load(nodes_ptr + node * 4 + 2)
    request = tl.load(node_rows_ptr + node * 4)
    row_begin = tl.load(node_rows_ptr + node * 4 + 1)
    num_rows = tl.load(node_rows_ptr + node * 4 + 2)
    depth = tl.load(node_rows_ptr + node * 4 + 3)
    row = q_tile * ROWS + tl.arange(0, ROWS)
    head = kv_head * GROUP + row % GROUP
    place = row_begin + row // GROUP
    live = (row // GROUP < num_rows) & (place < max_tokens)
    token = tl.load(rows_ptr + place * 4, mask=live, other=0)
    offset = tl.load(rows_ptr + place * 4 + 1, mask=live, other=0) - shift
    query = load_queries(q_ptr, token, head, live, q_stride_token, q_stride_head, DIM, BLOCK_D)

    k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_head
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_head
    entries_ptr = entries_of(request, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, TABLE, TABLE_ROW)
    logit_scale = logit_scale_of(scale, k_scale_ptr + kv_head * k_scale_stride, K_SCALE, SOFT_CAP)
    slope = slopes_of(slopes_ptr, head, ROWS, ALIBI)
    bits_row = tl.zeros((ROWS,), tl.int64)
    if MASK == MASK_KV:
        member = tl.load(rows_ptr + place * 4 + 2, mask=live, other=0)
        row_bytes = (tl.load(kv_lens_ptr + member) + 7) // 8
        index = tl.load(rows_ptr + place * 4 + 3, mask=live, other=0)
        bits_row = tl.load(bits_indptr_ptr + member, mask=live, other=0) + index.to(tl.int64) * row_bytes

    # A mask of the new tokens alone hides none of the shared keys, which lie before them.
    whole_begin = kv_end
    whole_end = kv_end
    if SPLIT_EDGES:
        whole_begin = kv_begin
        whole_end = kv_begin + (kv_end - kv_begin) // STEP * STEP
    first_seen = offset - window + 1
    last_seen = tl.full((ROWS,), 2147483647, tl.int32)
    total, top, mass = attend_range(
        query, kv_begin, kv_end, whole_begin, whole_end, 0, shift, row * 0, first_seen, last_seen, offset,
        entries_ptr, k_head_ptr, v_head_ptr, k_stride_page, k_stride_token, v_stride_page, v_stride_token,
        logit_scale, soft_cap, slope, bits_ptr, bits_row, kv_end + shift, ROWS, STEP, SPLIT_EDGES, STAGES,
        PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
    )  # fmt: skip
    if V_SCALE:
        v_scale = v_scale * tl.load(v_scale_ptr + kv_head * v_scale_stride)
    result, log_mass = normalised(total, top, mass, v_scale)
    if slot >= 0:
        slot_row = slot.to(tl.int64) * SLOT_ROWS + tl.arange(0, ROWS)
        store_rows(slot_row, slot_row >= 0, result, log_mass, partial_ptr, partial_lse_ptr, DIM_VO, BLOCK_DV)
    elif depth < DEPTH:
        state_row = (depth.to(tl.int64) * max_tokens + token) * HEADS + head
        store_rows(state_row, live, result, log_mass, state_ptr, state_lse_ptr, DIM_VO, BLOCK_DV)


@triton.jit(do_not_specialize=["window", "max_tokens"])
def node_kernel(
    worker_indptr_ptr, items_ptr, nodes_ptr, node_rows_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, state_ptr, state_lse_ptr,
    partial_ptr, partial_lse_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr, bits_ptr, bits_indptr_ptr,
    slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window, max_tokens,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    HEADS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All items of worker ``program_id(0)`` of the nodes' work list; tiles of two kinds as in attention_kernel."""
    worker = tl.program_id(0)
    SLOT_ROWS: tl.constexpr = BIG_ROWS if BIG_ROWS > ROWS else ROWS
    UNMASKED: tl.constexpr = MASK == MASK_NONE and not WINDOWED
    for item in range(tl.load(worker_indptr_ptr + worker), tl.load(worker_indptr_ptr + worker + 1)):
        item_ptr = items_ptr + item * 8
        if tl.load(item_ptr + 3) == 0:
            run_node(
                item_ptr, nodes_ptr, node_rows_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, state_ptr, state_lse_ptr, partial_ptr,
                partial_lse_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr, bits_ptr, bits_indptr_ptr,
                slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window, max_tokens,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head, table_stride, k_scale_stride, v_scale_stride,
                ROWS, STEP, UNMASKED and ROWS > 32, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, WINDOWED, SOFT_CAP, ALIBI, MASK, K_SCALE, V_SCALE, HEADS, DEPTH,
            )  # fmt: skip
        elif BIG_ROWS > 0:
            run_node(
                item_ptr, nodes_ptr, node_rows_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, state_ptr, state_lse_ptr, partial_ptr,
                partial_lse_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr, bits_ptr, bits_indptr_ptr,
                slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window, max_tokens,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head, table_stride, k_scale_stride, v_scale_stride,
                BIG_ROWS, BIG_STEP, UNMASKED, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, WINDOWED, SOFT_CAP, ALIBI, MASK, K_SCALE, V_SCALE, HEADS, DEPTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["max_tokens"])
def node_merge_kernel(
    merges_ptr, num_merges_ptr, node_rows_ptr, rows_ptr, state_ptr, state_lse_ptr, partial_ptr, partial_lse_ptr, max_tokens,
    ROWS: tl.constexpr, BIG_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Combine the slots of split tiles of nodes, as merge_kernel does those of requests, into the rows of their levels."""
    SLOT_ROWS: tl.constexpr = BIG_ROWS if BIG_ROWS > ROWS else ROWS
    num_merges = tl.load(num_merges_ptr)
    for merge in range(tl.program_id(0), num_merges, tl.num_programs(0)):
        record = merges_ptr + merge * 8
        node = tl.load(record)
        kv_head = tl.load(record + 1)
        q_tile = tl.load(record + 2)
        head_slot = tl.load(record + 4)
        tail_begin = tl.load(record + 5)
        tail_end = tl.load(record + 6)
        row_begin = tl.load(node_rows_ptr + node * 4 + 1)
        num_rows = tl.load(node_rows_ptr + node * 4 + 2)
        depth = tl.load(node_rows_ptr + node * 4 + 3)
        tile_rows = tl.where(tl.load(record + 3) == 0, ROWS, BIG_ROWS)
        used_rows = tl.minimum(tile_rows, num_rows * GROUP - q_tile * tile_rows)
        for first_row in range(tl.program_id(1) * BLOCK_ROWS, used_rows, tl.num_programs(1) * BLOCK_ROWS):
            row = first_row + tl.arange(0, BLOCK_ROWS)
            packed = q_tile * tile_rows + row
            place = row_begin + packed // GROUP
            live = (row < used_rows) & (place < max_tokens) & (depth < DEPTH)
            token = tl.load(rows_ptr + place * 4, mask=live, other=0)
            nothing = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            result, lse = merge_rows(
                tail_begin - 1, 1 + tail_end - tail_begin, head_slot, row, live, partial_ptr, partial_lse_ptr, nothing,
                SLOT_ROWS, BLOCK_ROWS, PIECES, DIM_VO, BLOCK_DV,
            )  # fmt: skip
            state_row = (depth.to(tl.int64) * max_tokens + token) * HEADS + kv_head * GROUP + packed % GROUP
            store_rows(state_row, live, result, lse, state_ptr, state_lse_ptr, DIM_VO, BLOCK_DV)


@triton.jit(do_not_specialize=["max_tokens"])
def parts_kernel(
    q_indptr_ptr, own_begin_ptr, depths_ptr, state_ptr, state_lse_ptr, sinks_ptr, out_ptr, lse_ptr, max_tokens,
    out_stride_token, out_stride_head, lse_stride_token,
    BLOCK_ROWS: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of request ``program_id(0)``: its levels from the outermost on, then its own keys; sinks join here."""
    request = tl.program_id(0)
    if tl.load(own_begin_ptr + request) > 0:
        dims = tl.arange(0, BLOCK_DV)
        q_begin = tl.load(q_indptr_ptr + request)
        num_rows = (tl.load(q_indptr_ptr + request + 1) - q_begin) * HEADS
        depth = tl.load(depths_ptr + request)
        for first_row in range(tl.program_id(1) * BLOCK_ROWS, num_rows, tl.num_programs(1) * BLOCK_ROWS):
            row = first_row + tl.arange(0, BLOCK_ROWS)
            live = row < num_rows
            token = (q_begin + row // HEADS).to(tl.int64)
            head = row % HEADS
            top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            if SINKS:
                top = tl.load(sinks_ptr + head, mask=live, other=0.0) * LOG2E
            sink = top
            for part in range(0, depth + 1):
                level = tl.where(part < depth, part, DEPTH).to(tl.int64)
                state_row = (level * max_tokens + token) * HEADS + head
                top = tl.maximum(top, tl.load(state_lse_ptr + state_row, mask=live, other=float("-inf")))
            base = tl.where(top == float("-inf"), 0.0, top)
            mass = tl.exp2(sink - base)
            total = tl.zeros((BLOCK_ROWS, BLOCK_DV), tl.float32)
            for part in range(0, depth + 1):
                level = tl.where(part < depth, part, DEPTH).to(tl.int64)
                state_row = (level * max_tokens + token) * HEADS + head
                weight = tl.exp2(tl.load(state_lse_ptr + state_row, mask=live, other=float("-inf")) - base)
                wanted = live[:, None] & (dims < DIM_VO)[None, :]
                value = tl.load(state_ptr + state_row[:, None] * DIM_VO + dims[None, :], mask=wanted, other=0.0)
                mass += weight
                total += weight[:, None] * value
            empty = mass == 0.0
            result = total / tl.where(empty, 1.0, mass)[:, None]
            log_mass = tl.where(empty, float("-inf"), base + tl.log2(tl.where(empty, 1.0, mass)))
            store_output(
                token, head, live, result, log_mass, out_ptr, lse_ptr, out_stride_token, out_stride_head, lse_stride_token,
                DIM_VO, BLOCK_DV, LSE,
            )  # fmt: skip
