"""The quotients of ``fi/sampling/row.cuh`` against IEEE division, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import fi_cuda.spec
import pytest
import torch
from emulated_kernels import emulate
from fi_cuda.compile import INCLUDE_FOLDER
from fi_cuda.params import ParamsLayout
from fi_cuda.spec import KernelSpec

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class ProbeQuotientSpec(KernelSpec):
    stem: ClassVar = "probe_quotient"
    contracts: ClassVar = False
    include_folders: ClassVar = (Path(__file__).parent / "include", INCLUDE_FOLDER)
    layout: ClassVar = ParamsLayout(
        (("numbers", "pointer"), ("divisors", "pointer"), ("quotients", "output"), ("count", "int64"))
    )

    @property
    def num_threads(self):
        return 256


def quotients(numbers, divisors):
    found = torch.full_like(numbers, torch.nan)
    count = numbers.numel()
    pointers = (numbers.data_ptr(), divisors.data_ptr(), found.data_ptr())
    kernel = fi_cuda.spec.kernel_for(ProbeQuotientSpec(), numbers.device)
    kernel.launch(numbers.device, -(-count // 256), 1, *pointers, count)
    return found


def floats(count, exponents, generator):
    """Random signs and significands, every eighth of which is next to a power of 2, with exponents from a range."""
    device = generator.device
    significands = torch.randint(0, 2**23, (count,), device=device, generator=generator)
    edges = torch.randint(-8, 8, (count,), device=device, generator=generator) % 2**23
    significands = torch.where(torch.arange(count, device=device) % 8 == 0, edges, significands)
    shifts = torch.randint(*exponents, (count,), device=device, generator=generator)
    signs = torch.randint(0, 2, (count,), device=device, generator=generator)
    bits = signs << 31 | (127 + shifts) << 23 | significands
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def check(count, device):
    generator = torch.Generator(device=device).manual_seed(4)
    for exponents, others in (((-20, 20), (-62, 62)), ((-3, 3), (-3, 6)), ((-120, 120), (-126, 127))):
        divisors = floats(count, exponents, generator).abs()
        numbers = floats(count, others, generator)
        for special in (0.0, torch.inf, -torch.inf):
            numbers[torch.randint(0, count, (count // 50,), device=device, generator=generator)] = special
        assert torch.equal(quotients(numbers, divisors).view(torch.int32), (numbers / divisors).view(torch.int32))


def test_quotients_are_those_of_a_division(monkeypatch):
    emulate(monkeypatch, [fi_cuda.spec])
    check(20000, "cpu")


@pytest.mark.gpu
def test_a_hundred_million_quotients_are_those_of_a_division():
    check(40_000_000, "cuda")
