"""Rotary position embedding inside Triton kernels: angles, paired loads and stores, and the rotation itself.

Source: RoFormer (Su et al., 2021, section 3.4.2). A tile is [rows, pairs]; pair i is dims (i, i + rotary_dim / 2) in the
"half" layout and (2 i, 2 i + 1) in the "interleaved" one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _small_cos_sin(angle):
    """cos and sin of float32 |angle| <= pi / 4 by their Taylor series (remainder below 2.5e-8).

    The library functions carry a branch for huge angles that spills registers.
    """
    square = angle * angle
    cos = 1.0 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sin = angle + angle * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    return cos, sin


@triton.jit
def rope_cos_sin(
    position,  # integer tensor that broadcasts against ``pair``, e.g. [rows, 1]
    pair,  # integer tensor, e.g. [1, PAIRS]
    mask,  # which (position, pair) elements to read; broadcasts to their shape
    num_pairs,  # rotary_dim // 2
    table_ptr,  # float32 [max_position, rotary_dim], cos then sin; unread unless USE_TABLE
    table_stride,  # elements from one position of the table to the next
    inv_freq_ptr,  # float32 [num_pairs]; unread if USE_TABLE
    attention_factor,  # float; multiplies computed cos and sin (a table includes it)
    USE_TABLE: tl.constexpr,
):
    """Float32 cos and sin of each pair's angle.

    Computed angles are multiplied and reduced to an eighth of a turn in float64: in float32 the angle at position 100000
    would be off by up to 0.004 radians.
    """
    if USE_TABLE:
        row = table_ptr + position.to(tl.int64) * table_stride
        cos = tl.load(row + pair, mask=mask, other=1.0)
        sin = tl.load(row + num_pairs + pair, mask=mask, other=0.0)
    else:
        inv_freq = tl.load(inv_freq_ptr + pair, mask=pair < num_pairs, other=0.0)
        quarters = position.to(tl.float64) * inv_freq.to(tl.float64) * 0.6366197723675814
        nearest = tl.floor(quarters + 0.5)
        angle = ((quarters - nearest) * 1.5707963267948966).to(tl.float32)
        quadrant = nearest.to(tl.int64) & 3
        cos, sin = _small_cos_sin(angle)
        swapped = (quadrant & 1) == 1
        cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
        cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos) * attention_factor
        sin = tl.where(quadrant >= 2, -sin, sin) * attention_factor
    return cos, sin


@triton.jit
def load_pairs(row_ptr, pair, mask, num_pairs, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of each pair in float32, each [rows, PAIRS], from rows that start at ``row_ptr`` [rows, 1].

    ``pair`` is ``tl.arange(0, PAIRS)[None, :]`` and ``mask`` [rows, PAIRS]. Interleaved rows are read contiguously and
    taken apart in registers.
    """
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS)[None, :]
        ROWS: tl.constexpr = mask.shape[0]
        both_mask = tl.reshape(tl.join(mask, mask), (ROWS, 2 * PAIRS))
        both = tl.load(row_ptr + dim, mask=both_mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ROWS, PAIRS, 2)))
    else:
        first = tl.load(row_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row_ptr + num_pairs + pair, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(row_ptr, first, second, pair, mask, num_pairs, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Write both elements of each pair ([rows, PAIRS] each), rounded to the pointer's type; arguments as in load_pairs."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS)[None, :]
        ROWS: tl.constexpr = mask.shape[0]
        both_mask = tl.reshape(tl.join(mask, mask), (ROWS, 2 * PAIRS))
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * PAIRS))
        tl.store(row_ptr + dim, both.to(dtype), mask=both_mask)
    else:
        tl.store(row_ptr + pair, first.to(dtype), mask=mask)
        tl.store(row_ptr + num_pairs + pair, second.to(dtype), mask=mask)


@triton.jit
def rotate_pairs(first, second, cos, sin):
    """(first, second) turned by the angle: float32 in, float32 out."""
    return first * cos - second * sin, second * cos + first * sin
