"""Keyed random numbers and exact scaling inside kernels; the device form of ``fi_core.random``."""

from __future__ import annotations

import triton
import triton.language as tl

_LOW_31_BITS = tl.constexpr(2**31 - 1)


@triton.jit
def random_bits(seed, position, sample, purpose):
    """(hi, lo), 31 bits each in int64, of the 62-bit random number of a key.

    Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) with key = ``seed`` (int64: low, high word) and counter =
    (position low, position high, sample, purpose).
    """
    position = position.to(tl.uint64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, sample.to(tl.uint32), (low * 0 + purpose).to(tl.uint32))
    return (words[0] >> 1).to(tl.int64), (words[1] >> 1).to(tl.int64)


@triton.jit
def scale_bits(hi, lo, total):
    """floor((hi * 2^31 + lo) * total / 2^62) for int64 0 <= total < 2^52: every intermediate stays below 2^63."""
    total_hi, total_lo = total >> 31, total & _LOW_31_BITS
    middle = hi * total_lo + ((lo * total_lo) >> 31)
    lower = lo * total_hi + (middle & _LOW_31_BITS)
    return hi * total_hi + (middle >> 31) + (lower >> 31)


@triton.jit
def scale_fraction(fraction, total):
    """floor(fraction * total / 2^31) for int64 0 <= fraction < 2^31 and 0 <= total < 2^52."""
    return fraction * (total >> 31) + ((fraction * (total & _LOW_31_BITS)) >> 31)


@triton.jit
def to_fraction(value):
    """round(value * 2^31) of float32 0 <= value < 1, to even on ties, in int64: the product by a power of 2 is exact."""
    scaled = value * 2147483648.0
    whole = tl.floor(scaled)
    rest = scaled - whole
    integer = whole.to(tl.int64)
    return integer + ((rest > 0.5) | ((rest == 0.5) & ((integer & 1) == 1))).to(tl.int64)
