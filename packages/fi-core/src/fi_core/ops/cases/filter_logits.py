"""Conformance cases of ``filter_logits``: the kept tokens must be equal, masked logits bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Tolerance, Trial
from ...reference.sampling import filter_logits
from . import guarded
from .sample import draw_cases
from .sampling_inputs import DrawCase, draw_inputs, on_device

_PROBS = Tolerance(1e-5, 2e-6)
"""The roundings of an exponential and of a quotient, and the 2^-32 step of a mass."""


def _build(case: DrawCase, kind: str, device: torch.device, seed: int) -> Trial:
    inputs = draw_inputs(case, seed)
    content, filters = inputs.logits.to(device), on_device(inputs.filters, device)
    shape = inputs.logits.shape
    tolerance = {"out": EXACT if kind == "logits" else _PROBS, "rest": EXACT, "kept": EXACT}

    def kept(out: Tensor) -> Tensor:
        return (out > (0 if kind == "probs" else -torch.inf)).to(torch.int32)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        logits = guarded(shape, case.dtype, device, after=case.after, content=content)
        out = guarded(shape, torch.float32, device, after=case.after)
        kernel(logits.view, filters, kind, out.view)
        return {"out": out.view.contiguous(), "rest": out.rest(), "kept": kept(out.view)}

    def expected() -> Mapping[str, Tensor]:
        out = torch.empty(shape, dtype=torch.float64)
        filter_logits(inputs.logits, inputs.filters, kind, out)
        return {"out": out, "rest": guarded(shape, torch.float32, device, after=case.after).rest(), "kept": kept(out)}

    return Trial(run, expected, tolerance)


def cases() -> Iterator[Case]:
    """Every case of ``filter_logits``, in both kinds."""
    for case in draw_cases():
        for kind in ("logits", "probs"):
            values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "filters": case.filters, "order": case.order}
            yield Case(f"{case.name}_{kind}", {**values, "kind": kind}, partial(_build, case, kind), case.tags)
