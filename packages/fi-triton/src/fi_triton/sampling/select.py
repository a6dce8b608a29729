"""Which tokens of a row the filters keep, without sorting: multi-way search over order keys with exact integer sums.

Each pass over the row sums the counts or masses at and above 16 thresholds, which fixes 4 bits of the 32-bit key of the
last kept token; one more pass breaks ties by index. ``limits`` is the tuple (key, cut, min_weight, center, distance_key,
distance_cut): a token is kept iff its key is above ``key`` or equal with index <= ``cut``, its weight is at least
``min_weight``, and the key of its distance | shortfall - center | passes (distance_key, distance_cut) likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import scale_fraction, to_fraction
from .rows import load_block, order_key, to_mass, weight_and_shortfall

_FANOUT = tl.constexpr(16)
_BITS = tl.constexpr(4)


@triton.jit
def valid_filters(temperature, k_ptr, p_ptr, m_ptr, t_ptr):
    """Whether a row's parameters are in their ranges; comparisons that NaN fails."""
    valid = temperature >= 0.0
    if k_ptr is not None:
        valid &= tl.load(k_ptr) >= 0
    if p_ptr is not None:
        top_p = tl.load(p_ptr)
        valid &= (top_p > 0.0) & (top_p <= 1.0)
    if m_ptr is not None:
        min_p = tl.load(m_ptr)
        valid &= (min_p >= 0.0) & (min_p <= 1.0)
    if t_ptr is not None:
        typical_p = tl.load(t_ptr)
        valid &= (typical_p > 0.0) & (typical_p <= 1.0)
    return valid


@triton.jit
def distance_key(shortfall, center):
    """uint32 that grows as | shortfall - center | falls; the distance is not negative, so its bits order it."""
    return 0x7FFFFFFF - tl.abs(shortfall - center).to(tl.uint32, bitcast=True)


@triton.jit
def is_kept(token, scaled, weight, shortfall, limits, BY_DISTANCE: tl.constexpr):
    """Which tokens the limits keep; the distance counts only if BY_DISTANCE."""
    key, cut, min_weight, center, nearest, nearest_cut = limits
    own = order_key(scaled)
    kept = ((own > key) | ((own == key) & (token <= cut))) & (weight >= min_weight)
    if BY_DISTANCE:
        near = distance_key(shortfall, center)
        kept = kept & ((near > nearest) | ((near == nearest) & (token <= nearest_cut)))
    return kept


