"""How far a drawn token is from what rounding of the exponential can explain.

The exponential is the only inexact step of ``fi_core.sample``. If a kernel's errs by a share e of the weight, the mass m of a
token is off by up to e m + 1. Running sums c and a target f * total then move against each other by up to (1 - f) times what
the masses up to the boundary may be off, and f times that of those behind it; where a filter's or a draw's target is farther from
a boundary, every such kernel decides alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...random import PURPOSE_DRAW, random_bits, scale_bits, scale_fraction
from ...sampling import DrawKeys, FilterParams
from .draw import Columns, map_columns, sample
from .masses import Weights

_LEAST_WEIGHT = 2.0**-33
"""No exponential that is nearly right gives mass to weights below it."""


def boundary_distance(tokens: Tensor, logits: Tensor, filters: FilterParams, keys: DrawKeys, error: float) -> Tensor:
    """float64 [N]: 0 where ``tokens`` int64 [N] are the reference's for ``logits`` [N, V]; elsewhere how far, in fixed-point
    mass, the random target is from the token drawn, as a multiple of what an exponential with a relative error of up to
    ``error`` can move it. Above 1 such a kernel cannot have drawn it; infinite where no such kernel keeps it.

    ``filters`` without typical_p, whose kept tokens are no prefix of the rank order.
    """
    assert filters.typical_p is None
    expected = torch.empty_like(tokens)
    sample(logits, filters, keys, None, expected)
    found = torch.zeros(tokens.shape, dtype=torch.float64)
    for row in (tokens != expected).nonzero().squeeze(1).tolist():
        filters_of_row, key = _row(filters, row), _row(keys, row)
        if int(expected[row]) < 0 or int(tokens[row]) < 0 or _is_greedy(filters_of_row):
            found[row] = torch.inf  # no exponential has a part in it
        else:
            found[row] = _distance_of_row(int(tokens[row]), logits[row : row + 1], filters_of_row, key, error)
    return found


def _row(record: Columns, row: int) -> Columns:
    return map_columns(record, lambda column: column[row : row + 1])


def _is_greedy(filters: FilterParams) -> bool:
    return filters.temperature is not None and float(filters.temperature) <= 0


def _distance_of_row(token: int, logits: Tensor, filters: FilterParams, key: DrawKeys, error: float) -> float:
    weights = Weights.of(logits, filters.temperature)
    mass, weight = weights.mass[0], weights.weight[0].to(torch.float64)
    doubt = torch.where(weight >= _LEAST_WEIGHT, weight * 2.0**32 * error + 1, 0.0)
    rank_order = weights.scaled[0].argsort(descending=True, stable=True)
    least, most = _kept_counts(mass[rank_order], weight[rank_order], doubt[rank_order], filters, error)
    bits = random_bits(key, PURPOSE_DRAW)
    share = float(bits[0]) / 2**31 + float(bits[1]) / 2**62
    nearest = float("inf")
    for count in range(least, most + 1):
        kept = torch.zeros_like(mass, dtype=torch.bool)
        kept[rank_order[:count]] = True
        if not kept[token]:
            continue
        kept_mass, kept_doubt = mass * kept, doubt * kept
        target = int(scale_bits(bits, kept_mass.sum()[None]))
        end = int(kept_mass[: token + 1].sum())
        begin = end - int(mass[token])
        # The near edge of the token: its own mass counts among those before the edge only if the target lies behind it.
        last = token if target >= end else token - 1
        distance = max(begin - target, target - end + 1, 0)
        before, total = float(kept_doubt[: last + 1].sum()), float(kept_doubt.sum())
        nearest = min(nearest, distance / ((1 - share) * before + share * (total - before) + 1))
    return nearest


def _kept_counts(mass: Tensor, weight: Tensor, doubt: Tensor, filters: FilterParams, error: float) -> tuple[int, int]:
    """The least and the largest number of tokens that the filters may keep; all arguments in rank order."""
    vocab_size = mass.shape[0]
    limit = 0 if filters.top_k is None else int(filters.top_k)
    first = limit if 0 < limit < vocab_size else vocab_size
    least = most = first
    if filters.top_p is not None and float(filters.top_p) < 1:
        considered = first if filters.order == "sequential" else vocab_size
        running, doubts = mass[:considered].cumsum(0), doubt[:considered].cumsum(0)
        fraction = min(round(float(filters.top_p) * 2**31), 2**31 - 1)
        target = int(scale_fraction(torch.tensor(fraction), running[-1].cpu()))
        share = fraction / 2**31
        moves = (1 - share) * doubts + share * (doubts[-1] - doubts) + 1
        # Tokens are kept up to the first running sum that reaches the target.
        surely = int(((target - running) > moves).sum()) + 1
        perhaps = int(((target - running) > -moves).sum()) + 1
        least, most = (min(count, number, considered) for count, number in ((least, surely), (most, perhaps)))
    if filters.min_p is not None:
        limit_of_weight = float(filters.min_p)
        least = min(least, max(1, int((weight * (1 - error) >= limit_of_weight).sum())))
        most = min(most, max(1, int((weight * (1 + error) >= limit_of_weight).sum())))
    return least, most
