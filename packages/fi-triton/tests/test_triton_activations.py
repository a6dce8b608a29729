"""Triton's silu_mul and gelu_mul against float64 formulas, over all magnitudes and on strided views."""

from __future__ import annotations

import math

import pytest
import torch
from fi_triton.activations import gelu_mul, silu_mul

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def gelu(gate: torch.Tensor, approximate: str) -> torch.Tensor:
    if approximate == "none":
        return gate * 0.5 * torch.erfc(-gate / math.sqrt(2))
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu none", "gelu tanh"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 1500), (3, 2, 40)], ids=str)
def test_matches_float64(dtype, name, shape, device):
    kind, _, approximate = name.partition(" ")
    width = shape[-1]
    padded = torch.randn(*shape[:-1], 2 * width + 8, device=device) * 4
    x = padded.to(dtype)[..., : 2 * width]
    out = torch.full((*shape[:-1], width + 8), torch.nan, device=device, dtype=dtype)
    kernel = silu_mul if kind == "silu" else gelu_mul
    kernel(x, approximate or "none", out[..., :width])
    gate, up = x.double()[..., :width], x.double()[..., width:]
    wanted = (gate * torch.sigmoid(gate) if kind == "silu" else gelu(gate, approximate)) * up
    torch.testing.assert_close(out[..., :width].double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[..., width:].isnan().all()


@pytest.mark.parametrize("name", ["silu", "gelu none", "gelu tanh"])
def test_extreme_gates(name, device):
    kind, _, approximate = name.partition(" ")
    gate = torch.tensor([-3e38, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 3e38], device=device)
    out = torch.full((1, 8), torch.nan, device=device)
    kernel = silu_mul if kind == "silu" else gelu_mul
    kernel(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0), approximate or "none", out)
    torch.testing.assert_close(out[0], gate.clamp(min=0), rtol=1e-6, atol=1e-30)


def test_nan_gate_stays_nan(device):
    out = torch.zeros(1, 2, device=device)
    silu_mul(torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]], device=device), "none", out)
    assert out.isnan().all()
