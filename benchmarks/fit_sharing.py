"""Measure the rates by which shared prefixes are chosen: ``python benchmarks/fit_sharing.py [--backend NAME] [--out FILE]``.

Decode attention of 32 query and 8 KV heads of 128 dims in bfloat16, pages of 16, with and without levels, by CUDA-graph replay
with a cold L2. Each rate comes from the difference of two cases that differ in it alone; a grid of other cases then shows
what the cost model makes of them: predicted and measured times, the worst loss of a choice to share and the most missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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
ROUNDS = 8
SPEC = AttentionSpec(32, 8, 128, page_size=PAGE)
GRID = [(size, prefix) for size in (2, 4, 8, 32, 64) for prefix in (128, 512, 1024, 2048, 8192)]


@dataclass(frozen=True)
class Case:
    """``num_groups`` of ``size`` requests that share ``prefix`` tokens and have ``own`` tokens of their own."""

    num_groups: int
    size: int
    prefix: int
    own: int = 256

    @property
    def num_requests(self) -> int:
        return self.num_groups * self.size

    @property
    def read_again(self) -> tuple[int, int]:
        """Tokens that requests have in common, and how many times more than once they are read."""
        shared = self.num_groups * self.prefix if self.size > 1 else 0
        return shared, shared * (self.size - 1)


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
        own, shared = case.own // PAGE, case.prefix // PAGE
        group = torch.arange(case.num_groups, device=self.device).repeat_interleave(case.size)
        first = torch.arange(shared, device=self.device) + group[:, None] * shared
        begin = case.num_groups * shared
        request = torch.arange(case.num_requests, device=self.device)
        rest = begin + torch.arange(own, device=self.device) + request[:, None] * own
        pages = torch.cat([first, rest], dim=1)
        table = self.order[pages.flatten()].view(pages.shape).contiguous()
        lens = torch.full((case.num_requests,), case.prefix + case.own, dtype=torch.int32, device=self.device)
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
            max_kv_len=case.prefix + case.own,
            max_prefixes=max_prefixes,
            device=self.device,
            backend=self.backend,
        )


def _check(case: Case, without: Tensor, shared: Tensor) -> None:
    error = (without.double() - shared.double()).norm() / without.double().norm()
    if not error < 1e-2:
        raise AssertionError(f"{case}: results with and without levels differ by {error:.2e}")


POINTS = {
    "apart": Case(64, 1, 8192),
    "apart, short": Case(64, 1, 1024),
    "alike": Case(1, 64, 8192),
    "alike, short": Case(1, 64, 2048),
    "own": Case(1, 64, PAGE, 2048),
    "own, short": Case(1, 64, PAGE, 512),
    "wide": Case(1, 256, 32768),
    "wide, short": Case(1, 256, 8192),
    "rows": Case(1, 256, PAGE, 64),
    "rows, few": Case(1, 64, PAGE, 64),
    "nodes": Case(64, 2, PAGE, 64),
    "nodes, one": Case(1, 128, PAGE, 64),
    "small": Case(1, 8, PAGE, 512),
    "pairs": Case(32, 2, 2048),
}
"""Cases in pairs that differ in one thing; "small" is as good as all fixed cost, and the prefixes of "pairs" are more than the
L2 holds."""

TOKEN_BYTES = SPEC.num_kv_heads * 2 * SPEC.head_dim * 2
PARTIAL_BYTES = 2 * 4 * SPEC.num_qo_heads * (SPEC.head_dim + 1)


def fit(times: Mapping[str, tuple[float, float]]) -> SharingRates:
    """The rates from nanoseconds (without levels, with them) of POINTS."""

    def more(name: str, shorter: str, shared: bool) -> float:
        return max(times[name][shared] - times[f"{name}, {shorter}"][shared], 1.0)

    own_ns = more("own", "short", True) / (64 * (2048 - 512))
    row_ns = max(more("rows", "few", True) / (256 - 64) - 64 * own_ns, 1.0)
    node_ns = max(times["nodes"][1] - times["nodes, one"][1], 0.0) / 63
    fixed = times["small"][1] - times["small"][0]
    read_rate = 64 * (8192 - 1024) * TOKEN_BYTES / more("apart", "short", False)
    # Of 64 x (2048 + 256) tokens half the prefixes' are read again; what memory has no time for is found in the L2.
    pairs = POINTS["pairs"]
    read = (times["pairs"][0] - times["small"][0]) * read_rate / TOKEN_BYTES
    found = pairs.num_requests * (pairs.prefix + pairs.own) - read
    return SharingRates(
        read_rate=read_rate,
        attend_rate=64 * (8192 - 2048) * TOKEN_BYTES / more("alike", "short", False),
        own_rate=TOKEN_BYTES / own_ns,
        product_rate=4 * SPEC.head_dim * SPEC.num_qo_heads * 256 * (32768 - 8192) / more("wide", "short", True),
        merge_rate=PARTIAL_BYTES / row_ns,
        node_ns=node_ns,
        batch_ns=max(fixed - 8 * row_ns - node_ns, 0.0),
        reuse_bytes=max(found, 0.0) * TOKEN_BYTES,
    )


def measured_rates(backend: str | None) -> SharingRates:
    """The rates of a backend (None: the preferred one) on this device."""
    bench = Bench(backend, 64 * (8192 + 256) // PAGE)
    return fit(dict(zip(POINTS, bench.times(list(POINTS.values())), strict=True)))


def judge(bench: Bench, rates: SharingRates) -> None:
    """Print what the model says of the grid beside what was measured, and its worst mistakes."""
    costs = SharingCosts.of(SPEC, rates)
    cases = [Case(64 // size, size, prefix) for size, prefix in GRID]
    lost, missed = 0.0, 0.0
    print("groups x requests x tokens: us without levels, predicted; with levels, predicted; shared?")
    for case, (without, shared) in zip(cases, bench.times(cases), strict=True):
        ones, lens = [1] * case.num_requests, [case.prefix + case.own] * case.num_requests
        one = costs.each([1] * case.size, case.prefix) - costs.once([1] * case.size, case.prefix)
        plain = costs.without_levels(ones, lens, *case.read_again)
        levels = costs.with_levels(ones, lens, case.num_groups * one)
        taken, gain = one > 0 and levels < plain, (without - shared) / without
        lost, missed = (max(lost, -gain), missed) if taken else (lost, max(missed, gain))
        name = f"{case.num_groups} x {case.size} x {case.prefix}"
        numbers = "; ".join(f"{a / 1e3:8.1f} {b / 1e3:8.1f}" for a, b in ((without, plain), (shared, levels)))
        print(f"{name:>16}: {numbers} {'yes' if taken else 'no'}")
    print(f"worst loss of a choice to share: {lost:.1%}; most missed by a choice not to: {missed:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="the backend to measure (default: the one preferred)")
    parser.add_argument("--out", type=Path, help="where the rates go, as JSON")
    options = parser.parse_args()
    rates = measured_rates(options.backend)
    print(torch.cuda.get_device_name(), options.backend or "preferred backend")
    print(rates.to_json())
    if options.out is not None:
        options.out.write_text(rates.to_json() + "\n")
    judge(Bench(options.backend, 64 * (8192 + 256) // PAGE), rates)


if __name__ == "__main__":
    main()
