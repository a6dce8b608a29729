"""The prefill kernel under tunings that are not built in, beside the built-in one and the peers, in one process:
``python benchmarks/bench_prefill_tunings.py --out FOLDER [--peers FOLDER] [--seconds S] [--warm JOBS]``.

Cases are run.py's, and every tuning is checked as there before it is timed; rows name it after the kernel. ``--warm`` only
compiles, JOBS kernels side by side, into the cache that the next run finds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fi_benchmarks import results
from fi_benchmarks.attention_inputs import make_inputs, ours
from fi_benchmarks.catalogue import choose
from fi_benchmarks.ceilings import Bench, measure_ceilings
from fi_benchmarks.cli import found_peers
from fi_benchmarks.peers import PeerOptions
from fi_benchmarks.problem import Call, Case, Maker, Problem
from fi_benchmarks.runner import Choice, run_case
from fi_core.bench.timing import clock_of
from fi_core.devices import normal_device
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry

Tuning = Mapping[str, Any]

ROUNDS = 12
ORDER: Tuning = {"copy_order": "in order"}
AHEAD: Tuning = {"copy_order": "keys ahead"}
APART: Tuning = {"copy_order": "apart"}
WHOLE: Tuning = {"pieces": 1}
DEEPER: Tuning = {"key_stages": 3, "query_stages": 1}

PREFILL = "prefill B{} S{} h32/8 d{} causal=1{}"
APPEND = "append B{} q{} kv{} h32/8 d128 page16"
CASES: dict[str, dict[str, Tuning]] = {
    APPEND.format(4, 128, 32768): {"whole tiles": WHOLE, "keys ahead": AHEAD},
    APPEND.format(1, 2048, 32768): {"whole tiles": WHOLE},
    APPEND.format(1, 512, 32768): {"whole tiles": WHOLE},
    APPEND.format(16, 128, 4096): {"whole tiles": WHOLE},
    "mixed chunked 512+255 decode 4k": {"whole tiles": WHOLE, "keys ahead": AHEAD},
    "mixed mixed 1x4096 prefill+ 127x decode 2k": {"whole tiles": WHOLE},
    PREFILL.format(4, 4096, 128, " page1"): {"keys ahead": AHEAD},
    PREFILL.format(4, 4096, 128, " page16"): {"in order": ORDER, "keys ahead": AHEAD, "three stages of keys": DEEPER},
    PREFILL.format(4, 4096, 128, ""): {"order": ORDER, "apart": APART, "three stages of keys": DEEPER},
    PREFILL.format(32, 512, 128, " page1"): {},
    PREFILL.format(32, 512, 128, " page16"): {"keys ahead": AHEAD},
    PREFILL.format(32, 512, 128, ""): {"order": ORDER},
    PREFILL.format(16, 1024, 128, " page1"): {},
    PREFILL.format(16, 1024, 128, " page16"): {},
    PREFILL.format(16, 1024, 128, ""): {},
    PREFILL.format(1, 16384, 128, " page1"): {},
    PREFILL.format(1, 16384, 128, " page16"): {"in order": ORDER, "keys ahead": AHEAD},
    PREFILL.format(1, 16384, 128, ""): {"order": ORDER, "apart": APART},
    PREFILL.format(1, 16384, 64, ""): {"order": ORDER},
    PREFILL.format(1, 16384, 256, ""): {},
}
"""Cases and what is tried on each; the most doubtful first."""


class Override:
    """A plugin that answers for the prefill kernel."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    @hookimpl
    def fi_tuning(self, op: str) -> Tuning | None:
        return self._tuning if op == "attention_prefill" else None


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Plans made inside have these parameters in the place of the built-in ones."""
    plugin, manager = Override(tuning), registry().manager
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)


def with_tunings(case: Case, tunings: Mapping[str, Tuning]) -> Case:
    """The case with a variant of our call for each tuning."""

    def under(tuning: Tuning, make: Maker) -> Maker:
        def made() -> Call:
            with tuned(tuning):
                return make()

        return made

    def build(device: torch.device) -> Problem:
        problem = case.build(device)
        variants = {f", {name}": under(tuning, problem.ours[""]) for name, tuning in tunings.items()}
        return replace(problem, ours={**problem.ours, **variants})

    return replace(case, build=build)


def compile_share(share: int, shares: int) -> None:
    """Compile every ``shares``-th kernel: a call of each on a small batch."""
    wanted = [(case, tuning) for case, tunings in CASES.items() for tuning in ({}, *tunings.values())]
    for name, tuning in wanted[share::shares]:
        shape = choose([], [name])[0].build.keywords["shape"]  # type: ignore[attr-defined]
        with tuned(tuning):
            ours(make_inputs(normal_device("cuda"), shape, [100], [100]), 100)()()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after so long")
    parser.add_argument("--warm", type=int, metavar="JOBS")
    options = parser.parse_args()
    if options.warm:
        shares = [(share, options.warm) for share in range(options.warm)]
        with multiprocessing.get_context("spawn").Pool(options.warm) as pool:
            pool.starmap(compile_share, shares)
        return 0
    started, device = time.monotonic(), normal_device("cuda")
    peers, versions, _ = found_peers(PeerOptions(options.peers))
    bench = Bench(device, clock_of(device), ROUNDS)
    rates, _ = measure_ceilings(bench)
    for name, tunings in CASES.items():
        if time.monotonic() - started > options.seconds:
            print("not run:", name)
            continue
        rows = run_case(with_tunings(choose([], [name])[0], tunings), bench, rates, Choice(["cuda"], peers))
        results.write(options.out, "prefill_tunings", rows, results.circumstances(device, versions))
        for row in rows:
            ratio = "" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.3f}"
            print(f"{name:45} {row.impl:45} {row.us or 0:9.1f} {ratio:6} {row.error or ''}"[:150], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
