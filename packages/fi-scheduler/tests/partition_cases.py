"""Batches and parameters that the partition's tests share."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from fi_scheduler.partition import UNLIMITED_ROWS, PartitionParams, TileKind, WorkList
from hypothesis import strategies as st

ONE_KIND = (TileKind(64, 64, UNLIMITED_ROWS, 2, 1),)
TWO_KINDS = (TileKind(16, 32, 16, 3, 2), TileKind(128, 64, UNLIMITED_ROWS, 1, 5))


def lengths(shape: str, num_requests: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(q_indptr, kv_lens) int32 of a batch of one length shape."""
    rng = np.random.default_rng(seed)
    q_lens = np.ones(num_requests, dtype=np.int64)
    kv_lens = np.full(num_requests, 777)
    if shape == "uniform":
        kv_lens = rng.integers(1, 3000, num_requests)
    elif shape == "zipf":
        kv_lens = np.minimum(rng.zipf(1.3, num_requests), 20000)
    elif shape == "one_long":
        kv_lens = rng.integers(1, 20, num_requests)
        kv_lens[num_requests // 2] = 100_000
    elif shape == "zeros":
        kv_lens = rng.integers(0, 2, num_requests) * rng.integers(0, 500, num_requests)
        q_lens = rng.integers(0, 2, num_requests)
    elif shape == "query_longer":
        q_lens = rng.integers(0, 60, num_requests)
        kv_lens = rng.integers(0, 40, num_requests)
    elif shape == "mixed":
        q_lens[:: max(1, num_requests // 6)] = 200
        kv_lens = rng.integers(0, 2000, num_requests) + q_lens
    return np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32), kv_lens.astype(np.int32)


LENGTH_SHAPES = ("constant", "uniform", "zipf", "one_long", "zeros", "query_longer", "mixed")


def native_work_list(
    native: ModuleType, function: str, q_indptr: np.ndarray, kv_lens: np.ndarray, params: PartitionParams
) -> WorkList:
    """What the native module's ``function`` writes into poisoned buffers; rows past the result must stay poisoned."""
    valid, _, max_items, max_merges = native.measure(q_indptr, kv_lens, params.packed)
    assert valid
    out = WorkList.allocate(params.num_workers, max_items + 3, max_merges + 3)
    for array in (out.worker_indptr, out.items, out.merges):
        array.fill(-77)
    run = getattr(native, function)
    written, num_items, num_merges = run(q_indptr, kv_lens, params.packed, out.worker_indptr, out.items, out.merges)
    assert written
    assert (out.items[num_items:] == -77).all() and (out.merges[num_merges:] == -77).all()
    return WorkList(out.worker_indptr, out.items[:num_items], out.merges[:num_merges])


def assert_same(actual: WorkList, expected: WorkList) -> None:
    for name in ("worker_indptr", "items", "merges"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert mine.dtype == np.int32 and theirs.dtype == np.int32
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


@st.composite
def tile_kinds(draw: st.DrawFn) -> tuple[TileKind, ...]:
    limits = [*sorted(draw(st.sets(st.integers(1, 150), max_size=2))), UNLIMITED_ROWS]
    sizes = st.sampled_from((1, 3, 16, 64))
    costs = st.integers(1, 9)
    return tuple(TileKind(draw(sizes), draw(sizes), limit, draw(costs), draw(costs)) for limit in limits)


@st.composite
def partition_params(draw: st.DrawFn, balanced: bool | None = None) -> PartitionParams:
    is_balanced = draw(st.booleans()) if balanced is None else balanced
    return PartitionParams(
        num_workers=draw(st.sampled_from((1, 2, 5, 13, 132))),
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from((1, 3, 4, 7))),
        kinds=draw(tile_kinds()),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 300)),
        heads_first=draw(st.booleans()),
        max_splits=0 if is_balanced else draw(st.integers(1, 8)),
        min_split_steps=1 if is_balanced else draw(st.integers(1, 5)),
    )


@st.composite
def batches(draw: st.DrawFn, max_requests: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(q_indptr, kv_lens): empty requests, padding rows and q_len > kv_len included."""
    q_lens = draw(st.lists(st.sampled_from((0, 1, 1, 1, 2, 5, 33, 70)), max_size=max_requests))
    kv_len = st.sampled_from((0, 1, 16, 63, 64, 65, 700)) | st.integers(0, 900)
    kv_lens = [draw(kv_len) for _ in q_lens]
    return np.cumsum([0, *q_lens]).astype(np.int32), np.array(kv_lens, dtype=np.int32)
