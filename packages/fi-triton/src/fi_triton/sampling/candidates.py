"""Narrowing a row to the few tokens that can be kept, so that the many passes of the search read little.

One pass sums count and mass above 16 bounds evenly spaced below the largest scaled logit; the tokens above the first bound
that is sure to hold what the first filter keeps are compacted, in index order, into a list. Tokens below the last bound
have no mass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_block, to_mass, weight_and_shortfall
from .select import mass_target

_NUM_BOUNDS = tl.constexpr(16)
_STEP = tl.constexpr(1.4)  # 16 steps reach exp(-22.4) < 2^-32


@triton.jit
def coarse_sums(row, BLOCK: tl.constexpr):
    """(bounds float32, counts int32, masses int64), [16] each: tokens with a scaled logit at or above each bound. The last
    mass is that of the whole row."""
    bounds = row[5] - _STEP * (tl.arange(0, _NUM_BOUNDS) + 1).to(tl.float32)
    counts = tl.zeros((_NUM_BOUNDS,), tl.int32)
    masses = tl.zeros((_NUM_BOUNDS,), tl.int64)
    for start in range(0, row[3], BLOCK):
        _, scaled = load_block(row, start, BLOCK)
        weight, _ = weight_and_shortfall(scaled, row[5])
        inside = start + tl.arange(0, BLOCK) < row[3]
        above = (scaled[None, :] >= bounds[:, None]) & inside[None, :]
        counts += tl.sum(above.to(tl.int32), axis=1)
        masses += tl.sum(tl.where(above, to_mass(weight)[None, :], 0), axis=1)
    return bounds, counts, masses


@triton.jit
def bound_of_filters(
    bounds, counts, masses, peak, vocab_size, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, JOINT: tl.constexpr
):
    """Index of the first bound above which everything lies that the filters keep or weigh (pointers as in filter_row)."""
    lane = tl.arange(0, _NUM_BOUNDS)
    enough = lane == _NUM_BOUNDS - 1
    undecided = tl.full((), True, tl.int1)  # no earlier filter decides; ``decides`` implies it
    if typical_p_ptr is not None and JOINT:
        undecided = tl.load(typical_p_ptr) >= 1.0
    if top_k_ptr is not None:
        limit = tl.load(top_k_ptr)
        decides = undecided & (limit > 0) & (limit < vocab_size)
        enough = enough | (counts >= tl.where(decides, limit, 0x7FFFFFFF))
        undecided = undecided ^ decides
    if top_p_ptr is not None:
        fraction = tl.load(top_p_ptr)
        decides = undecided & (fraction < 1.0)
        target = mass_target(fraction, tl.max(masses, axis=0))
        enough = enough | (masses >= tl.where(decides, target, 0x7FFFFFFFFFFFFFFF))
        undecided = undecided ^ decides
    if min_p_ptr is not None:
        # Half the limit leaves room for the rounding of the bound itself.
        enough = enough | (tl.exp(bounds - peak) < tl.where(undecided, 0.5 * tl.load(min_p_ptr), 0.0))
    return tl.min(tl.where(enough, lane, _NUM_BOUNDS - 1), axis=0)


@triton.jit
def compact(row, bound, list_ptr, BLOCK: tl.constexpr):
    """Write the tokens at or above ``bound`` to ``list_ptr`` in index order; the caller has checked that they fit."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, row[3], BLOCK):
        token, scaled = load_block(row, start, BLOCK)
        taken = ((scaled >= bound) & (start + tl.arange(0, BLOCK) < row[3])).to(tl.int32)
        place = count + tl.cumsum(taken, axis=0) - taken
        tl.store(list_ptr + place, token, mask=taken == 1)
        count += tl.sum(taken, axis=0)
    tl.debug_barrier()  # other threads of the program read the list


@triton.jit
def narrow(row, bound_idx, bounds, counts, fits, capacity, BLOCK: tl.constexpr):
    """``row`` over its tokens above the bound if ``fits`` and they are at most ``capacity``, else ``row`` itself."""
    row_ptr, candidates_ptr, num_candidates, size, temperature, peak = row
    chosen = tl.arange(0, _NUM_BOUNDS) == bound_idx
    count = tl.max(tl.where(chosen, counts, 0), axis=0)
    if fits & (count <= capacity):
        compact(row, tl.max(tl.where(chosen, bounds, float("-inf")), axis=0), candidates_ptr, BLOCK)
        num_candidates = count
        size = count
    return row_ptr, candidates_ptr, num_candidates, size, temperature, peak
