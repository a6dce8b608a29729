"""What ``plan.update`` of the CUDA backend costs on the GPU and on the host: ``python benchmarks/bench_plan_update.py``.

Two measures on the GPU, for lengths of three kinds, on which neither may depend: a graph of 64 updates divided by 64, for
decode batches of 1 to 4096 requests; and what an update adds to a step, a graph of one and 32 layers of attention less a
graph of the layers alone. The host's is the time until eager calls return, of a batch seen before and of a new record.
Mode "levels": all requests share 8192 tokens, and eighths of them 1024 more. ``--out FOLDER`` writes plan_update.json, whose rows
have the GPU's microseconds, and as ``families`` the host's, or those of the layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fi_core as fi
import torch
from fi_benchmarks import results
from fi_benchmarks.runner import OURS, Row

NUM_UPDATES = 64
NUM_RUNS = 50
NUM_LAYERS = 32
PAGE_SIZE = 16
MAX_KV_LEN = 65536
SIZES = (1, 16, 64, 256, 1024, 4096)
STEP_SIZES = (64, 256)
MODES = ("balanced", "invariant", "levels")
SHARED, NUM_GROUPS = (8192, 1024), 8
LENGTHS: dict[str, Callable[[int], torch.Tensor]] = {
    "equal": lambda size: torch.full((size,), 2048),
    "uniform": lambda size: torch.randint(1, 4096, (size,)),
    "skewed": lambda size: (MAX_KV_LEN / torch.arange(1, size + 1)).ceil().long(),
}


def captured(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``body``, which has run once before."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def gpu_times(graphs: list[torch.cuda.CUDAGraph], num_runs: int) -> list[float]:
    """The median microseconds of each graph's replays, taken in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(num_runs):
        for graph, found in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1000)
    return [statistics.median(found) for found in times]


def host_time(body: Callable[[], object]) -> float:
    """The median microseconds until an eager call returns."""
    times = []
    for _ in range(NUM_RUNS):
        started = time.perf_counter()
        for _ in range(NUM_UPDATES):
            body()
        times.append((time.perf_counter() - started) * 1e6 / NUM_UPDATES)
        torch.cuda.synchronize()
    return statistics.median(times)


def update_times(plan: fi.Plan, batch: fi.Batch) -> tuple[float, float, float]:
    """Microseconds of an update: on the GPU, on the host, and on the host with a new record of the same tensors."""

    def updates() -> None:
        for _ in range(NUM_UPDATES):
            plan.update(batch)

    (on_gpu,) = gpu_times([captured(updates)], NUM_RUNS)
    again = host_time(lambda: plan.update(batch))
    new = host_time(lambda: plan.update(replace(batch)))
    return on_gpu / NUM_UPDATES, again, new


def step_times(plan: fi.Plan, batch: fi.Batch) -> tuple[float, float]:
    """Microseconds of a graph of an update and the layers, and of a graph of the layers."""
    size = batch.size
    num_pages = int((batch.kv_lens.long() + PAGE_SIZE - 1).floor_divide(PAGE_SIZE).sum())
    shape = (num_pages, PAGE_SIZE, plan.spec.num_kv_heads, plan.spec.head_dim)
    kv = fi.KVCache(*(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    q = torch.randn(size, plan.spec.num_qo_heads, plan.spec.head_dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    assert batch.table is not None
    batch.table.copy_(torch.randint(num_pages, batch.table.shape, device="cuda"))

    def layers() -> None:
        for _ in range(NUM_LAYERS):
            fi.attention(q, kv, plan, out=out)

    def step() -> None:
        plan.update(batch)
        layers()

    with_update, without = gpu_times([captured(step), captured(layers)], 4 * NUM_RUNS)
    return with_update, without


def decode_plan(size: int, mode: str) -> tuple[fi.Plan, torch.Tensor]:
    """A plan for ``size`` requests of a token, and a page table of zeros for them."""
    spec = fi.AttentionSpec(32, 8, 128, batch_invariant=mode == "invariant")
    plan = fi.plan(
        spec,
        max_batch=size,
        max_q_tokens=size,
        max_q_len=1,
        max_kv_len=MAX_KV_LEN + sum(SHARED),
        device="cuda",
        backend="cuda",
        **({"max_prefixes": 1 + NUM_GROUPS, "max_prefix_depth": 2} if mode == "levels" else {}),
    )
    return plan, torch.zeros(size, (MAX_KV_LEN + sum(SHARED)) // PAGE_SIZE, dtype=torch.int32, device="cuda")


def decode_batches(size: int, table: torch.Tensor, mode: str) -> Iterator[tuple[str, fi.Batch]]:
    """A batch of each kind of lengths."""
    for name, lengths in LENGTHS.items():
        kv_lens, levels = lengths(size).to("cuda", torch.int32), None
        if mode == "levels":
            first, second = SHARED
            kv_lens += first + second
            begins = [size * group // NUM_GROUPS for group in range(NUM_GROUPS + 1)]
            groups = [(*members, first, first + second) for members in zip(begins, begins[1:], strict=False)]
            nodes = torch.tensor([(0, size, 0, first), *groups], dtype=torch.int32, device="cuda")
            levels = fi.SharedPrefixes(nodes)
        yield name, fi.Batch(torch.arange(size + 1, dtype=torch.int32, device="cuda"), kv_lens, table, levels=levels)


def row_of(case: str, us: float, families: dict[str, float]) -> Row:
    return Row("attention", "plan_update", case, "cuda.attention_plan", OURS, us, families=families)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable; default: all")
    parser.add_argument("--size", action="append", type=int, help=f"requests; repeatable; default: {SIZES}")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where plan_update.json goes (default: none is written)"
    )
    parser.add_argument("--commit", metavar="TEXT", help="what the rows name (default: git's answer)")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print(f"{'requests':>8} {'lengths':>8} {'mode':>10} {'GPU us':>8} {'host us':>8} {'new record us':>13}")
    for mode in given.mode or MODES:
        for size in given.size or SIZES:
            plan, table = decode_plan(size, mode)
            for name, batch in decode_batches(size, table, mode):
                gpu, host, new = update_times(plan, batch)
                print(f"{size:8} {name:>8} {mode:>10} {gpu:8.2f} {host:8.2f} {new:13.2f}", flush=True)
                rows.append(
                    row_of(f"updates alone, {mode}, {size} {name}", gpu, {"host": host, "host, new record": new})
                )
    print(f"\n{'requests':>8} {'lengths':>8} {'mode':>10} {'step us':>10} {'layers us':>10} {'update us':>10}")
    for mode in given.mode or MODES:
        for size in sorted({*STEP_SIZES} & {*(given.size or SIZES)}):
            plan, table = decode_plan(size, mode)
            for name, batch in decode_batches(size, table, mode):
                step, layers = step_times(plan, batch)
                print(f"{size:8} {name:>8} {mode:>10} {step:10.2f} {layers:10.2f} {step - layers:10.2f}", flush=True)
                rows.append(row_of(f"update in a step, {mode}, {size} {name}", step - layers, {"layers": layers}))
    if given.out is not None:
        results.write(given.out, "plan_update", rows, results.circumstances(torch.device("cuda", 0), {}, given.commit))


if __name__ == "__main__":
    main()
