"""Plans that read a prefix once for all the requests that share it, and the rates by which that is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import fi_core as fi
import torch
from fi_core import CapacityError, Plan, UnsupportedError
from fi_core.plan import attention_request
from fi_core.registry import registry
from fi_scheduler.sharing import SharingCosts, SharingRates

from .config import EngineConfig

MAX_DEPTH = 4
"""Most shared prefixes around one request."""

RATES: Mapping[tuple[str, str], SharingRates] = {
    # benchmarks/fit_sharing.py on an H200, but for the rate of products: it found 683 TFLOP/s with 256 members, and tiles of
    # fewer are less full. docs/shared_prefixes.md has what the model makes of other cases.
    ("NVIDIA H200", "cuda"): SharingRates(4499.0, 9154.0, 4326.0, 450_000.0, 225.0, 127.0, 6714.0, 1.2e8),
    # The same multiprocessors behind memory that streams 3036 GB/s instead: those of the H200, scaled where memory is the limit.
    ("NVIDIA H100 80GB HBM3", "cuda"): SharingRates(2950.0, 9154.0, 2840.0, 450_000.0, 225.0, 127.0, 6714.0, 1.2e8),
}
"""By (start of the device's name, backend). ``benchmarks/fit_sharing.py`` measures them on a device."""


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
        never taken: sharing must not cost a better kernel. (Nor one of theirs that selection prefers less than another's.)"""
        if not config.shared_prefixes:
            return cls(None, None, None, 0, ("shared prefixes: off by config.shared_prefixes",))
        backend = decode.selection.entry.backend
        rates = config.sharing_rates or rates_of(decode.device, backend)
        if rates is None:
            where = f"{backend} on {_name(decode.device)}"
            return cls(None, None, None, 0, (f"shared prefixes: off, as no rates are known for {where}",))
        # Every shared prefix branches or ends a request: there are fewer of them than requests.
        max_nodes = decode.capacity.max_batch
        of_decodes, about_decodes = _with_levels(decode, max_nodes)
        of_others, about_others = _with_levels(mixed, max_nodes)
        notes = (
            f"shared prefixes: chosen by {rates}",
            f"decode steps: {about_decodes}",
            f"mixed steps: {about_others}",
        )
        if of_decodes is None and of_others is None:
            return cls(None, None, None, 0, notes)
        return cls(of_decodes, of_others, SharingCosts.of(decode.spec, rates), max_nodes, notes)

    def explain(self) -> list[str]:
        """Lines for a person."""
        return list(self.notes)


def rates_of(device: torch.device, backend: str) -> SharingRates | None:
    """The rates measured for a device and backend, if there are any."""
    name = _name(device)
    return next((rates for (start, of), rates in RATES.items() if name.startswith(start) and of == backend), None)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _with_levels(plan: Plan, max_nodes: int) -> tuple[Plan | None, str]:
    """A plan like ``plan`` for batches with levels, and the kernel's name; or None and why there is none."""
    request = attention_request(plan.spec, plan.capacity.max_q_len, plan.device, levels=True)
    own = plan.selection.entry
    more = {"max_prefixes": max_nodes, "max_prefix_depth": MAX_DEPTH}
    try:
        preferred = registry().select(request).entry
        if preferred.backend != own.backend:
            return None, f"no prefix is read once, as that would be {preferred.full_name} in place of {own.full_name}"
        made = fi.plan(plan.spec, **{**asdict(plan.capacity), **more}, device=plan.device)
    except (UnsupportedError, CapacityError) as error:
        return None, f"no prefix is read once: {error}"
    return made, f"{preferred.full_name}, up to {max_nodes} prefixes"
