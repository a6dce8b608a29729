"""The work list that the GPU plans: its rows equal the scheduler's oracle, computed on the host and on the device."""

from __future__ import annotations

import ctypes
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fi_core.records import Capacity
from fi_cuda.compile import INCLUDE_FOLDER, compile_source
from fi_cuda.kernels.attention.plan import (
    ITEM_WIDTH,
    START_WIDTH,
    DevicePlanner,
    DeviceWorkList,
    counts_in_32_bits,
    fill_on_host,
    plan_spec,
    scratch_bytes,
)
from fi_cuda.source import CompileTarget
from fi_scheduler import build_native
from fi_scheduler.partition import (
    UNLIMITED_ROWS,
    PartitionBounds,
    PartitionParams,
    TileKind,
    WorkList,
    include_folder,
    oracle_partition,
)

pytestmark = pytest.mark.timeout(180)

POISON = -77
SPARE = 3
DECODE = PartitionParams(132, 8, 4, (TileKind(8, 16, 8, 4, 1),), True, None)

Fill = Callable[[torch.Tensor, torch.Tensor, PartitionParams, int, DeviceWorkList], None]


def poisoned(params: PartitionParams, bounds: PartitionBounds, device: str = "cpu") -> DeviceWorkList:
    workers = params.num_workers
    rows = bounds.max_items + SPARE, max(bounds.max_merges, 1) + SPARE
    shapes = ((workers, START_WIDTH), (rows[0], ITEM_WIDTH), (workers + 1,), (rows[1], 8), (1,))
    return DeviceWorkList(*(torch.full(shape, POISON, dtype=torch.int32, device=device) for shape in shapes))


def capacity_of(q_lens: list[int], kv_lens: list[int], max_batch: int = 1) -> Capacity:
    return Capacity(max(len(q_lens), max_batch), max(sum(q_lens), 1), max([*q_lens, 1]), max([*kv_lens, 1]))


def bounds_of(q_lens: list[int], kv_lens: list[int], params: PartitionParams) -> PartitionBounds:
    return PartitionBounds.from_capacity(params, capacity_of(q_lens, kv_lens))


def expected_items(q_indptr: list[int], kv_lens: list[int], work: WorkList) -> list[list[int]]:
    """The oracle's items with the columns that the attention kernels add, found by looking each merge record up."""
    merge_of = {tuple(row[:3]): index for index, row in enumerate(work.merges.tolist())}
    rows = []
    for item in work.items.tolist():
        request, slot = item[0], item[6]
        tile = [-1, 0, 0, 0, 0]
        if slot >= 0:
            merge_idx = merge_of[tuple(item[:3])]
            tile = [merge_idx, *work.merges[merge_idx, 4:7].tolist(), 0]
        rows.append([*item, q_indptr[request], q_indptr[request + 1] - q_indptr[request], kv_lens[request], *tile])
    return rows


