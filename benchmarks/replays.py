"""One captured decode step against eager calls: ``python benchmarks/replays.py --replays 10000 --out FOLDER``.

A CUDA graph holds a plan's update and the attention of 32 layers. Between replays kernels alone change the batch: its size (0
to the capacity), lengths, offsets and page table, in place. Each replay must give the bits of eager calls with another
plan; the comparison stays on the device, so the host never waits. Writes replays.json; exit status 1 where bits differ.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fi_core as fi
import torch
from fi_core.records import KV_FORMATS
from fi_core.rope import FusedRope, RopeConfig, RopeTable
from torch import Tensor

NUM_LAYERS = 32
MAX_BATCH, PAGE_SIZE, MAX_KV_LEN, NUM_PAGES = 64, 16, 2048, 512
LONGEST = (1, 40, 300, 300, MAX_KV_LEN)
"""A batch draws one of these as its longest request: mostly short, so that the host's pace is the run's."""
WAITS = ("Synchronize", "cudaMemcpy", "cudaEventQuery")
"""In the names of calls with which a host would wait for a device."""


@dataclass(frozen=True)
class Variant:
    """A spec beyond 32 heads over 8, and most new tokens of a request."""

    options: dict[str, Any]
    max_q_len: int = 1


VARIANTS = {
    "decode": Variant({}),
    "windows, a KV head for each warp": Variant({"windows": (None, 200)}),
    "verify": Variant({"features": frozenset({"lse"})}, max_q_len=5),
    "one KV head, windows, sinks": Variant(
        {"num_kv_heads": 1, "windows": (None, 200), "features": frozenset({"sinks"})}, max_q_len=2
    ),
    "FP8, rotated keys": Variant({"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "rope": FusedRope(64, keys=True)}),
    "batch-invariant": Variant({"batch_invariant": True}),
}


class Step:
    """A decode step over tensors whose addresses stay."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.device, self.max_q_len = device, variant.max_q_len
        heads = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 64, "page_size": PAGE_SIZE}
        self.spec = spec = fi.AttentionSpec(**{**heads, **variant.options})
        shape = (2, NUM_PAGES, PAGE_SIZE, spec.num_kv_heads, spec.head_dim)
        dtype = KV_FORMATS[spec.kv_format or ""]
        caches = (torch.randn(shape, device=device).to(dtype) for _ in range(NUM_LAYERS))
        self.caches = [fi.KVCache(k, v) for k, v in caches]
        self.num_tokens = MAX_BATCH * self.max_q_len
        self.q = torch.randn(self.num_tokens, spec.num_qo_heads, spec.head_dim, device=device).to(spec.q_dtype)
        sinks = torch.randn(spec.num_qo_heads, device=device) if "sinks" in spec.features else None
        rope = None if spec.rope is None else RopeTable.make(RopeConfig(spec.rope.rotary_dim), device)
        windows = spec.windows * NUM_LAYERS
        self.layers = [fi.LayerArgs(window=window, sinks=sinks, rope=rope) for window in windows[:NUM_LAYERS]]
        table = torch.zeros(MAX_BATCH, MAX_KV_LEN // PAGE_SIZE, dtype=torch.int32, device=device)
        lengths = (torch.zeros(MAX_BATCH + extra, dtype=torch.int32, device=device) for extra in (1, 0))
        self.batch = fi.Batch(*lengths, table)
        self._longest = torch.tensor(LONGEST, device=device)
        self._numbers = torch.arange(MAX_BATCH, device=device)

    def plan(self, backend: str) -> fi.Plan:
        """A plan of the step's capacity."""
        sizes = {"max_batch": MAX_BATCH, "max_q_tokens": self.num_tokens, "max_q_len": self.max_q_len}
        return fi.plan(self.spec, **sizes, max_kv_len=MAX_KV_LEN, device=self.device, backend=backend)

    def outputs(self) -> Outputs:
        """Room for the results of all layers, poisoned."""
        shape = (NUM_LAYERS, self.num_tokens, self.spec.num_qo_heads)
        out = torch.full((*shape, self.spec.head_dim), math.nan, dtype=self.spec.dtype, device=self.device)
        lse = torch.full(shape, math.nan, device=self.device) if "lse" in self.spec.features else None
        return Outputs(out, lse)

    def draw(self) -> None:
        """A random batch in the place of the last, by kernels alone."""
        device, size = self.device, torch.randint(0, MAX_BATCH + 1, (), device=self.device)
        live = self._numbers < size
        fewest = 0 if self.max_q_len > 1 else 1
        q_lens = torch.randint(fewest, self.max_q_len + 1, (MAX_BATCH,), device=device) * live
        longest = self._longest[torch.randint(0, len(LONGEST), (1,), device=device)]
        kv_lens = (torch.rand(MAX_BATCH, device=device) * (longest + 1)).long() * live
        self.batch.q_indptr[1:] = q_lens.cumsum(0)
        self.batch.kv_lens.copy_(kv_lens)
        assert self.batch.table is not None
        self.batch.table.random_(0, NUM_PAGES)

    def run(self, plan: fi.Plan, results: Outputs) -> None:
        """Plan the batch and attend in every layer."""
        plan.update(self.batch)
        for idx, (cache, layer) in enumerate(zip(self.caches, self.layers, strict=True)):
            lse = None if results.lse is None else results.lse[idx]
            fi.attention(self.q, cache, plan, layer, out=results.out[idx], lse=lse)


@dataclass(frozen=True)
class Outputs:
    """``out`` [layers, T, Hq, D] and ``lse`` [layers, T, Hq] (None: not asked for)."""

    out: Tensor
    lse: Tensor | None

    def poison(self) -> None:
        for tensor in self._tensors():
            tensor.fill_(math.nan)

    def differs(self, other: Outputs) -> Tensor:
        """bool []: whether some bit differs."""
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return torch.stack([(a.view(torch.int16) != b.view(torch.int16)).any() for a, b in pairs]).any()

    def _tensors(self) -> list[Tensor]:
        return [self.out] if self.lse is None else [self.out, self.lse]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(step: Step, plan: fi.Plan, results: Outputs) -> torch.cuda.CUDAGraph:
    """A graph of the whole step: one that waited for the device could not be captured."""
    step.run(plan, results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(plan, results)
    return graph


def num_differing(step: Step, num_replays: int) -> int:
    """Of ``num_replays`` random batches, those whose replay and eager step differ in a bit."""
    replayed, eager = step.outputs(), step.outputs()
    graph, plan = captured(step, step.plan("cuda"), replayed), step.plan("cuda")
    step.draw()
    step.run(plan, eager)
    differing = torch.zeros((), dtype=torch.int64, device=step.device)
    with no_waiting():
        for _ in range(num_replays):
            step.draw()
            replayed.poison()
            eager.poison()
            graph.replay()
            step.run(plan, eager)
            differing += replayed.differs(eager)
    return int(differing)


def waits_of_an_update(step: Step) -> list[str]:
    """Names of the CUDA calls in an update that copy to the host or wait, from a profile."""
    plan = step.plan("cuda")
    plan.update(step.batch)
    torch.cuda.synchronize(step.device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as record, torch.profiler.record_function("update"):
        with no_waiting():
            plan.update(step.batch)
    events = record.events() or []
    update = next(event for event in events if event.name == "update" and not str(event.device_type).endswith("CUDA"))
    inside = [
        event.name for event in events if update.time_range.start <= event.time_range.start <= update.time_range.end
    ]
    assert any("aunch" in name for name in inside), f"no launch in the profile: {inside}"
    return [name for name in inside if any(part in name for part in WAITS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=10_000, help="of the first variant; the others have a tenth")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device, rows, wrong = torch.device("cuda", torch.cuda.current_device()), [], 0
    for name, variant in VARIANTS.items():
        torch.manual_seed(len(rows))
        started, num = time.perf_counter(), options.replays if not rows else max(options.replays // 10, 1)
        step = Step(variant, device)
        waits = waits_of_an_update(step)
        differing = num_differing(step, num)
        seconds = time.perf_counter() - started
        rows.append({"variant": name, "replays": num, "differing": differing, "waits": waits, "seconds": seconds})
        wrong += differing + len(waits)
        print(
            f"{name}: {num} replays, {differing} differ; waits of an update: {waits or 'none'} ({seconds:.1f} s)",
            flush=True,
        )
        (options.out / "replays.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
