"""Planning on the device: the scheduler's work partition as three stream-ordered kernels without a copy or a wait.

``request_kernel`` (a program a request) sums the costs of its tiles; ``cut_kernel`` (a program a worker) finds where the
worker's range begins on the line of tiles; ``emit_kernel`` (a program a worker) writes its items and merge records. The
result equals ``fi_scheduler.partition`` bit for bit for tile order (request, q tile, head). All quantities are int64.

Source of the balanced partition: the stream-K decomposition (Osama et al., PPoPP 2023), applied to KV steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fi_scheduler.partition import RECORD_WIDTH, UNLIMITED_ROWS, PartitionParams

from .plan_line import find_request, find_tile, pieces_of, shape_of, steps_of
from .workspace import CUT_COLUMNS, REQUEST_COLUMNS

_TILES_AT_ONCE = 128
_REQUESTS_AT_ONCE = 1024


@triton.jit(do_not_specialize=["window"])
def request_kernel(
    requests_ptr, q_indptr_ptr, kv_lens_ptr, window, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, ITEM_COST: tl.constexpr, STEP_COST: tl.constexpr, SMALL_LIMIT: tl.constexpr,
    BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, BIG_ITEM_COST: tl.constexpr, BIG_STEP_COST: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT_STEPS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Totals of request ``program_id(0)`` for one KV head, into row ``program_id(0)`` of ``requests_ptr``."""
    request = tl.program_id(0)
    q_len, kv_len, kind, q_rows, kv_tokens, item_cost, step_cost, num_tiles = shape_of(
        request, q_indptr_ptr, kv_lens_ptr, GROUP, ROWS, STEP, ITEM_COST, STEP_COST, SMALL_LIMIT,
        BIG_ROWS, BIG_STEP, BIG_ITEM_COST, BIG_STEP_COST,
    )  # fmt: skip
    steps_sum = num_tiles * 0
    items = num_tiles * 0
    merges = num_tiles * 0
    for first in range(0, num_tiles.to(tl.int32), TILES):
        q_tile = first + tl.arange(0, TILES).to(tl.int64)
        inside = q_tile < num_tiles
        _, steps, _ = steps_of(q_tile, q_len, kv_len, q_rows, kv_tokens, window, GROUP, CAUSAL, WINDOWED)
        steps_sum += tl.sum(tl.where(inside, steps, 0), 0)
        if MAX_SPLITS > 0:
            splits, _ = pieces_of(steps, MAX_SPLITS, MIN_SPLIT_STEPS)
            items += tl.sum(tl.where(inside, splits, 0), 0)
            merges += tl.sum((inside & (splits > 1)).to(tl.int64), 0)
    row = requests_ptr + request * COLUMNS
    tl.store(row, num_tiles * item_cost + steps_sum * step_cost)
    tl.store(row + 1, num_tiles)
    tl.store(row + 2, items)
    tl.store(row + 3, merges)


