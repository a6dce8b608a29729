"""Attention gives equal bits for equal inputs and plan: every case of the kit, run again and again on the GPU."""

from __future__ import annotations

import pytest
import torch
from fi_core.conformance.kit import BoundCase, bound_cases
from fi_core.registry import registry

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KERNELS = sorted(entry.name for entry in registry().kernels("attention") if entry.backend == "cuda")
TIMES = 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_repeats_its_bits(kernel):
    changed, num_cases = [], 0
    for bound in bound_cases("cuda", ["attention"], "cuda"):
        if not isinstance(bound, BoundCase) or bound.kernel.name != kernel:
            continue
        implementation = registry().implementation(bound.kernel)
        trial = bound.case.build(bound.device, bound.seed)
        first, *others = (trial.run(implementation) for _ in range(TIMES))
        num_cases += 1
        for found in others:
            changed += [
                f"{bound.name}: {name}"
                for name, tensor in first.items()
                if not torch.equal(tensor.contiguous().view(torch.uint8), found[name].contiguous().view(torch.uint8))
            ]
    assert num_cases > 0 and not changed, "\n".join(changed)
