"""Triton's rmsnorm and add_rmsnorm against float64, on rows, per-head views, in place and with poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from fi_triton.norms import MAX_WIDTH, add_rmsnorm, rmsnorm

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def expected_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + weight_bias)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(5, 96), (1, 1), (3, 2, 64), (2, MAX_WIDTH), (2, 5003)], ids=str)
@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
def test_rmsnorm(dtype, shape, weight_bias, device):
    padded = (*shape[:-1], shape[-1] + 8)
    x = torch.randn(padded, device=device).to(dtype)[..., : shape[-1]]
    weight = torch.randn(shape[-1], device=device).to(dtype)
    out = torch.full(padded, torch.nan, device=device, dtype=dtype)
    rmsnorm(x, weight, 1e-5, weight_bias, out[..., : shape[-1]])
    wanted = expected_norm(x, weight, 1e-5, weight_bias)
    torch.testing.assert_close(out[..., : shape[-1]].double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[..., shape[-1] :].isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_add_rmsnorm(dtype, in_place, device):
    x, residual = torch.randn(2, 7, 200, device=device).to(dtype)
    weight = torch.randn(200, device=device).to(dtype)
    summed = (x.float() + residual.float()).to(dtype)
    out = x if in_place else torch.full_like(x, torch.nan)
    add_rmsnorm(x, residual, weight, 1e-6, 1.0, out)
    assert torch.equal(residual, summed)
    wanted = expected_norm(summed, weight, 1e-6, 1.0)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_transposed_heads(device):
    x = torch.randn(4, 3, 32, device=device).transpose(0, 1)
    weight = torch.ones(32, device=device)
    rmsnorm(x, weight, 0.0, 0.0, x)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(3, 4, device=device), rtol=1e-5, atol=1e-5)


def test_zero_rows_are_zero(device):
    out = torch.full((3, 40), torch.nan, device=device)
    rmsnorm(torch.zeros(3, 40, device=device), torch.ones(40, device=device), 1e-6, 0.0, out)
    assert (out == 0).all()
