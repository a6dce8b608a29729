"""``fi matrix``: the support matrix of the installed backends."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..support_matrix import support_matrix, update_text


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("matrix", help="print the support matrix, or write it into a Markdown file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the file's markers")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.write is None:
        print(support_matrix())
        return 0
    path: Path = arguments.write
    path.write_text(update_text(path.read_text(), support_matrix()))
    return 0
