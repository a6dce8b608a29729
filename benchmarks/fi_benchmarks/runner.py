"""Running cases: every implementation checked, then all of them and the ceilings timed in turns; a row each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from fi_core.bench.timing import ColdAndWarm, measure_in_turns
from fi_core.contract import Cost, target_of
from fi_core.errors import UnsupportedError
from fi_core.reference.plugin import NAME as REFERENCE
from fi_core.registry import registry, use

from .ceilings import Bench, Measured, Rates
from .numerics import Accuracy
from .peers import Offer, Peer
from .problem import Call, Case, Maker, Problem

OURS, PEER, CEILING, AGAIN = "ours", "peer", "ceiling", "again"
"""Kinds of rows; "again" is the first implementation timed a second time: how far equals may lie apart."""
_DIGITS = 5


@dataclass(frozen=True)
class Row:
    """One implementation of one case: microseconds cold (median, 10th and 90th percentile) and ``warm_us``;
    ``share_of_ceiling`` is the ceiling's time over its own, ``ratio_to_best_peer`` the best peer's time over its own
    (above 1: faster). ``families``: microseconds of a step's parts by name. ``checked`` says that the numerics were compared
    and agreed; an ``error`` row has no times."""

    op: str
    group: str
    case: str
    impl: str
    kind: str
    us: float | None = None
    p10: float | None = None
    p90: float | None = None
    warm_us: float | None = None
    share_of_ceiling: float | None = None
    ratio_to_best_peer: float | None = None
    rel_rmse: float | None = None
    max_error: float | None = None
    num_bytes: int | None = None
    num_flops: int | None = None
    mode: str | None = None
    families: Mapping[str, float] | None = None
    checked: bool = False
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What the row says, as JSON's types; what is not known is left out, and times have five digits."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {
            name: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for name, value in values.items()
        }


@dataclass(frozen=True)
class Choice:
    """Which implementations take part: ``backends`` of ours and ``peers`` found; ``wanted`` (names or their begins; None:
    all, ceilings included)."""

    backends: Sequence[str]
    peers: Sequence[Peer]
    wanted: Sequence[str] | None = None

    def admits(self, impl: str) -> bool:
        return self.wanted is None or any(impl.startswith(name) for name in self.wanted)


@dataclass
class _Entry:
    """An implementation on its way: a call once it was checked, else an error."""

    impl: str
    kind: str
    make: Maker
    call: Call | None = None
    accuracy: Accuracy = field(default_factory=lambda: Accuracy(None))
    error: str | None = None


def our_backends(with_reference: bool) -> list[str]:
    """Installed backends, the reference only where asked for."""
    return [name for name in registry().backends if with_reference or name != REFERENCE]


def run_case(case: Case, bench: Bench, rates: Rates, choice: Choice) -> list[Row]:
    """The rows of one case. What an implementation raises is its own row's error; the others go on."""
    rows = _case_rows(case, bench, rates, choice)
    gc.collect()  # graphs hold memory in cycles
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _case_rows(case: Case, bench: Bench, rates: Rates, choice: Choice) -> list[Row]:
    try:
        problem = case.build(bench.device)
    except Exception as error:  # noqa: BLE001 - one case's inputs must not cost the device time of the others
        return [Row(case.op, case.group, case.name, "inputs", OURS, error=_text(error))]
    entries = [entry for entry in _entries(case, problem, bench.device, choice) if choice.admits(entry.impl)]
    if not entries:
        return []
    for entry in entries:
        _prepare(entry, problem)
    ready = [entry for entry in entries if entry.call is not None]
    first = next((entry for entry in ready if entry.kind != CEILING), None)
    if first is not None:
        again = _Entry(f"{first.impl} (again)", AGAIN, first.make, first.call, first.accuracy)
        entries.append(again)
        ready.append(again)
    timed = _timed(ready, bench, problem.repeats)
    return _rows(case, problem, entries, timed, rates)


def _entries(case: Case, problem: Problem, device: torch.device, choice: Choice) -> Iterator[_Entry]:
    request = registry().operations[case.op].request(target_of(device), **problem.request)
    for backend in choice.backends:
        try:
            name = registry().select(request, backend).entry.full_name
        except UnsupportedError:
            continue
        for variant, make in problem.ours.items():
            yield _Entry(name + variant, OURS, _with_backend(backend, make))
    for peer in choice.peers:
        offer = peer.offers.get(case.op)
        if offer is not None:
            yield from _offered(peer.name, offer, problem)
    yield from (_Entry(name, CEILING, make) for name, make in problem.ceilings.items())


