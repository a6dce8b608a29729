"""The interpreter shim: bf16 and FP8 casts and dots equal torch's, bf16 arithmetic is refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fi_triton.interpreter import kernel_devices, prepare_interpreter

pytestmark = pytest.mark.interpreter


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    value = tl.load(x_ptr + index)
    tl.store(out_ptr + index, value.to(out_ptr.dtype.element_ty))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + row * N + column), tl.load(b_ptr + row * N + column))
    tl.store(out_ptr + row * N + column, product)


@triton.jit
def _twice(x_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    value = tl.load(x_ptr + index)
    tl.store(out_ptr + index, value + value)


@pytest.fixture(autouse=True)
def _shim():
    prepare_interpreter()


def _hostile_floats() -> torch.Tensor:
    """Every exponent, ties between neighbours, subnormals of each format, zeros and values past the FP8 ranges."""
    patterns = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halves = (torch.arange(-1024, 1024, dtype=torch.int64) * 2**15).to(torch.int32)
    small = torch.linspace(-600, 600, 2048)
    values = torch.cat([patterns.view(torch.float32), halves.view(torch.float32), small])
    return torch.where(values.isnan(), torch.tensor(-0.0), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = _hostile_floats()
    limit = torch.finfo(dtype).max
    expected = (x if dtype == torch.bfloat16 else x.clamp(-limit, limit)).to(dtype)
    out = torch.full(x.shape, 1.0).to(dtype)
    _cast[(1,)](x, out, N=x.numel())
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int8
    assert torch.equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_widening_is_exact(source, target):
    every = torch.arange(256, dtype=torch.uint8).view(source) if source.itemsize == 1 else torch.randn(256).to(source)
    x = torch.where(every.float().isnan(), torch.zeros(256), every.float()).to(source)
    out = torch.full((256,), -7.0, dtype=target)
    _cast[(1,)](x, out, N=256)
    assert torch.equal(out, x.float().to(target))


def test_nan_stays_nan():
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        out = torch.zeros(16).to(dtype)
        _cast[(1,)](torch.full((16,), torch.nan), out, N=16)
        assert out.float().isnan().all()


def test_dot_of_bf16():
    a, b = torch.randn(2, 32, 32).to(torch.bfloat16)
    out = torch.full((32, 32), torch.nan)
    _dot[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_bf16_arithmetic_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic on bf16"):
        _twice[(1,)](x, torch.empty_like(x), N=16)


def test_interpreted_kernels_also_serve_the_cpu():
    assert kernel_devices() == ("cuda", "cpu")
