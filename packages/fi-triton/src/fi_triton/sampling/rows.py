"""Reading a row of logits in blocks: scaled logits, masses and order keys (``fi_core.sample`` defines them).

A ``row`` is the tuple (row_ptr, candidates_ptr, num_candidates, size, temperature, peak): ``size`` tokens, which are
0 .. size - 1 if ``num_candidates`` is 0, else (it equals ``size``) the ascending token ids at ``candidates_ptr``. ``peak`` is
the largest scaled logit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(row, start, BLOCK: tl.constexpr):
    """(token, scaled) of the BLOCK tokens from place ``start`` on; NaN and places past the end read as -inf."""
    row_ptr, candidates_ptr, num_candidates, size, temperature, peak = row
    place = start + tl.arange(0, BLOCK)
    token = tl.load(candidates_ptr + place, mask=place < num_candidates, other=place)
    logit = tl.load(row_ptr + token, mask=place < size, other=float("-inf")).to(tl.float32)
    scaled = tl.div_rn(logit, temperature)
    return token, tl.where(scaled == scaled, scaled, float("-inf"))


@triton.jit
def weight_and_shortfall(scaled, peak):
    """Float32 exp(scaled - peak) and peak - scaled.

    The hardware's exponential differs from the correctly rounded one by up to a few units in the last place, so a token
    can differ from the reference's where a random number or a filter's limit falls that close to a boundary.
    """
    shortfall = peak - scaled
    return tl.exp(-shortfall), shortfall


@triton.jit
def to_mass(weight):
    """int64(weight * 2^32), truncated; the product is exact."""
    return (weight * 4294967296.0).to(tl.int64)


@triton.jit
def order_key(value):
    """uint32 whose order is that of the float32 values, -0 and 0 equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def scan_row(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """(largest logit ignoring NaN, its first index, whether the row is free of NaN) of one row."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = lane
    has_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + lane
        logit = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        has_nan = has_nan | (logit != logit).to(tl.int32)
        better = logit > best
        best = tl.where(better, logit, best)
        best_token = tl.where(better, token, best_token)
    largest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == largest, best_token, 0x7FFFFFFF), axis=0)
    return largest, first, tl.max(has_nan, axis=0) == 0
