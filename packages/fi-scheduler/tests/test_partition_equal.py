"""Every implementation of the work partition gives the oracle's work list, bit for bit."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from fi_core.errors import ArgumentError, CapacityError
from fi_scheduler import build_native
from fi_scheduler.partition import (
    COL_KV_END,
    UNLIMITED_ROWS,
    PartitionParams,
    TileKind,
    WorkList,
    include_folder,
    oracle_partition,
    partition,
)
from fi_scheduler.partition import entry as entry_module
from fi_scheduler.partition.vectorised import numpy_partition
from hypothesis import given, settings
from partition_cases import (
    LENGTH_SHAPES,
    ONE_KIND,
    TWO_KINDS,
    assert_same,
    batches,
    lengths,
    native_work_list,
    partition_params,
)

BASE = PartitionParams(132, 2, 4, TWO_KINDS, causal=True, window=None)
VARIANTS = {
    "balanced": BASE,
    "full": replace(BASE, causal=False, kinds=ONE_KIND, num_workers=17),
    "window": replace(BASE, window=100),
    "window_full": replace(BASE, window=1, causal=False),
    "heads_first": replace(BASE, heads_first=True, group_size=7),
    "invariant": replace(BASE, max_splits=8, min_split_steps=4),
    "invariant_window_heads_first": replace(BASE, max_splits=3, window=333, heads_first=True),
}


def check_all(
    q_indptr: np.ndarray, kv_lens: np.ndarray, params: PartitionParams, native: ModuleType | None
) -> WorkList:
    expected = oracle_partition(q_indptr.tolist(), kv_lens.tolist(), params)
    assert_same(partition(q_indptr, kv_lens, params), expected)
    assert_same(numpy_partition(q_indptr, kv_lens, params), expected)
    if native is not None:
        assert_same(native_work_list(native, "partition", q_indptr, kv_lens, params), expected)
        assert_same(native_work_list(native, "partition_by_seek", q_indptr, kv_lens, params), expected)
    return expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", LENGTH_SHAPES)
@pytest.mark.parametrize("num_requests", [1, 2, 17, 131, 256])
def test_equal_to_the_oracle(native: ModuleType | None, num_requests: int, shape: str, variant: str) -> None:
    check_all(*lengths(shape, num_requests), VARIANTS[variant], native)


@pytest.mark.parametrize("variant", ["balanced", "invariant"])
@pytest.mark.parametrize("shape", LENGTH_SHAPES)
def test_equal_to_the_oracle_for_4096_requests(native: ModuleType | None, shape: str, variant: str) -> None:
    check_all(*lengths(shape, 4096), replace(VARIANTS[variant], num_kv_heads=1), native)


@pytest.fixture(scope="module")
def shared_native(native: ModuleType | None) -> ModuleType | None:
    return native


@settings(max_examples=150, deadline=None)
@given(batch=batches(), params=partition_params())
def test_equal_on_generated_batches(
    shared_native: ModuleType | None, batch: tuple[np.ndarray, np.ndarray], params: PartitionParams
) -> None:
    check_all(*batch, params, shared_native)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("max_splits", [0, 4])
def test_totals_beyond_32_bits(native: ModuleType | None, heads_first: bool, max_splits: int) -> None:
    kinds = (TileKind(16, 1, UNLIMITED_ROWS, 2**20, 2**10),)
    params = PartitionParams(61, 64, 4, kinds, True, None, heads_first, max_splits)
    kv_lens = np.array([2**31 - 1, 2**31 - 2, 5, 2**31 - 1], dtype=np.int32)
    work = check_all(np.array([0, 1, 3, 4, 9], dtype=np.int32), kv_lens, params, native)
    assert work.items[:, COL_KV_END].max() == 2**31 - 1


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_counts_beyond_int32_whatever_holds_the_lengths(causal: bool, group_size: int) -> None:
    kinds = (TileKind(16, 2**16, UNLIMITED_ROWS, 1, 1),)
    params = PartitionParams(3, 1, group_size, kinds, causal, None)
    q_indptr, kv_lens = [0, 7, 9], [2**31 - 1, 2**31 - 1]
    found = oracle_partition(np.array(q_indptr, dtype=np.int32), np.array(kv_lens, dtype=np.int32), params)
    expected = oracle_partition(q_indptr, kv_lens, params)
    assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("items", "merges"))
    assert found.items[:, COL_KV_END].max() == 2**31 - 1


def test_long_prefill_beyond_32_bits(native: ModuleType | None) -> None:
    """Packed rows, and the closed form of a request's cost, pass 2^31 while the tiles stay few."""
    kinds = (TileKind(2**16, 2**12, UNLIMITED_ROWS, 7, 3),)
    params = PartitionParams(13, 1, 1024, kinds, True, 3_000_000)
    check_all(np.array([0, 5_000_000], dtype=np.int32), np.array([2_000_000_000], dtype=np.int32), params, native)


def test_total_cost_beyond_64_bits_is_refused(native: ModuleType | None) -> None:
    params = PartitionParams(4, 2**16, 1, (TileKind(1, 1, UNLIMITED_ROWS, 1, 2**24),), False, None)
    q_indptr, kv_lens = np.array([0, 1], dtype=np.int32), np.array([2**31 - 1], dtype=np.int32)
    with pytest.raises(ArgumentError, match="kv_lens: expected a batch whose cost"):
        partition(q_indptr, kv_lens, params)
    if native is not None:
        assert not native.measure(q_indptr, kv_lens, params.packed)[0]


