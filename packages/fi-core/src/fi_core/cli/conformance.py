"""``fi conformance``: run the conformance kit on a backend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..conformance.kit import BoundCase, bound_cases, run


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("conformance", help="run every operation's cases on a backend's kernels")
    parser.add_argument("--backend", required=True, metavar="NAME")
    parser.add_argument("--op", action="append", metavar="OP", help="only this operation (repeatable)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose operation/name contains this")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    parser.add_argument("--large", action="store_true", help="also cases that need several GB (CUDA only)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="share the cases among N processes (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--list", action="store_true", help="print the cases without running them")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    selection = (arguments.backend, arguments.op, arguments.device, arguments.case, arguments.seed, arguments.large)
    if arguments.list:
        found = list(bound_cases(*selection))
        for item in found:
            print(f"run          {item.name}" if isinstance(item, BoundCase) else item)
        return 0 if found and all(isinstance(item, BoundCase) or item.outcome != "failed" for item in found) else 1
    report = run(*selection, jobs=arguments.jobs)
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json() + "\n")
    return 0 if report.ok else 1
