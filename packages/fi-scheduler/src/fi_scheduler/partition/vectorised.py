"""The work partition in numpy: the stand-in where the native module is absent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .records import NO_SLOT, RECORD_WIDTH, Int32Array, Int64Array, PartitionParams, WorkList


@dataclass(frozen=True)
class _Line:
    """All tiles in line order: int64 arrays of equal length, but ``starts`` [tiles + 1] ends with the total cost."""

    identity: tuple[Int64Array, Int64Array, Int64Array, Int64Array]
    item_cost: Int64Array
    step_cost: Int64Array
    kv_tokens: Int64Array
    first_step: Int64Array
    steps: Int64Array
    kv_stop: Int64Array
    starts: Int64Array

    @property
    def num_tiles(self) -> int:
        return len(self.steps)


def numpy_partition(q_indptr: Int32Array, kv_lens: Int32Array, params: PartitionParams) -> WorkList:
    """The work list of a batch whose arguments are checked: q_indptr int32 [B + 1], kv_lens int32 [B]."""
    line = _lay_line(q_indptr.astype(np.int64), kv_lens.astype(np.int64), params)
    quotient, remainder = divmod(int(line.starts[-1]), params.num_workers)
    workers = np.arange(params.num_workers + 1, dtype=np.int64)
    begins = workers * quotient + workers * remainder // params.num_workers
    return (_invariant if params.max_splits else _balanced)(line, begins, params)


def _lay_line(q_indptr: Int64Array, kv_lens: Int64Array, params: PartitionParams) -> _Line:
    q_lens = np.diff(q_indptr)
    packed_rows = q_lens * params.group_size
    limits = np.array([kind.max_packed_rows for kind in params.kinds[:-1]], dtype=np.int64)
    kinds = np.searchsorted(limits, packed_rows)
    table = np.array([(k.q_rows, k.kv_tokens, k.item_cost, k.step_cost) for k in params.kinds], dtype=np.int64)
    num_q_tiles = -(-packed_rows // table[kinds, 0])

    request = np.repeat(np.arange(len(kv_lens)), num_q_tiles)
    q_tile = np.arange(len(request)) - np.repeat(np.cumsum(num_q_tiles) - num_q_tiles, num_q_tiles)
    if params.heads_first:
        kv_head = np.repeat(np.arange(params.num_kv_heads), len(request))
        request, q_tile = np.tile(request, params.num_kv_heads), np.tile(q_tile, params.num_kv_heads)
    else:
        kv_head = np.tile(np.arange(params.num_kv_heads), len(request))
        request, q_tile = np.repeat(request, params.num_kv_heads), np.repeat(q_tile, params.num_kv_heads)

    kind = kinds[request]
    q_rows, kv_tokens, item_cost, step_cost = table[kind].T
    kv_len, q_len = kv_lens[request], q_lens[request]
    row_end = np.minimum((q_tile + 1) * q_rows, packed_rows[request])
    token_end = -(-row_end // params.group_size)
    kv_stop = np.clip(kv_len - q_len + token_end, 0, kv_len) if params.causal else kv_len
    first_step = np.zeros_like(kv_len)
    if params.window is not None:
        token_begin = q_tile * q_rows // params.group_size
        kv_start = np.clip(kv_len - q_len + token_begin - params.window + 1, 0, kv_stop)
        first_step = kv_start // kv_tokens
    steps = -(-kv_stop // kv_tokens) - first_step
    starts = np.concatenate(([0], np.cumsum(item_cost + steps * step_cost))).astype(np.int64)
    return _Line((request, kv_head, q_tile, kind), item_cost, step_cost, kv_tokens, first_step, steps, kv_stop, starts)


def _records(line: _Line, tiles: Int64Array, first: Int64Array, second: Int64Array, third: Int64Array) -> Int32Array:
    columns = [column[tiles] for column in line.identity]
    return np.stack([*columns, first, second, third, np.zeros_like(tiles)], axis=1, dtype=np.int32, casting="unsafe")


def _items(
    line: _Line, tiles: Int64Array, step_begin: Int64Array, step_end: Int64Array, slot: Int64Array
) -> Int32Array:
    begin = (line.first_step[tiles] + step_begin) * line.kv_tokens[tiles]
    end = np.minimum((line.first_step[tiles] + step_end) * line.kv_tokens[tiles], line.kv_stop[tiles])
    return _records(line, tiles, begin, end, slot)


def _balanced(line: _Line, begins: Int64Array, params: PartitionParams) -> WorkList:
    """Every tile starts an item, and so does every cut inside a tile; an item ends where the next one starts."""
    num_workers, num_tiles = params.num_workers, line.num_tiles
    if num_tiles == 0:
        empty = np.zeros((0, RECORD_WIDTH), dtype=np.int32)
        return WorkList(np.zeros(num_workers + 1, dtype=np.int32), empty, empty.copy())
    cut_tile = np.searchsorted(line.starts[1:], begins[:-1], side="right")
    inside = begins[:-1] - line.starts[cut_tile] - line.item_cost[cut_tile]
    cut_step = np.maximum(inside, 0) // line.step_cost[cut_tile]
    inner = np.flatnonzero(cut_step > 0)
    inner_tile, inner_step = cut_tile[inner], cut_step[inner]

    # Stable: within a tile its start (step 0) comes first, equal cuts stay in worker order and make empty items.
    tiles = np.concatenate((np.arange(num_tiles), inner_tile))
    order = np.argsort(tiles, kind="stable")
    tiles = tiles[order]
    step_begin = np.concatenate((np.zeros(num_tiles, dtype=np.int64), inner_step))[order]
    is_last = np.append(tiles[1:] != tiles[:-1], True)
    step_end = np.where(is_last, line.steps[tiles], np.append(step_begin[1:], 0))
    # A tile's start belongs to the last worker whose cut is at or before it.
    cut_key = cut_tile * 2 + (cut_step > 0)
    start_worker = np.searchsorted(cut_key, np.arange(num_tiles) * 2, side="right") - 1
    worker = np.concatenate((start_worker, inner))[order]
    slot = np.where(step_begin > 0, worker, np.where(is_last, NO_SLOT, num_workers + worker))
    indptr = np.searchsorted(worker, np.arange(num_workers + 1)).astype(np.int32)

    split_tile, first_idx, num_cuts = np.unique(inner_tile, return_index=True, return_counts=True)
    first_cut = inner[first_idx]
    merges = _records(line, split_tile, num_workers + first_cut - 1, first_cut, first_cut + num_cuts)
    return WorkList(indptr, _items(line, tiles, step_begin, step_end, slot), merges)


def _invariant(line: _Line, begins: Int64Array, params: PartitionParams) -> WorkList:
    """Pieces of tiles, each with the worker whose range contains its start."""
    splits = np.clip(-(-line.steps // params.min_split_steps), 1, params.max_splits)
    chunk = -(-line.steps // splits)
    splits = np.maximum(1, -(-line.steps // np.maximum(chunk, 1)))
    tiles = np.repeat(np.arange(line.num_tiles), splits)
    piece = np.arange(len(tiles)) - np.repeat(np.cumsum(splits) - splits, splits)
    step_begin = piece * chunk[tiles]
    step_end = np.minimum(step_begin + chunk[tiles], line.steps[tiles])
    inside = line.item_cost[tiles] + step_begin * line.step_cost[tiles]
    position = line.starts[tiles] + np.where(piece == 0, 0, inside)
    indptr = np.searchsorted(position, begins).astype(np.int32)
    slot = np.where(splits[tiles] > 1, tiles * params.max_splits + piece, NO_SLOT)
    split = np.flatnonzero(splits > 1)
    head_slot = split * params.max_splits
    merges = _records(line, split, head_slot, head_slot + 1, head_slot + splits[split])
    return WorkList(indptr, _items(line, tiles, step_begin, step_end, slot), merges)
