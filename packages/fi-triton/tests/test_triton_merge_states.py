"""Triton's merge_states against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from fi_triton.merge_states import merge_states


def formula(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights written out state by state; a state with lse = -inf is left out."""
    total = torch.zeros(o.shape[1:], dtype=torch.float64)
    mass = torch.zeros(lse.shape[1:], dtype=torch.float64)
    for state in range(o.shape[0]):
        weight = lse[state].double().exp()
        mass += weight
        total += torch.where(weight[..., None] > 0, weight[..., None] * o[state].double(), 0.0)
    return torch.where(mass[..., None] > 0, total / mass[..., None], 0.0), mass.log()


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 128), (torch.bfloat16, 80), (torch.float16, 8)])
@pytest.mark.parametrize("num_states", [0, 1, 2, 5])
def test_merges(dtype, dim, num_states, device):
    generator = torch.Generator().manual_seed(num_states)
    o = torch.randn(num_states, 7, 3, dim, generator=generator).to(dtype)
    lse = torch.randn(num_states, 7, 3, generator=generator) * 10
    lse[:, 0] = -math.inf
    lse[num_states // 2 :, 1] = -math.inf
    o[lse == -math.inf] = math.nan
    wide = torch.full((num_states, 7, 3, dim + 8), math.nan, dtype=dtype, device=device)
    wide[..., :dim] = o
    out = torch.full((7, 3, dim), math.nan, dtype=dtype, device=device)
    lse_out = torch.full((7, 3), math.nan, device=device)
    merge_states(wide[..., :dim], lse.to(device), out, lse_out)
    want_out, want_lse = formula(o, lse)
    torch.testing.assert_close(lse_out.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), want_out, rtol=2 * eps, atol=8e-6 + eps)


def test_large_exponents_do_not_overflow(device):
    lse = torch.tensor([5000.0, 4999.0, -5000.0]).view(3, 1, 1)
    o = torch.tensor([1.0, 3.0, 100.0]).view(3, 1, 1, 1).expand(3, 1, 1, 4).contiguous()
    out, lse_out = torch.empty(1, 1, 4, device=device), torch.empty(1, 1, device=device)
    merge_states(o.to(device), lse.to(device), out, lse_out)
    weight = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(out.cpu(), torch.full((1, 1, 4), weight + 3 * (1 - weight)), rtol=1e-3, atol=1e-3)
    assert lse_out.item() == pytest.approx(5000 - math.log(weight), abs=2e-3)


def test_no_rows(device):
    out, lse_out = torch.empty(0, 2, 8, device=device), torch.empty(0, 2, device=device)
    merge_states(torch.empty(3, 0, 2, 8, device=device), torch.empty(3, 0, 2, device=device), out, lse_out)
    assert out.shape == (0, 2, 8)
