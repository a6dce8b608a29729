"""The work partition in plain Python: written to be read, and what every other implementation is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .records import NO_SLOT, RECORD_WIDTH, PartitionParams, TileKind, WorkList


@dataclass(frozen=True)
class Tile:
    """One query tile of one KV head, and where it stands on the line of costs."""

    request: int
    kv_head: int
    q_tile: int
    kind_idx: int
    kind: TileKind
    first_step: int
    steps: int
    kv_stop: int
    start: int = 0

    @property
    def cost(self) -> int:
        return self.kind.item_cost + self.steps * self.kind.step_cost

    def tokens(self, step_begin: int, step_end: int) -> tuple[int, int]:
        """KV tokens [begin, end) of the tile's steps [step_begin, step_end)."""
        size = self.kind.kv_tokens
        return (self.first_step + step_begin) * size, min((self.first_step + step_end) * size, self.kv_stop)


Row = tuple[int, int, int, int, int, int, int, int]


def oracle_partition(q_indptr: Sequence[int], kv_lens: Sequence[int], params: PartitionParams) -> WorkList:
    """The work list of a batch; the same as ``partition``, with unbounded Python integers and no argument checks."""
    # Elements of int32 arrays would overflow.
    tiles = _tiles_on_line([int(value) for value in q_indptr], [int(value) for value in kv_lens], params)
    items, merges = (_invariant if params.max_splits else _balanced)(tiles, params)
    counts = [len(rows) for rows in items]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    flat = [row for rows in items for row in rows]
    return WorkList(indptr, _rows_array(flat), _rows_array(merges))


def _rows_array(rows: list[Row]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(rows, dtype=np.int32).reshape(len(rows), RECORD_WIDTH)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _request_tiles(request: int, q_len: int, kv_len: int, params: PartitionParams) -> Iterator[Tile]:
    """Query tiles of one request for KV head 0, not yet placed on the line."""
    group = params.group_size
    packed_rows = q_len * group
    kind_idx = params.kind_of(packed_rows)
    kind = params.kinds[kind_idx]
    offset = kv_len - q_len
    for q_tile in range(_ceil_div(packed_rows, kind.q_rows)):
        row_end = min((q_tile + 1) * kind.q_rows, packed_rows)
        token_begin = q_tile * kind.q_rows // group
        token_end = _ceil_div(row_end, group)
        kv_stop = _clamp(offset + token_end, 0, kv_len) if params.causal else kv_len
        kv_start = 0 if params.window is None else _clamp(offset + token_begin - params.window + 1, 0, kv_stop)
        first_step = kv_start // kind.kv_tokens
        steps = _ceil_div(kv_stop, kind.kv_tokens) - first_step if kv_stop > kv_start else 0
        yield Tile(request, 0, q_tile, kind_idx, kind, first_step, steps, kv_stop)


def _tiles_on_line(q_indptr: Sequence[int], kv_lens: Sequence[int], params: PartitionParams) -> list[Tile]:
    per_head = [
        tile
        for request, kv_len in enumerate(kv_lens)
        for tile in _request_tiles(request, q_indptr[request + 1] - q_indptr[request], kv_len, params)
    ]
    heads = range(params.num_kv_heads)
    if params.heads_first:
        order = [(tile, head) for head in heads for tile in per_head]
    else:
        order = [(tile, head) for tile in per_head for head in heads]
    placed = []
    start = 0
    for tile, head in order:
        placed.append(
            Tile(
                tile.request,
                head,
                tile.q_tile,
                tile.kind_idx,
                tile.kind,
                tile.first_step,
                tile.steps,
                tile.kv_stop,
                start,
            )
        )
        start += tile.cost
    return placed


def _row(tile: Tile, *columns: int) -> Row:
    first, second, third = columns
    return tile.request, tile.kv_head, tile.q_tile, tile.kind_idx, first, second, third, 0


def _balanced(tiles: list[Tile], params: PartitionParams) -> tuple[list[list[Row]], list[Row]]:
    """Each worker's stretch of the line, cut at whole KV steps."""
    num_workers = params.num_workers
    total = sum(tile.cost for tile in tiles)
    cuts = [_cut(tiles, worker * total // num_workers) for worker in range(num_workers + 1)]
    items: list[list[Row]] = []
    for worker in range(num_workers):
        (first_tile, first_step), (last_tile, last_step) = cuts[worker], cuts[worker + 1]
        rows = []
        for tile_idx in range(first_tile, min(last_tile + 1, len(tiles))):
            tile = tiles[tile_idx]
            begin = first_step if tile_idx == first_tile else 0
            ends_inside = tile_idx == last_tile
            end = last_step if ends_inside else tile.steps
            if ends_inside and end == 0:
                continue
            slot = worker if begin > 0 else num_workers + worker if ends_inside else NO_SLOT
            rows.append(_row(tile, *tile.tokens(begin, end), slot))
        items.append(rows)
    merges = []
    inside: dict[int, list[int]] = {}
    for worker, (tile_idx, step) in enumerate(cuts):
        if step > 0:
            inside.setdefault(tile_idx, []).append(worker)
    for tile_idx, workers in inside.items():
        first, last = workers[0] - 1, workers[-1]
        merges.append(_row(tiles[tile_idx], num_workers + first, first + 1, last + 1))
    return items, merges


def _cut(tiles: list[Tile], position: int) -> tuple[int, int]:
    """(tile index, step inside it) at ``position``; (len(tiles), 0) at the end of the line."""
    low, high = 0, len(tiles)
    while low < high:
        middle = (low + high) // 2
        if tiles[middle].start + tiles[middle].cost <= position:
            low = middle + 1
        else:
            high = middle
    if low == len(tiles):
        return low, 0
    inside = position - tiles[low].start - tiles[low].kind.item_cost
    return low, 0 if inside <= 0 else inside // tiles[low].kind.step_cost


def _invariant(tiles: list[Tile], params: PartitionParams) -> tuple[list[list[Row]], list[Row]]:
    """Tiles split on their own length; a piece belongs to the worker whose stretch of the line contains its start."""
    num_workers = params.num_workers
    total = sum(tile.cost for tile in tiles)
    items: list[list[Row]] = [[] for _ in range(num_workers)]
    merges = []
    worker = 0
    for tile_idx, tile in enumerate(tiles):
        splits = _clamp(_ceil_div(tile.steps, params.min_split_steps), 1, params.max_splits)
        chunk = _ceil_div(tile.steps, splits)
        splits = max(1, _ceil_div(tile.steps, chunk)) if chunk else 1
        slot = tile_idx * params.max_splits
        for piece in range(splits):
            begin, end = piece * chunk, min((piece + 1) * chunk, tile.steps)
            start = tile.start if piece == 0 else tile.start + tile.kind.item_cost + begin * tile.kind.step_cost
            while start >= (worker + 1) * total // num_workers:
                worker += 1
            items[worker].append(_row(tile, *tile.tokens(begin, end), NO_SLOT if splits == 1 else slot + piece))
        if splits > 1:
            merges.append(_row(tile, slot, slot + 1, slot + splits))
    return items, merges
