"""``fi doctor`` and ``fi backends``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..doctor import diagnose
from ..explain import backends


def add_to(subparsers: Any) -> None:
    """Add both subcommands."""
    parser = subparsers.add_parser("doctor", help="versions, devices, settings and the state of every plugin")
    parser.set_defaults(run=_doctor)
    parser = subparsers.add_parser("backends", help="one line for every installed plugin")
    parser.set_defaults(run=_backends)


def _doctor(arguments: argparse.Namespace) -> int:
    found = diagnose()
    print("\n".join(found.lines))
    if found.problems:
        print(f"fi: {len(found.problems)} problems", file=sys.stderr)
    return 1 if found.problems else 0


def _backends(arguments: argparse.Namespace) -> int:
    failed = False
    for status in backends():
        if status.error is not None:
            failed = True
            print(f"fi: {status.entry_point} ({status.distribution}): {status.error}", file=sys.stderr)
        elif status.info is not None:
            info = status.info
            print(f"{info.name:<12}{info.version:<10}priority {info.priority:<5}{info.summary}")
    return 1 if failed else 0
