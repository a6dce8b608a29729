"""What planning on the device knows of the scheduler's line of tiles: a request's tiles and their steps, and where a position on
the line lies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shape_of(
    request, q_indptr_ptr, kv_lens_ptr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, ITEM_COST: tl.constexpr, STEP_COST: tl.constexpr, SMALL_LIMIT: tl.constexpr,
    BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, BIG_ITEM_COST: tl.constexpr, BIG_STEP_COST: tl.constexpr,
):  # fmt: skip
    """(q_len, kv_len, kind, q_rows, kv_tokens, item_cost, step_cost, number of q tiles) of a request."""
    q_len = tl.load(q_indptr_ptr + request + 1).to(tl.int64) - tl.load(q_indptr_ptr + request).to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + request).to(tl.int64)
    big = q_len * GROUP > SMALL_LIMIT
    kind = big.to(tl.int64)
    q_rows = tl.where(big, BIG_ROWS, ROWS).to(tl.int64)
    kv_tokens = tl.where(big, BIG_STEP, STEP).to(tl.int64)
    item_cost = tl.where(big, BIG_ITEM_COST, ITEM_COST).to(tl.int64)
    step_cost = tl.where(big, BIG_STEP_COST, STEP_COST).to(tl.int64)
    num_tiles = (q_len * GROUP + q_rows - 1) // q_rows
    return q_len, kv_len, kind, q_rows, kv_tokens, item_cost, step_cost, num_tiles


@triton.jit
def steps_of(
    q_tile, q_len, kv_len, q_rows, kv_tokens, window, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """(first step, number of steps, end of the visible keys) of one q tile or of a vector of q tiles."""
    row_end = tl.minimum((q_tile + 1) * q_rows, q_len * GROUP)
    token_end = (row_end + GROUP - 1) // GROUP
    kv_stop = kv_len + q_tile * 0
    if CAUSAL:
        kv_stop = tl.maximum(kv_len - q_len + token_end, 0)
    kv_start = q_tile * 0
    if WINDOWED:
        kv_start = tl.maximum(kv_len - q_len + q_tile * q_rows // GROUP - window + 1, 0)
        kv_start = tl.minimum(kv_start, kv_stop)
    first_step = kv_start // kv_tokens
    steps = (kv_stop + kv_tokens - 1) // kv_tokens - first_step
    return first_step, tl.where(kv_stop > kv_start, steps, 0), kv_stop


@triton.jit
def pieces_of(steps, MAX_SPLITS: tl.constexpr, MIN_SPLIT_STEPS: tl.constexpr):
    """Batch-invariant: (number of pieces, steps a piece) of a tile with that many steps."""
    splits = tl.minimum(tl.maximum((steps + MIN_SPLIT_STEPS - 1) // MIN_SPLIT_STEPS, 1), MAX_SPLITS)
    chunk = tl.maximum((steps + splits - 1) // splits, 1)
    return tl.maximum((steps + chunk - 1) // chunk, 1), chunk


@triton.jit
def find_request(
    requests_ptr, num_requests, position, HEADS: tl.constexpr, COLUMNS: tl.constexpr, REQUESTS: tl.constexpr
):
    """(requests that end at or before ``position``, and their cost, tiles, pieces and split tiles for one KV head)."""
    found = position * 0
    cost_before = found
    tiles_before = found
    items_before = found
    merges_before = found
    base = found
    for first in range(0, num_requests, REQUESTS):
        request = first + tl.arange(0, REQUESTS)
        inside = request < num_requests
        row = requests_ptr + request * COLUMNS
        cost = tl.load(row, mask=inside, other=0)
        ends = base + tl.cumsum(cost, 0)
        before = inside & (ends * HEADS <= position)
        found += tl.sum(before.to(tl.int64), 0)
        cost_before += tl.sum(tl.where(before, cost, 0), 0)
        tiles_before += tl.sum(tl.load(row + 1, mask=before, other=0), 0)
        items_before += tl.sum(tl.load(row + 2, mask=before, other=0), 0)
        merges_before += tl.sum(tl.load(row + 3, mask=before, other=0), 0)
        base += tl.sum(cost, 0)
    return found, cost_before, tiles_before, items_before, merges_before


@triton.jit
def find_tile(
    rest, num_tiles, q_len, kv_len, q_rows, kv_tokens, item_cost, step_cost, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT_STEPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(a request's q tiles that end, for all heads, within ``rest``; their cost, pieces and split tiles for one KV head)."""
    found = rest * 0
    leading = found
    items = found
    merges = found
    base = found
    for first in range(0, num_tiles.to(tl.int32), TILES):
        tile = first + tl.arange(0, TILES).to(tl.int64)
        inside = tile < num_tiles
        _, steps, _ = steps_of(tile, q_len, kv_len, q_rows, kv_tokens, window, GROUP, CAUSAL, WINDOWED)
        cost = tl.where(inside, item_cost + steps * step_cost, 0)
        before = inside & ((base + tl.cumsum(cost, 0)) * HEADS <= rest)
        found += tl.sum(before.to(tl.int64), 0)
        leading += tl.sum(tl.where(before, cost, 0), 0)
        base += tl.sum(cost, 0)
        if MAX_SPLITS > 0:
            splits, _ = pieces_of(steps, MAX_SPLITS, MIN_SPLIT_STEPS)
            items += tl.sum(tl.where(before, splits, 0), 0)
            merges += tl.sum((before & (splits > 1)).to(tl.int64), 0)
    return found, leading, items, merges
