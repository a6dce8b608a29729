"""``fi explain``: which kernel serves a request, and why the others do not."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from ..contract import Operation
from ..errors import ArgumentError
from ..explain import parse_target
from ..registry import registry

_SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("explain", help="which kernel serves a request, and why the others do not")
    parser.add_argument("op", metavar="OP", help="operation, such as attention")
    parser.add_argument(
        "changes",
        metavar="FIELD=VALUE",
        nargs="*",
        help="changes to the operation's typical request: dtype=fp16 head_dim=64 features=lse,sinks page_size=none",
    )
    parser.add_argument("--device", help="cpu, cuda, or cuda:sm_90 without such a device (default: cuda if any)")
    parser.add_argument("--backend", help="admit this backend only")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    operations = registry().operations
    if arguments.op not in operations:
        raise ArgumentError("OP", f"one of {', '.join(operations)}", arguments.op)
    operation = operations[arguments.op]
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    request = operation.request(parse_target(device), **changed_values(operation, arguments.changes))
    print(registry().select(request, arguments.backend))
    return 0


def changed_values(operation: Operation, changes: Sequence[str]) -> Mapping[str, Hashable]:
    """The typical values of ``operation`` with "field=value" texts applied, parsed by the type of the typical value."""
    values = dict(operation.typical)
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator:
            raise ArgumentError("FIELD=VALUE", "a field, '=' and a value", change)
        if name not in values:
            raise ArgumentError("FIELD", f"a field of {operation.name}: {', '.join(values)}", name)
        values[name] = _parse(name, text, operation.typical[name])
    return values


def _parse(name: str, text: str, typical: Hashable) -> Hashable:
    if isinstance(typical, torch.dtype):
        dtype = getattr(torch, _SHORT_DTYPES.get(text, text), None)
        if not isinstance(dtype, torch.dtype):
            raise ArgumentError(name, "a dtype, such as bf16 or float32", text)
        return dtype
    if isinstance(typical, bool):
        if text not in _BOOLS:
            raise ArgumentError(name, "true or false", text)
        return _BOOLS[text]
    if isinstance(typical, frozenset):
        return frozenset(item for item in text.split(",") if item)
    if isinstance(typical, str):
        return text
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ArgumentError(name, "an int or none", text) from error
