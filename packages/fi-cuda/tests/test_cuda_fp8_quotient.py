"""The FP8 quotients of ``fi/tile/fp8.cuh``, step by step in numpy, against IEEE division."""

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


def next_bits(x, step):
    return (np.float32(x).view(np.int32) + np.int32(step)).view(np.float32)


def quotient(x, scale, is_short):
    """`is_short`: of 11 significant bits or less."""
    size = np.abs(scale)
    lift = np.float32(2.0**80 if size < 2.0**-60 else 2.0**-80 if size > 2.0**60 else 1.0)
    divisor, lifted = np.float32(size * lift), x * np.copysign(lift, scale)
    inverse = np.float32(1) / divisor
    if is_short:
        one = np.ones(1, np.float32)
        near = next_bits(inverse, -1) if fma(one * inverse, divisor, -one)[0] > 0 else inverse
        rest = next_bits(np.fmax(fma(-one * near, divisor, one)[0] * near, np.float32(2.0**-126)), 1)
        return fma(lifted, near, lifted * rest)
    result = lifted * inverse
    for _ in range(2):
        remainder = fma(result, divisor, -lifted)
        result = np.where(np.abs(remainder) < INFINITY, fma(remainder, -inverse, result), result)
    return result


def fp8(x, largest, mantissa_bits, min_exponent):
    """float32 as an FP8 format holds it: saturated, to nearest even."""
    x = np.clip(x.astype(np.float64), -largest, largest)
    exponent = np.maximum(np.frexp(x)[1] - 1, min_exponent)
    step = np.exp2(exponent.astype(np.float64) - mantissa_bits)
    return np.copysign(np.rint(x / step) * step, x)


FORMATS = {"e4m3": (448.0, 3, -6), "e5m2": (57344.0, 2, -14)}


def expect_ieee(x, scale, is_short):
    with np.errstate(all="ignore"):
        actual, expected = quotient(x, scale, is_short), x / scale
    for name, form in FORMATS.items():
        found, wanted = fp8(actual, *form), fp8(expected, *form)
        np.testing.assert_array_equal(found, wanted, err_msg=f"{name}, scale {scale}")
        number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(wanted[number]))


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
        expect_ieee(x, scale, True)


def test_floats_take_two_steps():
    generator = np.random.default_rng(2)
    significands = generator.integers(2**23, 2**24, 200_000).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], dtype=np.float32)
    x = np.concatenate([significands * np.float32(2.0**-23), special])
    divisors = (generator.integers(2**23, 2**24, 30) * 2.0**-23).astype(np.float32)
    for scale in (*SCALES, *divisors, np.float32(2) - np.float32(2.0**-23), np.float32(1) + np.float32(2.0**-23)):
        expect_ieee(x, scale, False)


def test_the_short_way_of_floats_meets_ties_and_their_neighbours():
    # As norms take it. Quotients that are ties, and 1 to 3 units in the last place beside them, of 24-bit divisors.
    generator = np.random.default_rng(3)
    ties = (np.arange(17, 32, 2) * 2.0**-4).astype(np.float32)
    significands = generator.integers(2**23, 2**24, 100_000).astype(np.float32)
    for scale in (generator.integers(2**23, 2**24, 100) * 2.0**-23).astype(np.float32):
        products = ties * scale
        near = np.concatenate([next_bits(products, step) for step in range(-3, 4)])
        expect_ieee(np.concatenate([near, significands * np.float32(2.0**-23)]), scale, True)


@pytest.mark.parametrize("size", [2 - 2.0**-23, 2 - 2.0**-22, 1 + 2.0**-23, 1.0, 1.5])
def test_ties_of_short_numbers_and_what_is_next_to_them(size):
    # Quotients as close to a tie as they come: multiples of such scales by ties, and the neighbours in 11 bits.
    scale = np.float32(size)
    ties = np.concatenate([(np.arange(1, 64, 2) * 2.0**power) for power in range(-20, 9)])
    near = (ties * scale).astype(np.float16).astype(np.float32)
    x = np.concatenate([next_bits(near, step * 2**13) for step in (-1, 0, 1)])
    for factor in (1.0, 2.0**-40, 2.0**40, 2.0**-100, 2.0**70):
        with np.errstate(over="ignore", invalid="ignore"):
            moved = x * np.float32(factor)
        expect_ieee(moved, scale * np.float32(factor), True)
        expect_ieee(-moved, scale * np.float32(factor), True)


def test_product_with_the_inverse_alone_is_not_exact():
    # Multiples of 7 of which a seventh is a tie, where the product with the rounded seventh is not.
    x = np.float32(7) * np.arange(1, 64, 2).astype(np.float32)
    scale = np.float32(7)
    expect_ieee(x, scale, True)
    found = fp8(x * np.float32(np.float32(1) / scale), *FORMATS["e4m3"])
    assert (found != fp8(x / scale, *FORMATS["e4m3"])).any()