@pytest.mark.parametrize(
    ("q_len", "num_kv_heads", "max_splits"), [(2**25, 64, 0), (2**15, 1, 2**16), (1, 2**15, 2**16)]
)
def test_more_items_or_slots_than_int32_counts_are_refused(
    native: ModuleType | None, q_len: int, num_kv_heads: int, max_splits: int
) -> None:
    params = PartitionParams(
        4, num_kv_heads, 1, (TileKind(1, 64, UNLIMITED_ROWS, 1, 1),), False, None, False, max_splits
    )
    q_indptr, kv_lens = np.array([0, q_len], dtype=np.int32), np.array([100], dtype=np.int32)
    with pytest.raises(ArgumentError, match="q_indptr: expected a batch of at most 2147483647 items and slots"):
        partition(q_indptr, kv_lens, params)
    if native is not None:
        assert not native.measure(q_indptr, kv_lens, params.packed)[0]
        fewer = replace(params, max_splits=max(0, max_splits - 1)) if max_splits else replace(params, num_kv_heads=63)
        assert native.measure(q_indptr, kv_lens, fewer.packed)[0]


@pytest.fixture(params=["numpy", "native"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, native: ModuleType | None) -> str:
    """Makes ``partition`` use one implementation (the native one where a compiler can make it)."""
    module = native if request.param == "native" else None
    monkeypatch.setattr(entry_module, "_load", lambda: (module, None))
    return str(request.param)


BAD_BATCHES = [
    ([1, 2], [5], r"q_indptr\[0\]: expected 0, got 1"),
    ([0, 2, 1], [5, 5], r"q_indptr\[2\]: expected ascending values, got 1"),
    ([0, 1, 2], [5, -3], r"kv_lens\[1\]: expected a length >= 0, got -3"),
    ([0, 1, 70], [5, 5], r"q_indptr\[2\]: expected at most 64 packed rows"),
    ([0, 1], [5, 5], r"q_indptr: expected 3 elements"),
]


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(("q_indptr", "kv_lens", "message"), BAD_BATCHES)
def test_bad_lengths_name_the_element(q_indptr: list[int], kv_lens: list[int], message: str) -> None:
    params = replace(BASE, group_size=1, kinds=(TileKind(16, 16, 64, 1, 1),))
    with pytest.raises(ArgumentError, match=message):
        partition(np.array(q_indptr, dtype=np.int32), np.array(kv_lens, dtype=np.int32), params)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([5], dtype=np.int64), "contiguous int32 with one dim, got contiguous int64"),
        (np.arange(4, dtype=np.int32)[::3], "got strided int32"),
        (np.array([[5]], dtype=np.int32), "one dim"),
        ([5], "a numpy array or a CPU tensor, got list"),
        (torch.tensor([5], dtype=torch.int64), "int64"),
        (torch.empty(1, dtype=torch.int32, device="meta"), "a CPU tensor, got device meta"),
    ],
)
def test_bad_arrays(values: object, message: str) -> None:
    q_indptr = np.array([0, 1, 2], dtype=np.int32)
    with pytest.raises(ArgumentError, match=message):
        partition(q_indptr, values, BASE)  # type: ignore[arg-type]


@pytest.mark.usefixtures("chosen")
def test_out_is_written_in_place() -> None:
    q_indptr, kv_lens = lengths("mixed", 40)
    out = WorkList.allocate(BASE.num_workers, 4096, 512)
    result = partition(torch.from_numpy(q_indptr), torch.from_numpy(kv_lens), BASE, out)
    assert_same(result, oracle_partition(q_indptr.tolist(), kv_lens.tolist(), BASE))
    assert np.shares_memory(result.items, out.items) and np.shares_memory(result.merges, out.merges)
    assert result.tensors()[1].data_ptr() == out.items.ctypes.data


@pytest.mark.usefixtures("chosen")
def test_out_too_small_or_misshapen() -> None:
    q_indptr, kv_lens = lengths("mixed", 40)
    full = partition(q_indptr, kv_lens, BASE)
    with pytest.raises(CapacityError, match=r"out.items: expected at least \d+ rows, got 10"):
        partition(q_indptr, kv_lens, BASE, WorkList.allocate(BASE.num_workers, 10, 512))
    with pytest.raises(CapacityError, match=r"out.merges: expected at least \d+ rows, got 3"):
        partition(q_indptr, kv_lens, BASE, WorkList.allocate(BASE.num_workers, 4096, 3))
    with pytest.raises(ArgumentError, match=r"out\.worker_indptr"):
        partition(q_indptr, kv_lens, BASE, WorkList.allocate(7, 4096, 512))
    with pytest.raises(ArgumentError, match=r"out\.items"):
        partition(q_indptr, kv_lens, BASE, replace(full, items=full.items.astype(np.int64)))


def test_stale_and_broken_modules_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = ModuleType("fi_scheduler._partition")
    stale.SOURCE_DIGEST = "other"  # type: ignore[attr-defined]

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: x")

    for importer, text in ((lambda name: stale, "built from other sources"), (broken, "undefined symbol: x")):
        monkeypatch.setattr(entry_module.importlib, "import_module", importer)
        module, chosen = entry_module._load.__wrapped__()
        assert module is None and chosen.name == "numpy" and text in chosen.reason


def test_headers_need_only_each_other() -> None:
    for header in build_native.HEADERS:
        text = header.read_text()
        includes = re.findall(r"#\s*include\s*(\S+)", text)
        assert all(name.startswith('"fi/scheduler/') for name in includes) and "std::" not in text
        compiler = build_native.find_compiler()
        if compiler is not None:
            flags = ["-x", "c++", "-std=c++17", "-nostdinc", f"-I{include_folder()}", "-Wall", "-fsyntax-only"]
            subprocess.run([compiler, *flags, str(header)], check=True)
