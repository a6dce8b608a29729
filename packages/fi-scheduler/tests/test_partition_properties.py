"""Properties of the work partition that do not lean on the oracle's own arithmetic."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from fi_core.errors import ArgumentError, CapacityError
from fi_core.records import Capacity
from fi_scheduler.partition import (
    COL_HEAD_SLOT,
    COL_KIND,
    COL_KV_BEGIN,
    COL_KV_END,
    COL_KV_HEAD,
    COL_Q_TILE,
    COL_REQUEST,
    COL_SLOT,
    COL_TAIL_BEGIN,
    COL_TAIL_END,
    NO_SLOT,
    UNLIMITED_ROWS,
    PartitionBounds,
    PartitionParams,
    TileKind,
    WorkList,
    partition,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import ONE_KIND, TWO_KINDS, batches, lengths, partition_params

Batch = tuple[np.ndarray, np.ndarray]
TileKey = tuple[int, int, int]


def tile_key(row: np.ndarray) -> TileKey:
    return int(row[COL_REQUEST]), int(row[COL_KV_HEAD]), int(row[COL_Q_TILE])


def visible_pairs(batch: Batch, params: PartitionParams) -> dict[TileKey, set[int]]:
    """KV tokens that some row of each tile sees, from the masks' definition, row by row."""
    q_indptr, kv_lens = batch
    seen: dict[TileKey, set[int]] = {}
    for request, kv_len in enumerate(kv_lens.tolist()):
        q_len = int(q_indptr[request + 1] - q_indptr[request])
        packed_rows = q_len * params.group_size
        kind = params.kinds[params.kind_of(packed_rows)]
        for row in range(packed_rows):
            position = kv_len - q_len + row // params.group_size
            high = min(kv_len, position + 1) if params.causal else kv_len
            low = 0 if params.window is None else max(0, position - params.window + 1)
            for head in range(params.num_kv_heads):
                seen.setdefault((request, head, row // kind.q_rows), set()).update(range(low, high))
    return seen


def item_cost(params: PartitionParams, row: np.ndarray) -> int:
    kind = params.kinds[row[COL_KIND]]
    return -(-int(row[COL_KV_END] - row[COL_KV_BEGIN]) // kind.kv_tokens) * kind.step_cost


@settings(max_examples=60, deadline=None)
@given(batch=batches(max_requests=4), params=partition_params())
def test_every_tile_and_step_is_covered_exactly_once(batch: Batch, params: PartitionParams) -> None:
    work = partition(*batch, params)
    covered: dict[TileKey, list[tuple[int, int, int]]] = defaultdict(list)
    for row in work.items:
        covered[tile_key(row)].append((int(row[COL_KV_BEGIN]), int(row[COL_KV_END]), int(row[COL_KIND])))
    needed = visible_pairs(batch, params)
    assert set(covered) == set(needed)
    for key, pieces in covered.items():
        size = params.kinds[pieces[0][2]].kv_tokens
        for (_, left_end, _), (right_begin, _, _) in zip(pieces, pieces[1:], strict=False):
            assert left_end == right_begin and left_end % size == 0
        begin, end = pieces[0][0], pieces[-1][1]
        assert begin % size == 0
        if needed[key]:
            # Reads nothing beyond the last visible token, and less than one step before the first.
            assert end == max(needed[key]) + 1 and begin == min(needed[key]) // size * size
        else:
            assert begin == end


@settings(max_examples=100, deadline=None)
@given(batch=batches(), params=partition_params())
def test_slots_and_merges_pair_up(batch: Batch, params: PartitionParams) -> None:
    work = partition(*batch, params)
    slots: dict[TileKey, list[int]] = defaultdict(list)
    whole = set()
    for row in work.items:
        if row[COL_SLOT] == NO_SLOT:
            whole.add(tile_key(row))
        else:
            slots[tile_key(row)].append(int(row[COL_SLOT]))
    assert not whole & set(slots)
    used = [slot for tile in slots.values() for slot in tile]
    assert len(used) == len(set(used))
    merged = {tile_key(row): row for row in work.merges}
    assert set(merged) == set(slots) and len(merged) == len(work.merges)
    for key, row in merged.items():
        # The items of a tile, in line order, fill the head slot and then the tail slots in ascending order.
        expected = [int(row[COL_HEAD_SLOT]), *range(row[COL_TAIL_BEGIN], row[COL_TAIL_END])]
        assert slots[key] == expected and len(expected) >= 2


@settings(max_examples=100, deadline=None)
@given(batch=batches(), params=partition_params(balanced=True))
def test_balanced_workers_have_equal_shares(batch: Batch, params: PartitionParams) -> None:
    work = partition(*batch, params)
    largest = max(kind.item_cost + kind.step_cost for kind in params.kinds)
    started = work.items[~np.isin(work.items[:, COL_SLOT], range(params.num_workers))]
    total = sum(item_cost(params, row) for row in work.items)
    total += sum(params.kinds[row[COL_KIND]].item_cost for row in started)
    for worker in range(params.num_workers):
        rows = work.items[work.worker_indptr[worker] : work.worker_indptr[worker + 1]]
        assert (rows[:, COL_SLOT] != NO_SLOT).sum() <= 2
        cost = sum(item_cost(params, row) for row in rows)
        begun = [row for row in rows if row[COL_SLOT] not in range(params.num_workers)]
        cost += sum(params.kinds[row[COL_KIND]].item_cost for row in begun)
        share = total / params.num_workers
        assert abs(cost - share) <= largest + 1


@pytest.mark.parametrize("shape", ["uniform", "one_long", "mixed"])
def test_balanced_shares_of_large_batches(shape: str) -> None:
    """With many more steps than workers the busiest has at most a step and an item more than the mean."""
    q_indptr, kv_lens = lengths(shape, 256)
    params = PartitionParams(132, 8, 4, ONE_KIND, True, None)
    work = partition(q_indptr, kv_lens, params)
    kind = ONE_KIND[0]
    steps = -(-(work.items[:, COL_KV_END] - work.items[:, COL_KV_BEGIN]) // kind.kv_tokens)
    starts = (work.items[:, COL_SLOT] == NO_SLOT) | (work.items[:, COL_SLOT] >= params.num_workers)
    costs = np.add.reduceat(steps * kind.step_cost + starts * kind.item_cost, work.worker_indptr[:-1])
    assert costs.max() <= costs.mean() + kind.step_cost + kind.item_cost


@settings(max_examples=60, deadline=None)
@given(
    left=batches(max_requests=3),
    own=st.tuples(st.integers(1, 80), st.integers(0, 900)),
    right=batches(max_requests=3),
    params=partition_params(balanced=False),
    workers=st.integers(1, 40),
)
def test_invariant_split_points_ignore_the_rest_of_the_batch(
    left: Batch, own: tuple[int, int], right: Batch, params: PartitionParams, workers: int
) -> None:
    def pieces(work: WorkList, request: int) -> list[tuple[int, ...]]:
        columns = (COL_KV_HEAD, COL_Q_TILE, COL_KV_BEGIN, COL_KV_END)
        rows = work.items[work.items[:, COL_REQUEST] == request]
        return sorted(tuple(int(row[column]) for column in columns) for row in rows)

    q_len, kv_len = own
    q_lens = np.concatenate((np.diff(left[0]), [q_len], np.diff(right[0])))
    q_indptr = np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32)
    kv_lens = np.concatenate((left[1], [kv_len], right[1])).astype(np.int32)
    crowd = partition(q_indptr, kv_lens, replace(params, num_workers=workers))
    alone = partition(np.array([0, q_len], dtype=np.int32), np.array([kv_len], dtype=np.int32), params)
    assert pieces(crowd, len(left[1])) == pieces(alone, 0)


def capacity_of(batch: Batch) -> Capacity:
    q_lens = np.diff(batch[0])
    tokens, longest = max(int(batch[0][-1]), 1), max(int(q_lens.max(initial=0)), 1)
    return Capacity(max(len(q_lens), 1), tokens, longest, max(int(batch[1].max(initial=0)), 1))


@settings(max_examples=150, deadline=None)
@given(batch=batches(), params=partition_params())
def test_bounds_are_never_exceeded(batch: Batch, params: PartitionParams) -> None:
    bounds = PartitionBounds.from_capacity(params, capacity_of(batch))
    work = partition(*batch, params, WorkList.for_bounds(bounds))
    assert len({tile_key(row) for row in work.items}) <= bounds.max_tiles
    assert len(work.items) <= bounds.max_items and len(work.merges) <= bounds.max_merges
    assert work.items[:, COL_SLOT].max(initial=0) < bounds.num_slots
    assert work.merges[:, COL_TAIL_END].max(initial=0) <= bounds.num_slots


def most_tiles(params: PartitionParams, capacity: Capacity) -> int:
    """Most tiles of any legal batch, by dynamic programming over (requests, tokens)."""
    best = [0] * (capacity.max_q_tokens + 1)
    for _ in range(capacity.max_batch):
        best = [
            max(best[tokens - q_len] + params.num_tiles(q_len) for q_len in range(min(tokens, capacity.max_q_len) + 1))
            for tokens in range(capacity.max_q_tokens + 1)
        ]
    return best[-1] * params.num_kv_heads


@settings(max_examples=80, deadline=None)
@given(
    params=partition_params(balanced=True),
    max_batch=st.integers(1, 6),
    max_q_tokens=st.integers(1, 60),
    max_q_len=st.integers(1, 60),
)
def test_bounds_are_tight(params: PartitionParams, max_batch: int, max_q_tokens: int, max_q_len: int) -> None:
    capacity = Capacity(max_batch, max_q_tokens, min(max_q_len, max_q_tokens), 100)
    bounds = PartitionBounds.from_capacity(params, capacity)
    exact = most_tiles(params, capacity)
    # The concave hull is met by batches of two neighbouring lengths; one of them may not fill up.
    largest_step = max(params.num_tiles(q_len) for q_len in range(capacity.max_q_len + 1))
    assert exact <= bounds.max_tiles <= exact + params.num_kv_heads * largest_step
    assert bounds.max_items == bounds.max_tiles + 2 * params.num_workers
    assert bounds.num_slots == 2 * params.num_workers


@pytest.mark.parametrize(
    ("capacity", "tiles"),
    [
        (Capacity(256, 256, 1, 1000), 256),
        (Capacity(256, 8192, 8192, 131072), 256 + (8192 - 256) * 4 // 128),
        (Capacity(1, 8192, 8192, 131072), 8192 * 4 // 128),
    ],
)
def test_bounds_of_common_capacities(capacity: Capacity, tiles: int) -> None:
    params = PartitionParams(132, 8, 4, TWO_KINDS, True, None)
    assert PartitionBounds.from_capacity(params, capacity).max_tiles == 8 * tiles
    invariant = PartitionBounds.from_capacity(replace(params, max_splits=16), capacity)
    assert (invariant.max_items, invariant.max_merges, invariant.num_slots) == (128 * tiles, 8 * tiles, 128 * tiles)


def test_capacities_that_do_not_fit_are_refused() -> None:
    limited = PartitionParams(4, 1, 4, (TileKind(16, 16, 64, 1, 1),), True, None)
    with pytest.raises(CapacityError, match=r"capacity.max_q_len: expected at most 64 packed rows"):
        PartitionBounds.from_capacity(limited, Capacity(8, 100, 17, 100))
    splits = PartitionParams(4, 2**16, 1, ONE_KIND, True, None, max_splits=2**16)
    with pytest.raises(CapacityError, match="items and slots"):
        PartitionBounds.from_capacity(splits, Capacity(8, 8, 1, 100))
    slow = PartitionParams(4, 2**10, 1, (TileKind(1, 1, UNLIMITED_ROWS, 1, 2**24),), True, None)
    with pytest.raises(CapacityError, match="total cost"):
        PartitionBounds.from_capacity(slow, Capacity(2**16, 2**16, 1, 2**31 - 1))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"num_workers": 0}, "params.num_workers"),
        ({"num_kv_heads": -1}, "params.num_kv_heads"),
        ({"group_size": 1.0}, "params.group_size"),
        ({"causal": 1}, "params.causal"),
        ({"window": 0}, "params.window"),
        ({"kinds": ()}, "params.kinds"),
        ({"kinds": TWO_KINDS[::-1]}, "params.kinds"),
        ({"max_splits": -1}, "params.max_splits"),
        ({"min_split_steps": 2}, "params.min_split_steps"),
        ({"heads_first": None}, "params.heads_first"),
    ],
)
def test_bad_params_are_named(change: dict[str, object], argument: str) -> None:
    good = PartitionParams(4, 1, 4, TWO_KINDS, True, None)
    with pytest.raises(ArgumentError) as caught:
        replace(good, **change)  # type: ignore[arg-type]
    assert caught.value.argument == argument


@pytest.mark.parametrize("field", ["q_rows", "kv_tokens", "max_packed_rows", "item_cost", "step_cost"])
def test_bad_kinds_are_named(field: str) -> None:
    for value in (0, -1, 2.0, True, 2**63):
        with pytest.raises(ArgumentError, match=f"kind.{field}"):
            replace(ONE_KIND[0], **{field: value})
