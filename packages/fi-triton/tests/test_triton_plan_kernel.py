"""Planning on the device equals the scheduler's oracle bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from fi_core.records import Capacity
from fi_scheduler.partition import UNLIMITED_ROWS, PartitionBounds, PartitionParams, TileKind, oracle_partition
from fi_triton.attention.plan_kernel import DeviceWorkList, plan_on_device
from fi_triton.attention.workspace import CUT_COLUMNS, REQUEST_COLUMNS

UNWRITTEN = -7


def plan(q_lens: list[int], kv_lens: list[int], params: PartitionParams, device: str, rows: tuple[int, int]):
    """The work list in buffers of ``rows`` (items, merges) rows, poisoned first, and the lengths as numpy arrays."""
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    lengths = torch.tensor(kv_lens, dtype=torch.int32)
    out = DeviceWorkList(
        *(torch.full(shape, UNWRITTEN, dtype=torch.int32, device=device)
          for shape in ((params.num_workers + 1,), (rows[0], 8), (rows[1], 8), (1,)))
    )  # fmt: skip
    requests = torch.full((max(len(kv_lens), 1), REQUEST_COLUMNS), UNWRITTEN, dtype=torch.int64, device=device)
    cuts = torch.full((params.num_workers + 1, CUT_COLUMNS), UNWRITTEN, dtype=torch.int64, device=device)
    plan_on_device(q_indptr.to(device), lengths.to(device), params, requests, cuts, out)
    return out, q_indptr.numpy(), lengths.numpy()


def compare(q_lens: list[int], kv_lens: list[int], params: PartitionParams, device: str) -> None:
    capacity = Capacity(max(len(q_lens), 1), max(sum(q_lens), 1), max([*q_lens, 1]), max([*kv_lens, 1]))
    bounds = PartitionBounds.from_capacity(params, capacity)
    out, q_indptr, lengths = plan(q_lens, kv_lens, params, device, (bounds.max_items, max(bounds.max_merges, 1)))
    expected = oracle_partition(q_indptr, lengths, params)
    assert out.worker_indptr.tolist() == expected.worker_indptr.tolist()
    assert out.num_merges.item() == len(expected.merges)
    for actual, wanted in ((out.items, expected.items), (out.merges, expected.merges)):
        assert actual[: len(wanted)].tolist() == wanted.tolist()
        assert (actual[len(wanted) :] == UNWRITTEN).all()


def random_params(rng: random.Random) -> PartitionParams:
    small = TileKind(16, 32, 16, rng.randint(1, 3), rng.randint(1, 3))
    big = TileKind(64, 64, UNLIMITED_ROWS, rng.randint(1, 5), rng.randint(1, 3))
    max_splits = rng.choice([0, 0, 1, 3])
    return PartitionParams(
        num_workers=rng.choice([1, 2, 5, 9, 33]),
        num_kv_heads=rng.choice([1, 2, 3]),
        group_size=rng.choice([1, 3, 4]),
        kinds=rng.choice([(small, big), (big,)]),
        causal=rng.random() < 0.5,
        window=rng.choice([None, 1, 50, 500]),
        max_splits=max_splits,
        min_split_steps=rng.choice([1, 2]) if max_splits else 1,
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_batches(seed, device):
    rng = random.Random(seed)
    size = rng.choice([0, 1, 2, 5, 9])
    q_lens = [rng.choice([0, 1, 1, 5, 70, 200]) for _ in range(size)]
    kv_lens = [rng.choice([0, 1, 33, 64, 700, 3000]) for _ in range(size)]
    compare(q_lens, kv_lens, random_params(rng), device)


def params_with(**changes) -> PartitionParams:
    values = {"num_workers": 7, "num_kv_heads": 2, "group_size": 4, "kinds": (TileKind(16, 32, UNLIMITED_ROWS, 2, 2),)}
    return PartitionParams(**{**values, "causal": True, "window": None, **changes})


@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([0, 0, 0], [5, 0, 9]),
        ([1], [0]),
        ([1, 1, 1], [0, 0, 0]),
        ([5, 3], [2, 0]),
        ([0, 1, 0, 0, 1, 0], [9, 100, 9, 9, 2000, 9]),
        ([0, 1, 0, 2] * 260, [37, 90, 5, 1] * 260),
        ([700], [100000]),
        ([1], [2_000_000_000]),
    ],
    ids=["no tokens", "no keys", "padding", "queries before keys", "gaps", "many requests", "many tiles", "longest"],
)
def test_shapes(q_lens, kv_lens, device):
    compare(q_lens, kv_lens, params_with(), device)


@pytest.mark.parametrize("max_splits", [0, 2])
def test_a_batch_beyond_the_capacity_writes_nothing_past_the_buffers(max_splits, device):
    params = params_with(max_splits=max_splits, num_workers=9)
    out, q_indptr, lengths = plan([1, 40], [900, 900], params, device, (50, 30))
    short, _, _ = plan([1, 40], [900, 900], params, device, (5, 1))
    expected = oracle_partition(q_indptr, lengths, params)
    assert 5 < len(expected.items) <= 50 and 1 < len(expected.merges) <= 30
    assert short.items.tolist() == out.items[:5].tolist()
    assert short.merges.tolist() == out.merges[:1].tolist()
    assert short.num_merges.item() == 1
    assert max(short.worker_indptr.tolist()) == 5
