"""Running the workloads: check the numerics against the reference, time the call, report rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..conformance.compare import compare
from ..contract import target_of
from ..devices import normal_device
from ..errors import ArgumentError, UnsupportedError
from ..reference.plugin import NAME as REFERENCE
from ..registry import registry, use
from .timing import Ceilings, measure
from .workload import SCALES, Builder, Workload
from .workloads import WORKLOADS


@dataclass(frozen=True)
class Row:
    """One timing: microseconds (median, 10th and 90th percentile), ``share_of_ceiling`` (see Ceilings.share), how it
    was timed, and ``error``: what was wrong with the outputs (None: they agree with the reference's) or why nothing
    ran."""

    op: str
    case: str
    impl: str
    us: float | None
    p10: float | None
    p90: float | None
    share_of_ceiling: float | None
    mode: str | None
    error: str | None

    def as_json(self) -> dict[str, Any]:
        """The row as JSON's types."""
        return asdict(self)


def bench(ops: Sequence[str] | None, device: torch.device | str, backend: str | None = None) -> Iterator[Row]:
    """A row for each typical call of ``ops`` (None: all) on ``device``, by the preferred kernel or by ``backend``'s.

    Outputs are compared with the reference's on equal random inputs before the call is timed; a row with an error has
    no time. Raises ArgumentError for an unknown operation and UnknownBackendError.
    """
    unknown = [name for name in ops or () if name not in WORKLOADS]
    if unknown:
        raise ArgumentError("ops", f"operations among {', '.join(WORKLOADS)}", unknown)
    where = normal_device(device)
    if where.type not in SCALES:
        raise ArgumentError("device", f"one of {', '.join(SCALES)}", device)
    ceilings = Ceilings.of(where)
    for op, builders in WORKLOADS.items():
        if ops is None or op in ops:
            for build in builders:
                yield _row(op, build, where, ceilings, backend)


def _row(op: str, build: Builder, device: torch.device, ceilings: Ceilings, backend: str | None) -> Row:
    scale = SCALES[device.type]
    with use(backend=REFERENCE):
        wanted = build(device, scale)
        expected = {name: tensor.clone() for name, tensor in wanted.call().items()}
    with nullcontext() if backend is None else use(backend=backend):
        try:
            request = registry().operations[op].request(target_of(device), **wanted.values)
            impl = registry().select(request).entry.full_name
        except UnsupportedError as error:
            return Row(op, wanted.case, backend or "none", None, None, None, None, None, f"unsupported: {error}")
        made: Workload = build(device, scale)
        found = {name: compare(out, expected[name], made.tolerance[name]) for name, out in made.call().items()}
        wrong = [f"{name}: {item.message}" for name, item in found.items() if item.message is not None]
        if wrong:
            return Row(op, made.case, impl, None, None, None, None, None, "; ".join(wrong))
        times = measure(made.call, device)
    share = ceilings.share(made.cost, times.us)
    return Row(op, made.case, impl, times.us, times.p10, times.p90, share, times.mode, None)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'operation':<16}{'case':<44}{'kernel':<28}{'us':>10}{'p10':>10}{'p90':>10}{'ceiling':>9}  mode"]
    for row in rows:
        start = f"{row.op:<16}{row.case:<44}{row.impl:<28}"
        if row.us is None:
            lines.append(f"{start}{row.error}")
        else:
            times = f"{row.us:>10.1f}{row.p10:>10.1f}{row.p90:>10.1f}"
            lines.append(f"{start}{times}{row.share_of_ceiling:>9.1%}  {row.mode}")
    return "\n".join(lines)