def _offered(name: str, offer: Offer, problem: Problem) -> Iterator[_Entry]:
    try:
        found = offer(problem)
    except Exception as error:  # noqa: BLE001 - see _guarded
        reason = _text(error)

        def fail() -> Call:
            raise RuntimeError(reason)

        found = {name: fail}
    yield from (_Entry(impl, PEER, make) for impl, make in found.items())


def _with_backend(backend: str, make: Maker) -> Maker:
    def made() -> Call:
        with use(backend=backend):
            call = make()

        def forced() -> Mapping[str, torch.Tensor]:
            with use(backend=backend):
                return call()

        return forced

    return made


def _guarded(entry: _Entry, step: Callable[[], Any]) -> Any:
    """``step()``, or None with the entry's error set."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - foreign code: its failure is a row, and the other rows are wanted
        entry.error = _text(error)
        return None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _prepare(entry: _Entry, problem: Problem) -> None:
    """Make the call, run it once and check what it gives."""

    def step() -> Call:
        call = entry.make()
        outputs = call()
        if entry.kind != CEILING:
            entry.accuracy = problem.check(outputs)
        return call

    call = _guarded(entry, step)
    if entry.error is None:
        entry.error = entry.accuracy.message
    entry.call = call if entry.error is None else None


def _timed(entries: Sequence[_Entry], bench: Bench, repeats: int) -> dict[str, ColdAndWarm]:
    """Times by implementation. Where timing them together fails, the one that cannot be timed is found and left out."""
    calls = [entry.call for entry in entries if entry.call is not None]
    try:
        found = measure_in_turns(calls, bench.clock, bench.rounds, repeats)
    except Exception:
        usable = [entry for entry in entries if _can_be_timed(entry, bench, repeats)]
        if len(usable) == len(entries):
            raise
        return _timed(usable, bench, repeats) if usable else {}
    return {entry.impl: times for entry, times in zip(entries, found, strict=True)}


def _can_be_timed(entry: _Entry, bench: Bench, repeats: int) -> bool:
    call = entry.call
    assert call is not None
    return _guarded(entry, lambda: measure_in_turns([call], bench.clock, 2, repeats)) is not None


def _rows(
    case: Case, problem: Problem, entries: Sequence[_Entry], timed: Mapping[str, ColdAndWarm], rates: Rates
) -> list[Row]:
    cold = {
        kind: [timed[e.impl].cold.us for e in entries if e.kind == kind and e.impl in timed] for kind in (PEER, CEILING)
    }
    matmul_us = problem.cost.num_flops / rates.matmul * 1e6
    # No run of these bytes and operations is shorter: neither than the fastest mover of the bytes nor than a matmul.
    ceiling = max(min(cold[CEILING], default=problem.cost.num_bytes / rates.read * 1e6), matmul_us)
    rows = []
    for entry in entries:
        row: dict[str, Any] = {
            "op": case.op,
            "group": case.group,
            "case": case.name,
            "impl": entry.impl,
            "kind": entry.kind,
        }
        row |= {"num_bytes": problem.cost.num_bytes, "num_flops": problem.cost.num_flops}
        times = timed.get(entry.impl)
        if times is None:
            rows.append(Row(**row, error=entry.error or "not timed"))
            continue
        us = times.cold.us
        row |= {
            "us": us,
            "p10": times.cold.p10,
            "p90": times.cold.p90,
            "warm_us": times.warm.us,
            "mode": times.cold.mode,
        }
        row |= {"share_of_ceiling": ceiling / us}
        if entry.kind != CEILING:
            row |= {"rel_rmse": entry.accuracy.rel_rmse, "max_error": entry.accuracy.max_error, "checked": True}
            row |= {"ratio_to_best_peer": min(cold[PEER]) / us if cold[PEER] else None}
        rows.append(Row(**row))
    return rows


def ceiling_rows(measured: Sequence[Measured], rates: Rates) -> list[Row]:
    """The device's ceilings as rows of the group "ceilings"."""
    rows = []
    for item in measured:
        best = min(other.us for other in measured if other.case == item.case)
        times: dict[str, Any] = {"us": item.us, "p10": item.p10, "p90": item.p90, "warm_us": item.warm_us}
        cost: Cost = item.cost
        sizes: dict[str, Any] = {"num_bytes": cost.num_bytes, "num_flops": cost.num_flops}
        rows.append(
            Row("ceiling", "ceilings", item.case, item.impl, CEILING, **times, share_of_ceiling=best / item.us, **sizes)
        )
    return rows
