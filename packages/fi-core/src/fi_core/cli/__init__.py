"""The ``fi`` command. Exit codes: 0 success, 1 a negative finding or an error (on stderr: of fi, or of a file), 2 wrong usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import FiError
from . import bench, conformance, doctor, explain, matrix


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; each sets ``run``, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(prog="fi", description="Inspect, test and time the kernels of fi's backends.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (doctor, explain, conformance, bench, matrix):
        module.add_to(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: sys.argv); returns the exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except (FiError, OSError) as error:
        print(f"fi: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return code
