"""Plans that read a prefix once for all the requests that share it, and the rates by which that is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import fi_core as fi
import torch
from fi_core import Plan, UnsupportedError
from fi_scheduler.sharing import SharingCosts, SharingRates

from .config import EngineConfig

MAX_DEPTH = 4
"""Most shared prefixes around one request."""

RATES: Mapping[tuple[str, str], SharingRates] = {}
"""By (start of the device's name, backend); made by benchmarks/fit_sharing.py on the device."""


@dataclass(frozen=True)
class SharedPlans:
    """Plans beside the ordinary ones, of the same capacities and backends; None where there is none, for the reason in
    ``notes``. ``costs``: by which the planner chooses (None: nothing is shared)."""

    decode: Plan | None
    mixed: Plan | None
    costs: SharingCosts | None
    max_nodes: int
    notes: tuple[str, ...]

    @classmethod
    def beside(cls, decode: Plan, mixed: Plan, config: EngineConfig) -> SharedPlans:
        """The plans for an engine's ``config`` beside its ordinary ``decode`` and ``mixed`` plans. Another backend than theirs is
        never taken: sharing must not cost a better kernel."""
        if not config.shared_prefixes:
            return cls(None, None, None, 0, ("shared prefixes: off by config.shared_prefixes",))
        backend = decode.selection.entry.backend
        rates = config.sharing_rates or rates_of(decode.device, backend)
        if rates is None:
            where = f"{backend} on {_name(decode.device)}"
            return cls(None, None, None, 0, (f"shared prefixes: off, as no rates are known for {where}",))
        # Every shared prefix branches or ends a request: there are fewer of them than requests.
        max_nodes = decode.capacity.max_batch
        made: list[Plan | None] = []
        notes = [f"shared prefixes: chosen by {rates}"]
        for name, plan in (("decode", decode), ("mixed", mixed)):
            try:
                made.append(_with_levels(plan, max_nodes))
                notes.append(f"{name} steps: {plan.selection.entry.backend}, up to {max_nodes} prefixes")
            except UnsupportedError as error:
                made.append(None)
                notes.append(f"{name} steps read no prefix once: {error}")
        if made == [None, None]:
            return cls(None, None, None, 0, tuple(notes))
        return cls(made[0], made[1], SharingCosts.of(decode.spec, rates), max_nodes, tuple(notes))

    def explain(self) -> list[str]:
        """Lines for a person."""
        return list(self.notes)


def rates_of(device: torch.device, backend: str) -> SharingRates | None:
    """The rates measured for a device and backend, if there are any."""
    name = _name(device)
    return next((rates for (start, of), rates in RATES.items() if name.startswith(start) and of == backend), None)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _with_levels(plan: Plan, max_nodes: int) -> Plan:
    more = {"max_prefixes": max_nodes, "max_prefix_depth": MAX_DEPTH}
    backend = plan.selection.entry.backend
    return fi.plan(plan.spec, **{**asdict(plan.capacity), **more}, device=plan.device, backend=backend)
