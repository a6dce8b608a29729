"""What one call of the work partition costs on the host: ``python benchmarks/bench_partition.py [--out FOLDER]``.

Decode and mixed batches of 1 to 4096 requests with equal, random and skewed lengths, over the 132 multiprocessors of an
H100, into preallocated buffers as a serving loop does. Prints a table; with ``--out`` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fi_core.records import Capacity
from fi_scheduler.partition import (
    UNLIMITED_ROWS,
    PartitionBounds,
    PartitionParams,
    TileKind,
    WorkList,
    implementation,
    partition,
)

NUM_WORKERS, NUM_KV_HEADS, GROUP_SIZE = 132, 8, 4
KINDS = (
    TileKind(q_rows=16, kv_tokens=64, max_packed_rows=16, item_cost=4, step_cost=1),
    TileKind(q_rows=128, kv_tokens=64, max_packed_rows=UNLIMITED_ROWS, item_cost=8, step_cost=4),
)
PARAMS = PartitionParams(NUM_WORKERS, NUM_KV_HEADS, GROUP_SIZE, KINDS, causal=True, window=None)
MAX_KV_LEN = 32768
SIZES = (1, 16, 256, 1024, 4096)
NUM_CALLS = 300


def batches(size: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(case name, q_indptr, kv_lens) of each shape for ``size`` requests."""
    random = np.random.default_rng(size)
    one = np.ones(size, dtype=np.int64)
    lengths = {
        "equal": np.full(size, 4096),
        "random": random.integers(1, MAX_KV_LEN, size),
        "skewed": np.where(np.arange(size) == 0, MAX_KV_LEN, 512),
    }
    for name, kv_lens in lengths.items():
        yield f"decode-{name}-b{size}", indptr(one), kv_lens.astype(np.int32)
    q_lens = np.where(np.arange(size) % 16 == 0, 64, 1)
    yield f"mixed-random-b{size}", indptr(q_lens), np.maximum(lengths["random"], q_lens).astype(np.int32)


def indptr(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def measure(q_indptr: np.ndarray, kv_lens: np.ndarray) -> list[float]:
    """Microseconds of each of NUM_CALLS calls."""
    q_lens = np.diff(q_indptr)
    capacity = Capacity(len(kv_lens), int(q_indptr[-1]), int(q_lens.max()), MAX_KV_LEN)
    out = WorkList.for_bounds(PartitionBounds.from_capacity(PARAMS, capacity))
    times = []
    for _ in range(NUM_CALLS):
        started = time.perf_counter_ns()
        partition(q_indptr, kv_lens, PARAMS, out)
        times.append((time.perf_counter_ns() - started) / 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for partition.json")
    options = parser.parse_args()
    used = implementation()
    print(f"implementation: {used.name} ({used.reason})")
    print(f"{'case':<24} {'median µs':>10} {'p10':>8} {'p90':>8}")
    rows = []
    for size in SIZES:
        for case, q_indptr, kv_lens in batches(size):
            deciles = statistics.quantiles(measure(q_indptr, kv_lens), n=10)
            median, p10, p90 = deciles[4], deciles[0], deciles[8]
            print(f"{case:<24} {median:>10.1f} {p10:>8.1f} {p90:>8.1f}")
            row = {"op": "partition", "case": case, "impl": used.name, "us": median, "p10": p10, "p90": p90}
            rows.append({**row, "share_of_ceiling": None})
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "partition.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