@triton.jit(do_not_specialize=["num_requests", "window"])
def cut_kernel(
    cuts_ptr, requests_ptr, num_requests, q_indptr_ptr, kv_lens_ptr, window,
    WORKERS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, ITEM_COST: tl.constexpr, STEP_COST: tl.constexpr, SMALL_LIMIT: tl.constexpr,
    BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, BIG_ITEM_COST: tl.constexpr, BIG_STEP_COST: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT_STEPS: tl.constexpr, COLUMNS: tl.constexpr, CUT_WIDTH: tl.constexpr,
    TILES: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """Where worker ``program_id(0)`` begins; program WORKERS writes the end of the line."""
    worker = tl.program_id(0).to(tl.int64)
    head_cost = worker * 0
    for first in range(0, num_requests, REQUESTS):
        request = first + tl.arange(0, REQUESTS)
        head_cost += tl.sum(tl.load(requests_ptr + request * COLUMNS, mask=request < num_requests, other=0), 0)
    line = head_cost * HEADS
    share = line // WORKERS
    position = worker * share + worker * (line - share * WORKERS) // WORKERS
    request, cost_before, tiles_before, items_before, merges_before = find_request(
        requests_ptr, num_requests, position, HEADS, COLUMNS, REQUESTS
    )
    q_tile = worker * 0
    kv_head = worker * 0
    inner = worker * 0
    tile_idx = tiles_before * HEADS
    item_idx = items_before * HEADS
    merge_idx = merges_before * HEADS
    if request < num_requests:
        rest = position - cost_before * HEADS
        q_len, kv_len, kind, q_rows, kv_tokens, item_cost, step_cost, num_tiles = shape_of(
            request, q_indptr_ptr, kv_lens_ptr, GROUP, ROWS, STEP, ITEM_COST, STEP_COST, SMALL_LIMIT,
            BIG_ROWS, BIG_STEP, BIG_ITEM_COST, BIG_STEP_COST,
        )  # fmt: skip
        q_tile, leading, items, merges = find_tile(
            rest, num_tiles, q_len, kv_len, q_rows, kv_tokens, item_cost, step_cost, window,
            HEADS, GROUP, CAUSAL, WINDOWED, MAX_SPLITS, MIN_SPLIT_STEPS, TILES,
        )  # fmt: skip
        item_idx += items * HEADS
        merge_idx += merges * HEADS
        rest -= leading * HEADS
        _, steps, _ = steps_of(q_tile, q_len, kv_len, q_rows, kv_tokens, window, GROUP, CAUSAL, WINDOWED)
        cost = item_cost + steps * step_cost
        kv_head = rest // cost
        tile_idx += q_tile * HEADS + kv_head
        rest -= kv_head * cost
        into_steps = tl.maximum(rest - item_cost, 0)
        if MAX_SPLITS > 0:
            splits, chunk = pieces_of(steps, MAX_SPLITS, MIN_SPLIT_STEPS)
            chunk_cost = chunk * step_cost
            piece = tl.minimum(tl.maximum((into_steps + chunk_cost - 1) // chunk_cost, 1), splits)
            inner = tl.where(rest > 0, piece, 0)
            item_idx += kv_head * splits + inner
            merge_idx += ((splits > 1) & (inner > 0)).to(tl.int64) + kv_head * (splits > 1).to(tl.int64)
        else:
            inner = into_steps // step_cost
    cut = cuts_ptr + worker * CUT_WIDTH
    tl.store(cut, tile_idx)
    tl.store(cut + 1, inner)
    tl.store(cut + 2, request)
    tl.store(cut + 3, q_tile)
    tl.store(cut + 4, kv_head)
    tl.store(cut + 5, item_idx)
    tl.store(cut + 6, merge_idx)


@triton.jit
def store_record(record, request, kv_head, q_tile, kind, fourth, fifth, sixth, wanted):
    """One row of eight int32 columns, if ``wanted``."""
    tl.store(record, request.to(tl.int32), mask=wanted)
    tl.store(record + 1, kv_head.to(tl.int32), mask=wanted)
    tl.store(record + 2, q_tile.to(tl.int32), mask=wanted)
    tl.store(record + 3, kind.to(tl.int32), mask=wanted)
    tl.store(record + 4, fourth.to(tl.int32), mask=wanted)
    tl.store(record + 5, fifth.to(tl.int32), mask=wanted)
    tl.store(record + 6, sixth.to(tl.int32), mask=wanted)
    tl.store(record + 7, (sixth * 0).to(tl.int32), mask=wanted)


@triton.jit
def next_tile(request, q_tile, kv_head, num_tiles, num_requests, q_indptr_ptr, HEADS: tl.constexpr):
    """The tile after this one on the line: next head, else next q tile, else next request that has tokens."""
    kv_head += 1
    q_tile += (kv_head == HEADS).to(tl.int64)
    kv_head = tl.where(kv_head == HEADS, 0, kv_head)
    if q_tile == num_tiles:
        q_tile = q_tile * 0
        request += 1
        empty = request < num_requests
        while empty:
            begin = tl.load(q_indptr_ptr + request)
            empty = tl.load(q_indptr_ptr + request + 1) == begin
            request += empty.to(tl.int64)
            empty = empty & (request < num_requests)
    return request, q_tile, kv_head


@triton.jit
def first_places(
    worker, cuts_ptr, tile_idx, inner, every, every_tile, MAX_SPLITS: tl.constexpr, CUT_WIDTH: tl.constexpr
):  # fmt: skip
    """A worker's first item and merge record; ``every_tile``: the tile of each cut in ``every``."""
    if MAX_SPLITS > 0:
        item_idx = tl.load(cuts_ptr + worker * CUT_WIDTH + 5)
        merge_idx = tl.load(cuts_ptr + worker * CUT_WIDTH + 6)
    else:
        # A tile's items: one where it begins and one for each worker whose cut lies inside it.
        earlier = every < worker
        every_step = tl.load(cuts_ptr + every * CUT_WIDTH + 1, mask=earlier, other=0)
        after_tile = tl.load(cuts_ptr + (every + 1) * CUT_WIDTH, mask=earlier, other=0)
        after_step = tl.load(cuts_ptr + (every + 1) * CUT_WIDTH + 1, mask=earlier, other=0)
        item_idx = tile_idx + (inner > 0).to(tl.int64) + tl.sum((every_step > 0).to(tl.int64), 0)
        split_there = earlier & (after_step > 0) & ((after_tile > every_tile) | (every_step == 0))
        merge_idx = tl.sum(split_there.to(tl.int64), 0)
    return item_idx, merge_idx


@triton.jit(do_not_specialize=["max_items", "max_merges", "num_requests", "window"])
def emit_kernel(
    worker_indptr_ptr, items_ptr, merges_ptr, num_merges_ptr, max_items, max_merges,
    cuts_ptr, num_requests, q_indptr_ptr, kv_lens_ptr, window,
    WORKERS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, ITEM_COST: tl.constexpr, STEP_COST: tl.constexpr, SMALL_LIMIT: tl.constexpr,
    BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, BIG_ITEM_COST: tl.constexpr, BIG_STEP_COST: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT_STEPS: tl.constexpr, CUT_WIDTH: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Items and merge records of worker ``program_id(0)``; program WORKERS writes the ends of both lists.

    Nothing is written past ``max_items`` and ``max_merges``: a batch beyond the plan's capacity loses work, not memory.
    """
    worker = tl.program_id(0).to(tl.int64)
    cut = cuts_ptr + worker * CUT_WIDTH
    tile_idx = tl.load(cut)
    inner = tl.load(cut + 1)
    every = tl.arange(0, CUTS).to(tl.int64)
    every_tile = tl.load(cuts_ptr + every * CUT_WIDTH, mask=every < WORKERS, other=0)
    item_idx, merge_idx = first_places(worker, cuts_ptr, tile_idx, inner, every, every_tile, MAX_SPLITS, CUT_WIDTH)
    tl.store(worker_indptr_ptr + worker, tl.minimum(item_idx, max_items).to(tl.int32))
    if worker == WORKERS:
        tl.store(num_merges_ptr, tl.minimum(merge_idx, max_merges).to(tl.int32))
    else:
        request = tl.load(cut + 2)
        q_tile = tl.load(cut + 3)
        kv_head = tl.load(cut + 4)
        last_tile = tl.load(cut + CUT_WIDTH)
        last_inner = tl.load(cut + CUT_WIDTH + 1)
        while (tile_idx < last_tile) | ((tile_idx == last_tile) & (last_inner > 0)):
            q_len, kv_len, kind, q_rows, kv_tokens, item_cost, step_cost, num_tiles = shape_of(
                request, q_indptr_ptr, kv_lens_ptr, GROUP, ROWS, STEP, ITEM_COST, STEP_COST, SMALL_LIMIT,
                BIG_ROWS, BIG_STEP, BIG_ITEM_COST, BIG_STEP_COST,
            )  # fmt: skip
            first_step, steps, kv_stop = steps_of(
                q_tile, q_len, kv_len, q_rows, kv_tokens, window, GROUP, CAUSAL, WINDOWED
            )
            if MAX_SPLITS > 0:
                splits, chunk = pieces_of(steps, MAX_SPLITS, MIN_SPLIT_STEPS)
                pieces_end = tl.where(tile_idx == last_tile, last_inner, splits)
                # There are as many slots as items; clipped like those when the batch exceeds the capacity.
                head_slot = tl.minimum(tile_idx * MAX_SPLITS, max_items - 1)
                tail_begin = tl.minimum(head_slot + 1, max_items)
                tail_end = tl.minimum(head_slot + splits, max_items)
                begins_split = (inner == 0) & (splits > 1)
            else:
                chunk = tl.where(tile_idx == last_tile, last_inner, steps) - inner
                pieces_end = inner + 1
                head_slot = WORKERS + worker
                tail_begin = worker + 1
                tail_end = tl.sum(((every < WORKERS) & (every_tile <= tile_idx)).to(tl.int64), 0)
                begins_split = (inner == 0) & (tile_idx == last_tile)
            begin_step = first_step + inner
            if MAX_SPLITS > 0:
                begin_step = first_step + inner * chunk
            for piece in range(inner.to(tl.int32), pieces_end.to(tl.int32)):
                end_step = tl.minimum(begin_step + chunk, first_step + steps)
                kv_begin = begin_step * kv_tokens
                kv_end = tl.maximum(tl.minimum(end_step * kv_tokens, kv_stop), kv_begin)
                if MAX_SPLITS > 0:
                    slot = tl.where(splits > 1, tl.minimum(head_slot + piece, max_items - 1), -1)
                else:
                    slot = tl.where(inner > 0, worker, tl.where(begins_split, head_slot, -1))
                record = items_ptr + item_idx * 8
                store_record(record, request, kv_head, q_tile, kind, kv_begin, kv_end, slot, item_idx < max_items)
                item_idx += 1
                begin_step = end_step
            store_record(
                merges_ptr + merge_idx * 8, request, kv_head, q_tile, kind, head_slot, tail_begin, tail_end,
                begins_split & (merge_idx < max_merges),
            )  # fmt: skip
            merge_idx += begins_split.to(tl.int64)
            tile_idx += 1
            inner = inner * 0
            request, q_tile, kv_head = next_tile(request, q_tile, kv_head, num_tiles, num_requests, q_indptr_ptr, HEADS)


@dataclass(frozen=True)
class DeviceWorkList:
    """Where a work list lies on a device: int32 views of a plan's workspace (WorkList's arrays, and the number of merges)."""

    worker_indptr: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor
    num_merges: torch.Tensor


def plan_constants(params: PartitionParams) -> dict[str, int | bool]:
    """The compile-time arguments that all three kernels share."""
    small, big = params.kinds[0], params.kinds[-1]
    limit = small.max_packed_rows if len(params.kinds) > 1 else UNLIMITED_ROWS
    return {
        "GROUP": params.group_size,
        "CAUSAL": params.causal,
        "WINDOWED": params.window is not None,
        "ROWS": small.q_rows,
        "STEP": small.kv_tokens,
        "ITEM_COST": small.item_cost,
        "STEP_COST": small.step_cost,
        "SMALL_LIMIT": limit,
        "BIG_ROWS": big.q_rows,
        "BIG_STEP": big.kv_tokens,
        "BIG_ITEM_COST": big.item_cost,
        "BIG_STEP_COST": big.step_cost,
        "MAX_SPLITS": params.max_splits,
        "MIN_SPLIT_STEPS": params.min_split_steps,
    }


def plan_on_device(
    q_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    params: PartitionParams,
    requests: torch.Tensor,
    cuts: torch.Tensor,
    out: DeviceWorkList,
) -> None:
    """Fill ``out`` with the partition of a batch whose lengths lie on the device: int32 ``q_indptr`` [B + 1], ``kv_lens`` [B].

    ``requests`` int64 [>= B, REQUEST_COLUMNS] and ``cuts`` int64 [W + 1, CUT_COLUMNS] are scratch. ``params`` has one or two
    kinds and ``heads_first`` False. Legal in CUDA-graph capture: the grids depend on shapes alone.
    """
    assert len(params.kinds) <= 2 and not params.heads_first
    num_requests = kv_lens.shape[0]
    constants = plan_constants(params)
    window = params.window or 0
    if num_requests > 0:
        request_kernel[(num_requests,)](
            requests, q_indptr, kv_lens, window, **constants,
            COLUMNS=REQUEST_COLUMNS, TILES=_TILES_AT_ONCE, num_warps=1,
        )  # fmt: skip
    workers = params.num_workers
    line = {"WORKERS": workers, "HEADS": params.num_kv_heads, **constants}
    cut_kernel[(workers + 1,)](
        cuts, requests, num_requests, q_indptr, kv_lens, window, **line, COLUMNS=REQUEST_COLUMNS, CUT_WIDTH=CUT_COLUMNS,
        TILES=_TILES_AT_ONCE, REQUESTS=_REQUESTS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    emit_kernel[(workers + 1,)](
        out.worker_indptr, out.items, out.merges, out.num_merges, out.items.shape[0], out.merges.shape[0],
        cuts, num_requests, q_indptr, kv_lens, window, **line,
        CUT_WIDTH=CUT_COLUMNS, CUTS=triton.next_power_of_2(workers), num_warps=4,
    )  # fmt: skip


assert RECORD_WIDTH == 8, "store_record writes eight columns"
