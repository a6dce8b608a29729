"""Measure the rates by which shared prefixes are chosen: ``python benchmarks/fit_sharing.py [--backend NAME] [--out FILE]``.

Decode attention of 32 query and 8 KV heads of 128 dims in bfloat16, pages of 16, with and without levels, by CUDA-graph replay
with a cold L2. Each rate comes from the difference of two cases that differ in it alone; a grid of other cases then shows
what the cost model makes of them: predicted and measured savings, and the worst loss among those that it would take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fi_core as fi
import torch
from fi_core.bench.timing import clock_of, measure_in_turns
from fi_core.prefixes import SharedPrefixes
from fi_core.records import AttentionSpec, Batch, KVCache
from fi_scheduler.sharing import SharingCosts, SharingRates
from torch import Tensor

PAGE = 16
OWN = 256
ROUNDS = 12
SPEC = AttentionSpec(32, 8, 128, page_size=PAGE)
GRID = [(size, prefix) for size in (2, 4, 8, 32, 64) for prefix in (128, 512, 1024, 2048, 8192)]


@dataclass(frozen=True)
class Case:
    """``num_groups`` of ``size`` requests that share ``prefix`` tokens and have OWN tokens of their own."""

    num_groups: int
    size: int
    prefix: int

    @property
    def num_requests(self) -> int:
        return self.num_groups * self.size


class Bench:
    """Inputs over one cache that every case takes its pages from."""

    def __init__(self, backend: str | None, num_pages: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.backend = backend
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (num_pages, PAGE, SPEC.num_kv_heads, SPEC.head_dim)
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=generator) for _ in range(2))
        self.kv = KVCache(k, v)
        self.order = torch.randperm(num_pages, device=self.device, generator=generator).int()
        self.clock = clock_of(self.device)

    def batch(self, case: Case) -> Batch:
        """Each group's pages of the prefix stand once in the cache, each request's own ones apart."""
        own, shared = OWN // PAGE, case.prefix // PAGE
        group = torch.arange(case.num_groups, device=self.device).repeat_interleave(case.size)
        first = torch.arange(shared, device=self.device) + group[:, None] * shared
        begin = case.num_groups * shared
        request = torch.arange(case.num_requests, device=self.device)
        rest = begin + torch.arange(own, device=self.device) + request[:, None] * own
        pages = torch.cat([first, rest], dim=1)
        table = self.order[pages.flatten()].view(pages.shape).contiguous()
        lens = torch.full((case.num_requests,), case.prefix + OWN, dtype=torch.int32, device=self.device)
        indptr = torch.arange(case.num_requests + 1, dtype=torch.int32, device=self.device)
        rows = [[begin, begin + case.size, 0, case.prefix] for begin in range(0, case.num_requests, case.size)]
        nodes = torch.tensor(rows, dtype=torch.int32, device=self.device)
        return Batch(indptr, lens, table, levels=SharedPrefixes(nodes))

    def times(self, cases: Sequence[Case]) -> list[tuple[float, float]]:
        """Nanoseconds of each case (without levels, with them); raises where the two do not agree."""
        calls, results = [], []
        for case in cases:
            batch = self.batch(case)
            plain = Batch(batch.q_indptr, batch.kv_lens, batch.table)
            q = torch.randn(case.num_requests, 32, 128, dtype=torch.bfloat16, device=self.device)
            outs = [torch.empty_like(q) for _ in range(2)]
            results.append(outs)
            for given, out, prefixes in ((plain, outs[0], 0), (batch, outs[1], case.num_groups)):
                plan = self._plan(case, prefixes)
                plan.update(given)
                calls.append(lambda q=q, plan=plan, out=out: fi.attention(q, self.kv, plan, out=out))
        found = [timing.cold.us * 1e3 for timing in measure_in_turns(calls, self.clock, ROUNDS)]
        for case, (without, shared) in zip(cases, results, strict=True):
            _check(case, without, shared)
        return list(zip(found[::2], found[1::2], strict=True))

    def _plan(self, case: Case, max_prefixes: int) -> fi.Plan:
        return fi.plan(
            SPEC,
            max_batch=case.num_requests,
            max_q_tokens=case.num_requests,
            max_q_len=1,
            max_kv_len=case.prefix + OWN,
            max_prefixes=max_prefixes,
            device=self.device,
            backend=self.backend,
        )


def _check(case: Case, without: Tensor, shared: Tensor) -> None:
    error = (without.double() - shared.double()).norm() / without.double().norm()
    if not error < 1e-2:
        raise AssertionError(f"{case}: results with and without levels differ by {error:.2e}")


def fit(bench: Bench) -> SharingRates:
    """The rates of the backend on this device."""
    token_bytes = SPEC.num_kv_heads * 2 * SPEC.head_dim * 2
    partial_bytes = 2 * 4 * SPEC.num_qo_heads * (SPEC.head_dim + 1)
    apart, again, few, many, wide, pairs = bench.times(
        [
            Case(64, 1, 8192),
            Case(1, 64, 8192),
            Case(1, 128, PAGE),
            Case(1, 512, PAGE),
            Case(1, 256, 32768),
            Case(64, 2, PAGE),
        ]
    )
    read_rate = 64 * (8192 + OWN) * token_bytes / apart[0]
    reread_rate = 63 * 8192 * token_bytes / max(again[0] - (8192 + 64 * OWN) * token_bytes / read_rate, 1.0)
    row_ns = max(((many[1] - many[0]) - (few[1] - few[0])) / (512 - 128), 1e-3)
    batch_ns = max(few[1] - few[0] - 128 * row_ns, 0.0)
    node_ns = max((pairs[1] - few[1]) / 63, 0.0)
    own_ns = 256 * OWN * token_bytes / read_rate
    flops = 4 * SPEC.head_dim * SPEC.num_qo_heads * 256 * 32768
    product_rate = flops / max(wide[1] - own_ns - batch_ns - 256 * row_ns, 1.0)
    return SharingRates(read_rate, reread_rate, product_rate, partial_bytes / row_ns, node_ns, batch_ns)


def judge(bench: Bench, rates: SharingRates) -> None:
    """Print what the model says of the grid beside what was measured, and its worst mistakes."""
    costs = SharingCosts.of(SPEC, rates)
    cases = [Case(64 // size, size, prefix) for size, prefix in GRID]
    lost, missed = 0.0, 0.0
    print("requests x tokens: us without, with levels, predicted saving, measured, read once?")
    for case, (without, shared) in zip(cases, bench.times(cases), strict=True):
        q_lens = [1] * case.size
        each = costs.alone(q_lens, case.prefix) - costs.together(q_lens, case.prefix)
        predicted = case.num_groups * each - costs.batch_ns
        taken, measured = predicted > 0, without - shared
        lost = max(lost, -measured / without) if taken else lost
        missed = missed if taken else max(missed, measured / without)
        name = f"{case.num_groups} x {case.size} x {case.prefix}"
        numbers = f"{without / 1e3:8.1f} {shared / 1e3:8.1f} {predicted / 1e3:8.1f} {measured / 1e3:8.1f}"
        print(f"{name:>16}: {numbers} {'yes' if taken else 'no'}")
    print(f"worst loss of a choice to read once: {lost:.1%}; most missed by a choice not to: {missed:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="the backend to measure (default: the one preferred)")
    parser.add_argument("--out", type=Path, help="where the rates go, as JSON")
    parser.add_argument("--pages", type=int, default=40960, help="pages of the cache")
    options = parser.parse_args()
    bench = Bench(options.backend, options.pages)
    rates = fit(bench)
    print(torch.cuda.get_device_name(), options.backend or "preferred backend")
    print(rates.to_json())
    if options.out is not None:
        options.out.write_text(rates.to_json() + "\n")
    judge(bench, rates)


if __name__ == "__main__":
    main()
