"""``fi bench``: time every operation's typical calls."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("bench", help="time every operation's typical calls, numerics checked")
    parser.add_argument("--op", action="append", metavar="OP", help="only this operation (repeatable)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one)")
    parser.add_argument("--backend", metavar="NAME", help="time this backend's kernels (default: the preferred ones)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..bench import bench, table

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(bench(arguments.op, device, arguments.backend))
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    num_wrong = sum(row.error is not None for row in rows)
    if num_wrong:
        print(f"fi: {num_wrong} of {len(rows)} rows have an error", file=sys.stderr)
    return 1 if num_wrong or not rows else 0
