"""Command line: run the cases (all, of an operation, or one), or make tables and pictures again from results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report, results
from .catalogue import GROUPS, choose
from .peers import Peer, PeerOptions, peers
from .plots import PlotError, draw_all
from .problem import Case
from .tunings import GivenTuning, with_tunings

ROUNDS, QUICK_ROUNDS = 40, 10
OUT = Path(".nox/bench")


def parser() -> argparse.ArgumentParser:
    """The options of a run; ``report`` as the first word is a command of its own (see ``report_parser``)."""
    made = argparse.ArgumentParser(prog="fi_benchmarks", description=__doc__)
    made.add_argument(
        "--op", action="append", default=[], metavar="OP", help=f"an operation or one of {', '.join(GROUPS)}"
    )
    made.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="a case by name, or all with this part"
    )
    made.add_argument("--impl", action="append", metavar="NAME", help="only implementations whose names begin so")
    made.add_argument(
        "--tuning",
        action="append",
        default=[],
        metavar="OP:NAME=VALUE,...",
        type=GivenTuning.parse,
        help="time our kernels also with this answer to fi_tuning (repeatable)",
    )
    made.add_argument("--list", action="store_true", help="list the cases and the peers found, run nothing")
    made.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"default: {OUT}")
    made.add_argument("--peers", type=Path, metavar="FOLDER", help="where peers were unpacked that are not installed")
    made.add_argument("--compile-peers", action="store_true", help="let peers compile missing modules (minutes)")
    made.add_argument("--reference", action="store_true", help="time the reference too")
    made.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    made.add_argument(
        "--seconds", type=float, metavar="S", help="start no case after S seconds; those left out are named"
    )
    made.add_argument("--commit", metavar="TEXT", help="what the rows name (default: git's answer)")
    made.add_argument("--plots", action="store_true", help="make the pictures too (matplotlib)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def report_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="fi_benchmarks report", description="tables and pictures from result files")
    made.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="result files, or folders of them")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default: the first folder of RESULTS")
    made.add_argument(
        "--op", action="append", metavar="OP", help="pictures of this operation or group only (repeatable)"
    )
    made.add_argument("--no-plots", action="store_true", help="tables only")
    return made


def found_peers(options: PeerOptions) -> tuple[list[Peer], dict[str, str], dict[str, str]]:
    """The peers that are here, their versions, and why each of the others is absent."""
    here, versions, absent = [], {}, {}
    for peer in peers():
        try:
            versions[peer.name] = peer.find(options)
            here.append(peer)
        except Exception as error:  # noqa: BLE001 - foreign modules raise anything at import; the reason is printed
            absent[peer.name] = f"{type(error).__name__}: {error}"
    return here, versions, absent


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        return _report(report_parser().parse_args(given[1:]))
    made = parser()
    options = made.parse_args(given)
    try:
        cases = choose(options.op, options.case)
    except ValueError as error:
        made.error(str(error))
    here, versions, absent = found_peers(PeerOptions(options.peers, options.compile_peers))
    for name, version in versions.items():
        print(f"peer {name}: {version}")
    for name, reason in absent.items():
        print(f"peer {name}: absent ({reason})")
    if options.list:
        print("\n".join(f"{case.group:<10}{case.op:<15}{case.name}" for case in cases))
        return 0
    return _run(options, cases, here, versions)


def _run(options: argparse.Namespace, cases: Sequence[Case], here: Sequence[Peer], versions: dict[str, str]) -> int:
    from fi_core.bench.timing import clock_of
    from fi_core.devices import normal_device

    from .ceilings import Bench, measure_ceilings
    from .runner import Choice, ceiling_rows, our_backends, run_case

    started, device = time.monotonic(), normal_device(options.device)
    bench = Bench(device, clock_of(device), QUICK_ROUNDS if options.quick else ROUNDS)
    shared = results.circumstances(device, versions, options.commit)
    rates, measured = measure_ceilings(bench)
    rows = ceiling_rows(measured, rates)
    results.write(options.out, "ceilings", rows, shared)
    _print(rows)
    choice = Choice(our_backends(options.reference), here, options.impl)
    num_wrong, left = 0, list(cases)
    while left and (options.seconds is None or time.monotonic() - started < options.seconds):
        case = left.pop(0)
        rows = run_case(with_tunings(case, options.tuning), bench, rates, choice)
        if rows:
            results.write(options.out, case.group, rows, shared)
        _print(rows)
        num_wrong += sum(row.kind == "ours" and row.us is None for row in rows)
    print(
        f"{time.monotonic() - started:.0f} s; report: {report.write_report(results.load([options.out]), options.out)}"
    )
    if options.plots:
        draw_all(results.load([options.out]), options.out)
    for case in left:
        print(f"not run, the time was over: {case.name}")
    return 1 if num_wrong or left else 0


def _print(rows: Sequence[Any]) -> None:
    for row in rows:
        start = f"{row.case:<48} {row.impl:<28}"
        if row.us is None:
            print(f"{start} ERROR {row.error}", flush=True)
            continue
        ratio = "" if row.ratio_to_best_peer is None else f" {row.ratio_to_best_peer:5.2f}x best peer"
        mode = "" if row.mode in (None, "graph") else f" {row.mode}"
        spread = f"{row.us:9.2f} us [{row.p10:.2f}, {row.p90:.2f}], warm {row.warm_us:.2f}"
        print(f"{start}{spread}, {row.share_of_ceiling:4.0%} of ceiling{ratio}{mode}", flush=True)


def _report(options: argparse.Namespace) -> int:
    rows = results.load(options.results)
    if not rows:
        print("fi_benchmarks: no rows in " + ", ".join(map(str, options.results)), file=sys.stderr)
        return 1
    first = options.results[0]
    folder = options.out or (first if first.is_dir() else first.parent)
    print(report.write_report(rows, folder))
    if options.no_plots:
        return 0
    try:
        drawn = [row for row in rows if not options.op or {row["op"], row["group"]} & {*options.op, "ceilings"}]
        for path in draw_all(drawn, folder):
            print(path)
    except PlotError as error:
        print(f"fi_benchmarks: {error}", file=sys.stderr)
        return 1
    return 0
