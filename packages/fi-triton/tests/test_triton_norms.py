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
    rmsnorm(x, weight, 1e-5, weight_bias, None, out[..., : shape[-1]])
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
    add_rmsnorm(x, residual, weight, 1e-6, 1.0, None, out)
    assert torch.equal(residual, summed)
    wanted = expected_norm(summed, weight, 1e-6, 1.0)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_transposed_heads(device):
    x = torch.randn(4, 3, 32, device=device).transpose(0, 1)
    weight = torch.ones(32, device=device)
    rmsnorm(x, weight, 0.0, 0.0, None, x)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(3, 4, device=device), rtol=1e-5, atol=1e-5)


def test_zero_rows_are_zero(device):
    out = torch.full((3, 40), torch.nan, device=device)
    rmsnorm(torch.zeros(3, 40, device=device), torch.ones(40, device=device), 1e-6, 0.0, None, out)
    assert (out == 0).all()


FP8 = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
"""Bits of the significand behind the point."""


def expected_fp8(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 saturated and rounded to nearest even by adding and taking away a number whose last bit is that of the result."""
    limit, bits, info = torch.finfo(dtype).max, FP8[dtype], torch.finfo(dtype)
    value = value.clamp(-limit, limit)
    exponent = value.abs().clamp(min=info.smallest_normal).log2().floor()
    step = torch.exp2(exponent - bits)
    return torch.round(value / step) * step


@pytest.mark.parametrize("out_dtype", list(FP8), ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("in_memory", [True, False])
def test_fp8_output_of_a_known_norm(out_dtype, dtype, in_memory, device):
    # Rows of 1 and -1 have the norm x * weight exactly, so that only division, saturation and rounding are left.
    x = torch.where(torch.randn(5, 3, 64, device=device) < 0, -1.0, 1.0).to(dtype)
    weight = (torch.randn(64, device=device) * 2.0 ** torch.linspace(-20, 20, 64, device=device)).to(dtype)
    weight[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    scale = 0.37
    wide = torch.full((5, 5, 64), torch.nan, device=device).to(out_dtype)
    out = wide[:, 1:4]
    rmsnorm(x, weight, 0.0, 0.0, torch.tensor(scale, device=device) if in_memory else scale, out)
    quotient = (x * weight).float() / torch.tensor(scale, dtype=torch.float32)
    torch.testing.assert_close(out.double(), expected_fp8(quotient.double(), out_dtype), rtol=0, atol=0, equal_nan=True)
    assert out[..., 2].float().isnan().all() and not out[..., :2].float().isnan().any()
    assert wide[:, 0].float().isnan().all() and wide[:, 4].float().isnan().all()


@pytest.mark.parametrize("out_dtype", list(FP8), ids=str)
def test_add_rmsnorm_with_fp8_output(out_dtype, device):
    x, residual = torch.randn(2, 7, 200, device=device).bfloat16()
    weight = torch.randn(200, device=device).bfloat16()
    summed = (x.float() + residual.float()).bfloat16()
    out = torch.full((7, 200), torch.nan, device=device).to(out_dtype)
    add_rmsnorm(x, residual, weight, 1e-6, 1.0, 0.05, out)
    assert torch.equal(residual, summed)
    wanted = expected_norm(summed, weight, 1e-6, 1.0) / torch.tensor(0.05, dtype=torch.float32).item()
    assert (out.double() != expected_fp8(wanted, out_dtype)).sum() <= 1


def test_fp8_output_needs_the_hardware_that_rounds():
    from fi_core.contract import Target
    from fi_core.ops import OPERATIONS
    from fi_triton.elementwise_entries import ENTRIES

    for name in ("rmsnorm", "add_rmsnorm"):
        operation = next(item for item in OPERATIONS if item.name == name)
        entry = next(item for item in ENTRIES if item.op == name)
        for out_format, capability, served in (
            ("same", (8, 0), True),
            ("fp8_e4m3", (8, 6), False),
            ("fp8_e5m2", (8, 9), True),
            ("int8", (9, 0), False),
        ):
            request = operation.request(
                Target("cuda", capability), dtype=torch.bfloat16, hidden_size=4096, out_format=out_format
            )
            assert bool(entry.reject(request)) != served