def sharing_workers(q_indptr: list[int], kv_lens: list[int], params: PartitionParams) -> PartitionParams:
    """With as many workers as get a step and a third of an item's cost each, of the cost of all tiles, which one would have
    whole."""
    if params.max_splits:
        return params
    total = 0
    for row in oracle_partition(q_indptr, kv_lens, replace(params, num_workers=1)).items.tolist():
        kind = params.kinds[row[3]]
        first = row[4] // kind.kv_tokens
        total += kind.item_cost + len(range(first * kind.kv_tokens, row[5], kind.kv_tokens)) * kind.step_cost
    share = max(params.kinds[0].item_cost // 3, params.kinds[0].step_cost)
    return replace(params, num_workers=max(1, min(params.num_workers, total // share)))


def check(q_lens: list[int], kv_lens: list[int], params: PartitionParams, fill: Fill, device: str = "cpu") -> WorkList:
    q_indptr = np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32)
    work = oracle_partition(q_indptr.tolist(), kv_lens, sharing_workers(q_indptr.tolist(), kv_lens, params))
    idle = params.num_workers + 1 - len(work.worker_indptr)
    work = replace(work, worker_indptr=np.append(work.worker_indptr, [len(work.items)] * idle).astype(np.int32))
    bounds = bounds_of(q_lens, kv_lens, params)
    lists = poisoned(params, bounds, device)
    lengths = torch.from_numpy(q_indptr).to(device), torch.tensor(kv_lens, dtype=torch.int32, device=device)
    fill(*lengths, params, bounds.max_tiles, lists)
    starts, items, worker_indptr, merges, num_merges = (tensor.cpu() for tensor in lists)
    rows = expected_items(q_indptr.tolist(), kv_lens, work)
    assert worker_indptr.tolist() == work.worker_indptr.tolist()
    assert num_merges.item() == len(work.merges)
    assert merges[: len(work.merges)].tolist() == work.merges.tolist()
    assert items[: len(rows)].tolist() == rows
    assert (items[len(rows) :] == POISON).all() and (merges[len(work.merges) :] == POISON).all()
    for worker, (begin, end) in enumerate(zip(work.worker_indptr, work.worker_indptr[1:], strict=False)):
        assert starts[worker, :2].tolist() == [begin, end]
        assert begin == end or starts[worker, 16:].tolist() == rows[begin]
    return work


def random_params(rng: random.Random) -> PartitionParams:
    max_splits = rng.choice([0, 0, 1, 3, 16])
    group = rng.choice([1, 3, 4, 7])
    costs = [(rng.randint(1, 9), rng.randint(1, 4)) for _ in range(3)]
    kinds = [TileKind(rng.choice([1, 8, 16]), rng.choice([1, 16, 64]), rng.randint(1, 40), *costs[0])]
    kinds.append(TileKind(rng.choice([16, 64]), rng.choice([16, 48]), rng.randint(41, 90), *costs[1]))
    kinds.append(TileKind(rng.choice([64, 128]), 64, UNLIMITED_ROWS, *costs[2]))
    single = TileKind(group * 70, 16, group * 70, *costs[0])
    return PartitionParams(
        num_workers=rng.choice([1, 2, 5, 9, 33, 132]),
        num_kv_heads=rng.choice([1, 2, 3, 8]),
        group_size=group,
        kinds=rng.choice([(single,), (kinds[2],), tuple(kinds[1:]), tuple(kinds)]),
        causal=rng.random() < 0.7,
        window=rng.choice([None, None, 1, 50, 500]),
        heads_first=rng.random() < 0.2,
        max_splits=max_splits,
        min_split_steps=rng.choice([1, 2, 8]) if max_splits else 1,
    )


def random_lengths(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    q_choices = rng.choice([(1,), (0, 1), (1, 5), (0, 1, 2, 33, 70)])
    kv_choices = rng.choice([(0, 1, 16, 63, 64, 65), (700, 3000), (0, 5, 20000)])
    return [rng.choice(q_choices) for _ in range(size)], [rng.choice(kv_choices) for _ in range(size)]


HOSTILE = {
    "no requests": ([], []),
    "no tokens": ([0, 0, 0], [5, 0, 9]),
    "no keys": ([1], [0]),
    "padding": ([1, 1, 1], [0, 0, 0]),
    "queries before keys": ([2, 1], [1, 0]),
    "gaps": ([0, 1, 0, 0, 1, 0], [9, 100, 9, 9, 2000, 9]),
    "one token": ([1], [1]),
    "longest": ([1], [2_000_000_000]),
    "over 32 bits": ([1] * 4, [2**31 - 1] * 4),
    "skewed": ([1] * 9, [3, 1, 90_000, 2, 0, 7, 1, 40_000, 5]),
    "many requests": ([0, 1, 0, 2] * 65, [37, 90, 5, 1] * 65),
}
VARIANTS = {
    "decode": DECODE,
    "one head": replace(DECODE, num_kv_heads=1, group_size=8, kinds=(TileKind(16, 16, 16, 4, 1),)),
    "window": replace(DECODE, window=128),
    "not causal": replace(DECODE, causal=False),
    "invariant": replace(DECODE, max_splits=16, min_split_steps=64),
    "invariant with window": replace(DECODE, max_splits=3, min_split_steps=1, window=500),
    "heads first": replace(DECODE, heads_first=True),
    "invariant, heads first": replace(DECODE, heads_first=True, max_splits=4),
    "costly steps": replace(DECODE, kinds=(TileKind(8, 1, 8, 2**20, 2**10),), num_workers=61),
}


# On the host


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Fill:
    """The header's arithmetic compiled for the host."""
    compiler = build_native.find_compiler()
    assert compiler is not None, "these tests need a C++ compiler"
    folder = tmp_path_factory.mktemp("plan")
    folders = [f"-I{folder}" for folder in (INCLUDE_FOLDER, include_folder())]
    source = str(Path(__file__).parent / "plan_on_host.cpp")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    functions = {}
    for narrow, width in {False: [], True: ["-DFI_PARTITION_INT=int"]}.items():
        library = folder / f"plan{narrow}.so"
        subprocess.run([compiler, *flags, *width, *folders, source, "-o", str(library)], check=True)
        functions[narrow] = ctypes.CDLL(str(library)).plan_on_host
        functions[narrow].argtypes = (
            [ctypes.c_void_p] * 2 + [ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong] + [ctypes.c_void_p] * 5
        )

    def fill(q_indptr, kv_lens, params, max_tiles, lists):
        packed = params.packed
        tensors = (tensor.data_ptr() for tensor in lists)
        size = kv_lens.shape[0]
        narrow = counts_in_32_bits(params, capacity_of(q_indptr.diff().tolist(), kv_lens.tolist()))
        functions[narrow](q_indptr.data_ptr(), kv_lens.data_ptr(), size, packed.ctypes.data, max_tiles, *tensors)

    return fill


def from_host(q_indptr, kv_lens, params, max_tiles, lists):
    fill_on_host(q_indptr, kv_lens, params, lists)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", HOSTILE)
def test_rows_of_hostile_batches(batch, variant, emulated):
    for fill in (emulated, from_host):
        check(*HOSTILE[batch], VARIANTS[variant], fill)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_random_batches(seed, emulated):
    rng = random.Random(seed)
    num_merges = num_empty = 0
    for _ in range(100):
        batch = random_lengths(rng, rng.choice([0, 1, 2, 5, 17]))
        work = check(*batch, random_params(rng), emulated)
        check(*batch, random_params(rng), from_host)
        num_merges += len(work.merges)
        num_empty += int((work.items[:, 4] == work.items[:, 5]).sum())
    assert num_merges > 100 and num_empty > 10  # the seeds reach what is hard


@pytest.mark.parametrize("variant", ["decode", "window", "invariant"])
def test_rows_of_large_batches(variant, emulated):
    rng = random.Random(7)
    for size in (256, 1000, 4096):
        check([1] * size, [rng.randint(0, 3000) for _ in range(size)], VARIANTS[variant], emulated)


@pytest.mark.parametrize("max_splits", [0, 3])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [([1, 1, 1], [50, 50, 50]), ([1, -1], [50, 50]), ([1, 1], [50, -1])],
    ids=["too many tiles", "descending q_indptr", "negative length"],
)
def test_a_batch_beyond_the_capacity_has_no_work(q_lens, kv_lens, max_splits, emulated):
    params = replace(DECODE, max_splits=max_splits, num_workers=5)
    bounds = bounds_of([1, 1], [50, 50], params)
    lists = poisoned(params, bounds)
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    emulated(q_indptr, torch.tensor(kv_lens, dtype=torch.int32), params, bounds.max_tiles, lists)
    assert (lists.worker_indptr == 0).all() and lists.num_merges.item() == 0
    assert (lists.starts[:, :2] == 0).all()
    assert (lists.items == POISON).all() and (lists.merges == POISON).all()


# For the device


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_batch", [64, 5000])
def test_the_kernel_compiles_without_spills(variant, max_batch):
    for max_kv_len in (65536, 2**31 - 1):
        spec = plan_spec(VARIANTS[variant], Capacity(max_batch, max_batch, 1, max_kv_len))
        assert spec.narrow == (max_kv_len == 65536 and max_batch * VARIANTS[variant].kinds[0].step_cost < 2**16)
        check_no_spills(spec)


def check_no_spills(spec):
    resources = compile_source(spec.source(), CompileTarget("sm_90a")).resources
    assert resources.stack_bytes == resources.spill_store_bytes == resources.spill_load_bytes == 0


def test_the_kernel_compiles_for_many_kinds_and_other_architectures():
    kinds = tuple(TileKind(2**idx, 16, 2**idx, 1, 1) for idx in range(3, 10))
    params = replace(DECODE, kinds=(*kinds, TileKind(1024, 16, UNLIMITED_ROWS, 1, 1)))
    assert compile_source(
        plan_spec(params, Capacity(9, 99, 99, 999)).source(), CompileTarget("sm_80")
    ).cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("max_batch", [1, 256, 257, 4096, 4097, 10**6])
def test_tables_lie_where_they_fit(max_batch):
    spec = plan_spec(DECODE, Capacity(max_batch, max_batch, 1, 4096))
    in_shared = max_batch <= 4096
    assert (spec.shared_requests >= max_batch) == in_shared and (spec.shared_bytes > 0) == in_shared
    assert spec.shared_bytes <= (227 << 10) - 16384
    assert scratch_bytes(max_batch) == (0 if in_shared else 32 * (max_batch + 1) + 4 * (2 * max_batch + 1))
    assert (spec.num_blocks - 1) * 4 <= spec.num_workers < spec.num_blocks * 4


# On the device


def on_device(max_batch: int = 1) -> Fill:
    def fill(q_indptr, kv_lens, params, max_tiles, lists):
        capacity = capacity_of(q_indptr.diff().tolist(), kv_lens.tolist(), max_batch)
        scratch = torch.empty(scratch_bytes(capacity.max_batch), dtype=torch.uint8, device="cuda")
        DevicePlanner(params, capacity, max_tiles, lists, scratch)(q_indptr, kv_lens)

    return fill


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_batch", [300, 5000])
def test_device_rows_of_hostile_batches(variant, max_batch):
    for q_lens, kv_lens in HOSTILE.values():
        check(q_lens, kv_lens, VARIANTS[variant], on_device(max_batch), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_device_rows_of_random_batches(seed):
    rng = random.Random(seed)
    params = random_params(rng)
    for _ in range(25):
        check(*random_lengths(rng, rng.choice([0, 1, 2, 5, 17, 200])), params, on_device(256), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["decode", "window", "invariant"])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1024, 1025, 4096, 4500])
def test_device_rows_of_large_batches(variant, size):
    rng = random.Random(size)
    check([1] * size, [rng.randint(0, 3000) for _ in range(size)], VARIANTS[variant], on_device(), "cuda")


@pytest.mark.gpu
def test_one_captured_update_serves_every_batch():
    bounds = bounds_of([1] * 256, [65536] * 256, DECODE)
    lists = poisoned(DECODE, bounds, "cuda")
    q_indptr = torch.zeros(257, dtype=torch.int32, device="cuda")
    kv_lens = torch.zeros(256, dtype=torch.int32, device="cuda")
    scratch = torch.empty(0, dtype=torch.uint8, device="cuda")
    planner = DevicePlanner(DECODE, Capacity(256, 256, 1, 65536), bounds.max_tiles, lists, scratch)
    planner(q_indptr, kv_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planner(q_indptr, kv_lens)
    rng = random.Random(3)
    for _ in range(200):
        size = rng.choice([0, 1, 7, 256])
        lens = [rng.choice([1, 100, 65536]) for _ in range(size)] + [0] * (256 - size)
        new_tokens = [1] * size + [0] * (256 - size)
        host = torch.tensor([0, *new_tokens]).cumsum(0).int(), torch.tensor(lens, dtype=torch.int32)
        q_indptr.copy_(host[0])
        kv_lens.copy_(host[1])
        graph.replay()
        wanted = poisoned(DECODE, bounds)
        fill_on_host(*host, DECODE, wanted)
        num_items, num_merges = int(wanted.worker_indptr[-1]), int(wanted.num_merges)
        assert torch.equal(lists.items[:num_items].cpu(), wanted.items[:num_items])
        assert torch.equal(lists.merges[:num_merges].cpu(), wanted.merges[:num_merges])
        assert torch.equal(lists.worker_indptr.cpu(), wanted.worker_indptr)


BEYOND = {
    "a query too long": ([0, 3, 4], [50, 50]),
    "too many tokens": ([0, 2, 4, 6], [50, 50, 50]),
    "tokens before the first": ([-1, 1, 2], [50, 50]),
    "descending": ([0, 2, 1], [50, 50]),
    "too many keys": ([0, 1, 2], [50, 101]),
    "keys of the largest length": ([0, 1, 2], [2**31 - 1, 2**31 - 1]),
    "negative keys": ([0, 1, 2], [50, -1]),
    "wrapping": ([0, -(2**31), 2**31 - 1], [50, 50]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("max_batch", [8, 5000])
@pytest.mark.parametrize("max_splits", [0, 3])
@pytest.mark.parametrize("batch", BEYOND)
def test_device_gives_no_work_to_a_batch_beyond_the_capacity(batch, max_splits, max_batch):
    params = replace(DECODE, max_splits=max_splits, num_workers=5)
    capacity = Capacity(max_batch, 5, 2, 100)
    bounds = PartitionBounds.from_capacity(params, capacity)
    lists = poisoned(params, bounds, "cuda")
    scratch = torch.empty(scratch_bytes(max_batch), dtype=torch.uint8, device="cuda")
    planner = DevicePlanner(params, capacity, bounds.max_tiles, lists, scratch)
    planner(*(torch.tensor(lengths, dtype=torch.int32, device="cuda") for lengths in BEYOND[batch]))
    assert (lists.worker_indptr == 0).all() and lists.num_merges.item() == 0
    assert (lists.starts[:, :2] == 0).all()
    assert (lists.items == POISON).all() and (lists.merges == POISON).all()
    lengths = torch.tensor([0, 2, 4], device="cuda").int(), torch.tensor([100, 100], device="cuda").int()
    planner(*lengths)  # what is just within has work
    assert lists.worker_indptr[-1].item() >= 2 * params.num_kv_heads
