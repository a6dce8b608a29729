"""Triton's rope against a plain loop over pairs in float64, in place and out of place, on padded strided views."""

from __future__ import annotations

import math

import pytest
import torch
from fi_core.rope import RopeConfig, RopeTable, YarnScaling
from fi_triton.rope import rope

HEAD_DIM = 24


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: float | None = None) -> torch.Tensor:
    """A tensor whose rows are separated by padding; random unless filled."""
    tokens, heads, dim = shape
    whole = torch.randn(tokens, heads + 1, dim + 8) if fill is None else torch.full((tokens, heads + 1, dim + 8), fill)
    return whole.to(device=device, dtype=dtype)[:, :heads, :dim]


def rotated(x: torch.Tensor, positions: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    out = x.double().cpu().clone()
    factor = config.attention_factor
    for token, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(config.inv_freq().float().tolist()):
            half = config.rotary_dim // 2
            a, b = (pair, pair + half) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
            cos, sin = math.cos(position * frequency) * factor, math.sin(position * frequency) * factor
            first, second = x[token, :, a].double().cpu(), x[token, :, b].double().cpu()
            out[token, :, a], out[token, :, b] = first * cos - second * sin, second * cos + first * sin
    return out


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_matches_a_loop(pairs, tabulated, rotary_dim, dtype, in_place, device):
    scaling = YarnScaling(4.0, 64) if rotary_dim == 12 else None
    config = RopeConfig(rotary_dim, pairs=pairs, scaling=scaling)
    table = RopeTable.make(config, device, 64 if tabulated else None)
    q, k = strided((3, 5, HEAD_DIM), dtype, device), strided((3, 2, HEAD_DIM), dtype, device)
    positions = torch.tensor([0, 63, 17], device=device)
    expected = rotated(q, positions, config), rotated(k, positions, config)
    out = (q, k) if in_place else tuple(strided(tuple(x.shape), dtype, device, torch.nan) for x in (q, k))
    rope(q, k, positions, table, *out)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    for actual, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(actual.double().cpu(), wanted, rtol=tolerance, atol=tolerance)


def test_computed_angles_stay_exact_at_long_positions(device):
    config = RopeConfig(HEAD_DIM, base=500000.0)
    q = torch.randn(2, 1, HEAD_DIM, device=device)
    positions = torch.tensor([131071, 2_000_003], dtype=torch.int32, device=device)
    expected = rotated(q, positions, config)
    rope(q, None, positions, RopeTable.make(config, device), q, None)
    torch.testing.assert_close(q.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_padding_between_rows_is_left_alone(device):
    whole = torch.full((2, 3, 32), 9.0, device=device)
    q, table = whole[:, :2, :16], RopeTable.make(RopeConfig(16), device)
    rope(q, None, torch.tensor([5, 6], device=device), table, q, None)
    assert (whole[:, 2] == 9.0).all() and (whole[:, :, 16:] == 9.0).all()
    assert (whole[:, :2, :16] != 9.0).any()