@triton.jit
def kept_block(row, start, limits, BY_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """(token, mass) of a block, mass 0 where the limits drop the token."""
    token, scaled = load_block(row, start, BLOCK)
    weight, shortfall = weight_and_shortfall(scaled, row[5])
    kept = is_kept(token, scaled, weight, shortfall, limits, BY_DISTANCE)
    return token, tl.where(kept, to_mass(weight), 0)


@triton.jit
def kept_total(row, limits, BY_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """Mass of the kept tokens, int64."""
    sums = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, row[3], BLOCK):
        _, mass = kept_block(row, start, limits, BY_DISTANCE, BLOCK)
        sums += mass
    return tl.sum(sums, axis=0)


@triton.jit
def _ranked_block(row, start, limits, center, BY_COUNT: tl.constexpr, BY_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """(token, key, amount): key of the order searched, amount 1 or the mass; ranking by distance weighs the tokens that
    ``limits`` keep, ranking by logit weighs all."""
    token, scaled = load_block(row, start, BLOCK)
    weight, shortfall = weight_and_shortfall(scaled, row[5])
    if BY_COUNT:
        amount = (start + tl.arange(0, BLOCK) < row[3]).to(tl.int64)
    elif BY_DISTANCE:
        amount = tl.where(is_kept(token, scaled, weight, shortfall, limits, False), to_mass(weight), 0)
    else:
        amount = to_mass(weight)
    key = distance_key(shortfall, center) if BY_DISTANCE else order_key(scaled)
    return token, key, amount


@triton.jit
def find_prefix(
    row,
    limits,
    center,
    target,  # int64, 1 or more
    BY_COUNT: tl.constexpr,
    BY_DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(key, cut) of the shortest prefix, in descending key and then index, whose amount reaches ``target``; (0, -1), which
    keeps everything, when all of it does not."""
    lane = tl.arange(0, _FANOUT)
    key = tl.full((), 0, tl.uint32)
    above = tl.full((), 0, tl.int64)  # amount of the keys above the interval that holds the answer
    for step in range(0, 32 // _BITS):
        shift = 32 - _BITS - step * _BITS
        thresholds = key + (lane.to(tl.uint32) << shift.to(tl.uint32))
        sums = tl.zeros((_FANOUT,), tl.int64)
        for start in range(0, row[3], BLOCK):
            _, own, amount = _ranked_block(row, start, limits, center, BY_COUNT, BY_DISTANCE, BLOCK)
            reached = own[None, :] >= thresholds[:, None]
            sums += tl.sum(tl.where(reached, amount[None, :], 0), axis=1)
        chosen = tl.max(tl.where(sums >= target, lane, 0), axis=0)
        above = tl.max(tl.where(lane == chosen + 1, sums, above), axis=0)
        key = key + (chosen.to(tl.uint32) << shift.to(tl.uint32))
    cut = tl.full((), -1, tl.int32)
    for start in range(0, row[3], BLOCK):
        token, own, amount = _ranked_block(row, start, limits, center, BY_COUNT, BY_DISTANCE, BLOCK)
        tied = tl.where(own == key, amount, 0)
        before = above + tl.cumsum(tied, axis=0) - tied
        cut = tl.maximum(cut, tl.max(tl.where((own == key) & (before < target), token, -1), axis=0))
        above += tl.sum(tied, axis=0)
    return key, cut


@triton.jit
def _mean_shortfall(row, limits, BLOCK: tl.constexpr):
    """(E, M) of the tokens that ``limits`` keep: float32 mean shortfall and int64 mass."""
    sums = tl.zeros((BLOCK,), tl.int64)
    moments = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, row[3], BLOCK):
        token, scaled = load_block(row, start, BLOCK)
        weight, shortfall = weight_and_shortfall(scaled, row[5])
        mass = tl.where(is_kept(token, scaled, weight, shortfall, limits, False), to_mass(weight), 0)
        sums += mass
        moments += to_mass(weight * tl.where(mass > 0, shortfall, 0.0))
    total = tl.sum(sums, axis=0)
    mean = tl.sum(moments, axis=0).to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
    return mean.to(tl.float32), total


@triton.jit
def mass_target(fraction, total):
    """The mass at which a prefix that is to hold ``fraction`` of ``total`` may end; 1 or more keeps the first token."""
    return tl.maximum(scale_fraction(to_fraction(tl.maximum(fraction, 0.0)), total), 1)


@triton.jit
def _first_at_peak(row, BLOCK: tl.constexpr):
    """Lowest token whose scaled logit is the largest."""
    first = tl.full((), 0x7FFFFFFF, tl.int32)
    for start in range(0, row[3], BLOCK):
        token, scaled = load_block(row, start, BLOCK)
        first = tl.minimum(first, tl.min(tl.where(scaled == row[5], token, 0x7FFFFFFF), axis=0))
    return first


@triton.jit
def open_limits():
    """Limits that keep every token."""
    key, cut = tl.full((), 0, tl.uint32), tl.full((), -1, tl.int32)
    return key, cut, tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), key, cut


@triton.jit
def filter_row(
    row,
    total,  # mass of the whole row
    vocab_size,
    top_k_ptr,  # at the row's parameter, or None; likewise the next three
    top_p_ptr,
    min_p_ptr,
    typical_p_ptr,
    JOINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(limits, kept mass) of a usable row. ``row`` must hold the kept tokens and those that each filter weighs."""
    key, cut, min_weight, center, nearest, nearest_cut = open_limits()
    if top_k_ptr is not None:
        limit = tl.load(top_k_ptr).to(tl.int64)
        if (limit > 0) & (limit < vocab_size):
            key, cut = find_prefix(row, open_limits(), center, limit, True, False, BLOCK)
            if not JOINT:
                total = kept_total(row, (key, cut, min_weight, center, nearest, nearest_cut), False, BLOCK)
    if top_p_ptr is not None:
        fraction = tl.load(top_p_ptr)
        if fraction < 1.0:
            p_key, p_cut = find_prefix(row, open_limits(), center, mass_target(fraction, total), False, False, BLOCK)
            shorter = (p_key > key) | ((p_key == key) & (p_cut < cut))
            key, cut = tl.where(shorter, p_key, key), tl.where(shorter, p_cut, cut)
    if min_p_ptr is not None:
        min_weight = tl.load(min_p_ptr)
    if typical_p_ptr is not None:
        fraction = tl.load(typical_p_ptr)
        if fraction < 1.0:
            considered = open_limits() if JOINT else (key, cut, min_weight, center, nearest, nearest_cut)
            center, weighed = _mean_shortfall(row, considered, BLOCK)
            target = mass_target(fraction, weighed)
            nearest, nearest_cut = find_prefix(row, considered, center, target, False, True, BLOCK)
    limits = (key, cut, min_weight, center, nearest, nearest_cut)
    kept = kept_total(row, limits, typical_p_ptr is not None, BLOCK)
    if (min_p_ptr is not None) or (typical_p_ptr is not None):
        if kept == 0:
            key, cut = order_key(row[5]), _first_at_peak(row, BLOCK)
            min_weight, nearest, nearest_cut = min_weight * 0.0, tl.full((), 0, tl.uint32), tl.full((), -1, tl.int32)
            kept = tl.full((), 4294967296, tl.int64)
    return (key, cut, min_weight, center, nearest, nearest_cut), kept
