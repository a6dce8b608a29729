"""The sampling kernels' own exponential, and draws compared with the reference's in the light of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import fi_cuda.spec
import torch
from fi_core.reference.sampling import masses as reference_masses
from fi_core.reference.sampling.boundary import boundary_distance
from fi_core.reference.sampling.draw import sample as reference_sample
from fi_cuda.compile import INCLUDE_FOLDER
from fi_cuda.params import ParamsLayout
from fi_cuda.spec import KernelSpec

WEIGHT_ERROR = 7 * 2.0**-23
"""Relative error of a kernel's weight that ``fi/sampling/weight.cuh`` promises: 2^-22 of the hardware's exponential, and the
roundings of its argument."""
LEAST_WEIGHT = 2.0**-16
"""The least weight of which it is promised; smaller ones' masses are within one unit."""


@dataclass(frozen=True)
class ProbeWeightSpec(KernelSpec):
    stem: ClassVar = "probe_weight"
    contracts: ClassVar = False
    include_folders: ClassVar = (Path(__file__).parent / "include", INCLUDE_FOLDER)
    layout: ClassVar = ParamsLayout(
        (("shortfalls", "pointer"), ("weights", "output"), ("masses", "output"), ("count", "int64"))
    )

    @property
    def num_threads(self):
        return 256


kernel_for = fi_cuda.spec.kernel_for


def kernel_weights(shortfalls):
    """(weights float32, masses int64) as kernels compute them, of float32 ``shortfalls``."""
    shortfalls = shortfalls.contiguous()
    weights = torch.full_like(shortfalls, torch.nan)
    masses = torch.full_like(shortfalls, -7, dtype=torch.int64)
    count = shortfalls.numel()
    pointers = (shortfalls.data_ptr(), weights.data_ptr(), masses.data_ptr())
    kernel_for(ProbeWeightSpec(), shortfalls.device).launch(shortfalls.device, -(-count // 256), 1, *pointers, count)
    return weights, masses


def check_weights(shortfalls, expected):
    """Weights and masses of float32 ``shortfalls`` are as promised; ``expected``: the correctly rounded weights."""
    weights, masses = kernel_weights(shortfalls)
    exact = expected.to(torch.float64)
    # The expected ones are themselves rounded.
    allowed = torch.where(exact >= LEAST_WEIGHT, (WEIGHT_ERROR + 2.0**-24) * exact, 2.0**-32)
    assert float(((weights.to(torch.float64) - exact).abs() - allowed).max()) <= 0
    assert torch.equal(masses, reference_masses.to_mass(weights))


def check_drawn(monkeypatch, found, logits, filters, keys):
    """``found`` are the very tokens of the reference with the kernels' exponential in the place of its own; and where the
    reference with its own draws others, the random target lies as close to a boundary as WEIGHT_ERROR explains.
    Returns how many tokens are others."""
    with monkeypatch.context() as patched:
        patched.setattr(reference_masses, "exponential", lambda shortfall: kernel_weights(shortfall)[0])
        same = torch.empty_like(found)
        reference_sample(logits, filters, keys, None, same)
    assert found.tolist() == same.tolist()
    if filters.typical_p is None:
        distance = boundary_distance(found, logits, filters, keys, WEIGHT_ERROR)
        assert float(distance.max()) <= 1, distance
    expected = torch.empty_like(found)
    reference_sample(logits, filters, keys, None, expected)
    return int((found != expected).sum())
