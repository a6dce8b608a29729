"""The FP8 quotient of ``fi/tile/fp8.cuh``, step by step in numpy, against IEEE division."""

import numpy as np
import pytest

INFINITY = np.float32(np.inf)


def fma(a, b, c):
    """float32 a * b + c with one rounding: the product is exact in float64, the sum is rounded to odd there."""
    product = a.astype(np.float64) * np.float64(b)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    is_inexact_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    # One step away from zero if the error points there, else one towards it.
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(is_inexact_even, bits + step, bits).view(np.float64).astype(np.float32)


def quotient(x, scale, num_steps):
    size = np.abs(scale)
    lift = np.float32(2.0**80 if size < 2.0**-60 else 2.0**-80 if size > 2.0**60 else 1.0)
    divisor = size * lift
    inverse = np.float32(1) / divisor
    lifted = x * np.copysign(lift, scale)
    result = lifted * inverse
    for _ in range(num_steps):
        remainder = fma(result, divisor, -lifted)
        result = np.where(np.abs(remainder) < INFINITY, fma(remainder, -inverse, result), result)
    return result


def expect_ieee(x, scale, num_steps):
    with np.errstate(all="ignore"):
        actual, expected = quotient(x, scale, num_steps), x / scale
    size = np.abs(expected)
    # Below, every FP8 value is the zero of that sign; above, saturated.
    tiny, huge = size < 2.0**-18, size > 2.0**40
    exact = ~(tiny | huge)
    np.testing.assert_array_equal(actual[exact], expected[exact])
    np.testing.assert_array_equal(np.signbit(actual[tiny | huge]), np.signbit(expected[tiny | huge]))
    assert (np.abs(actual[tiny]) <= 2.0**-17).all()
    assert (np.abs(actual[huge]) > 65536).all()


SCALES = np.array(
    [1.0, 0.5, 0.1, 3.0, 1 / 448, 0.0123, -0.7, 0.0, -0.0, np.inf, -np.inf, np.nan]
    + [
        sign * (1 + part) * 2.0**power
        for power in (-149, -126, -61, -60, 59, 60, 126)
        for part in (0, 0.3)
        for sign in (1, -1)
    ],
    dtype=np.float32,
)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_16_bit_value_over_many_scales(dtype):
    bits = np.arange(2**16, dtype=np.uint32)
    x = (bits << 16).view(np.float32) if dtype == "bf16" else bits.astype(np.uint16).view(np.float16).astype(np.float32)
    generator = np.random.default_rng(1)
    random = np.exp2(generator.uniform(-20, 20, 40)).astype(np.float32)
    for scale in (*SCALES, *random):
        expect_ieee(x, scale, 1)


def test_floats_take_two_steps():
    generator = np.random.default_rng(2)
    significands = generator.integers(2**23, 2**24, 200_000).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], dtype=np.float32)
    x = np.concatenate([significands * np.float32(2.0**-23), special])
    divisors = (generator.integers(2**23, 2**24, 30) * 2.0**-23).astype(np.float32)
    for scale in (*SCALES, *divisors, np.float32(2) - np.float32(2.0**-23), np.float32(1) + np.float32(2.0**-23)):
        expect_ieee(x, scale, 2)


def test_product_with_the_inverse_alone_is_not_exact():
    x = np.arange(128, 256).astype(np.float32)
    with pytest.raises(AssertionError):
        expect_ieee(x, np.float32(0.0123), 0)
