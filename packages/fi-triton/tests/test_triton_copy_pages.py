"""Triton's copy_pages: the conformance cases, pages larger than a program, and when the backend is chosen for it."""

from __future__ import annotations

import pytest
import torch
from fi_core import conformance
from fi_core.contract import Target
from fi_core.records import KVCache
from fi_core.registry import registry
from fi_triton.copy_pages import copy_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@conformance.parametrize("triton", ops=["copy_pages"], device=DEVICE)
def test_conformance(case):
    case()


@pytest.mark.parametrize(("dim", "dim_vo"), [(256, 64), (5, 300)])
def test_pages_take_several_programs_of_k_and_of_v(device, dim, dim_vo):
    content = [torch.randint(-(2**15), 2**15, (4, 37, 3, size), dtype=torch.int16) for size in (dim, dim_vo)]
    source = KVCache(*(part.view(torch.bfloat16).to(device) for part in content))
    target = KVCache(*(torch.full_like(part, float("nan")) for part in (source.k, source.v)))
    copy_pages(source, target, torch.tensor([3, 0], device=device), torch.tensor([1, 2], device=device))
    for part, written in zip(content, (target.k, target.v), strict=True):
        found = written.cpu().view(torch.int16)
        assert torch.equal(found[[1, 2]], part[[3, 0]])
        assert written[[0, 3]].isnan().all()


def test_every_placement_is_served_from_sm_80_on():
    operation = registry().operations["copy_pages"]
    (entry,) = (item for item in registry().kernels("copy_pages") if item.backend == "triton")
    for placement in ("device", "from_host", "to_host"):
        values = {**operation.typical, "placement": placement}
        assert entry.reject(operation.request(Target("cuda", (8, 0)), **values)) == []
        assert "below sm_80" in entry.reject(operation.request(Target("cuda", (7, 5)), **values))[0]
