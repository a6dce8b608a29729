"""Which tokens the filters keep. Sets that are prefixes of the rank order need a sort of values, not of indices."""

from __future__ import annotations

import torch
from torch import Tensor

from ...random import scale_fraction
from ...sampling import FilterParams
from .masses import Weights


def keep_mask(weights: Weights, filters: FilterParams) -> Tensor | None:
    """bool [N, V], true where ``filters`` keep a token of a usable row; None when no filter is active."""
    mask = None
    if filters.top_k is not None or filters.top_p is not None:
        mask = first_in_rank(weights.scaled, _prefix_counts(weights, filters))
    if filters.min_p is not None:
        mask = _both(mask, weights.weight >= filters.min_p.unsqueeze(1))
    if filters.typical_p is not None:
        considered = mask if filters.order == "sequential" else None
        mask = _both(mask, _typical(weights, filters.typical_p, considered))
    if mask is None or (filters.min_p is None and filters.typical_p is None):
        return mask
    empty = ~(mask & (weights.mass > 0)).any(dim=1)
    if empty.any():
        mask[empty] = first_in_rank(weights.scaled[empty], torch.ones_like(empty[empty], dtype=torch.int64))
    return mask


def valid_filters(filters: FilterParams, num_rows: int, device: torch.device) -> Tensor:
    """bool [N]: whether every parameter of a row is in its range."""
    valid = torch.ones(num_rows, dtype=torch.bool, device=device)
    if filters.temperature is not None:
        valid &= filters.temperature >= 0
    if filters.top_k is not None:
        valid &= filters.top_k >= 0
    for fraction in (filters.top_p, filters.typical_p):
        if fraction is not None:
            valid &= (fraction > 0) & (fraction <= 1)
    if filters.min_p is not None:
        valid &= (filters.min_p >= 0) & (filters.min_p <= 1)
    return valid


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second


def sorted_descending(values: Tensor) -> Tensor:
    """Rows of ``values`` [N, V], each sorted descending."""
    if values.device.type != "cpu":
        return values.sort(dim=1, descending=True).values
    # On a CPU numpy's vectorised sort of values alone is more than ten times as fast as torch's sort with indices.
    ascending = values.numpy(force=True).copy()
    ascending.sort(axis=1)
    return torch.from_numpy(ascending).flip(1)


def first_in_rank(values: Tensor, counts: Tensor) -> Tensor:
    """bool [N, V]: the first ``counts`` int64 [N] (1 to V) of each row in rank order (descending, then by index)."""
    cutoff = sorted_descending(values).gather(1, counts.unsqueeze(1) - 1)
    above = values > cutoff
    tied = values == cutoff
    wanted = counts - above.sum(dim=1)
    return above | (tied & (tied.cumsum(dim=1) <= wanted.unsqueeze(1)))


def _prefix_counts(weights: Weights, filters: FilterParams) -> Tensor:
    """How many tokens top_k and top_p keep of each row, int64 [N]; both keep a prefix of the rank order."""
    num_rows, vocab_size = weights.mass.shape
    counts = torch.full((num_rows,), vocab_size, dtype=torch.int64, device=weights.mass.device)
    if filters.top_k is not None:
        limit = filters.top_k.to(torch.int64)
        counts = torch.where((limit > 0) & (limit < vocab_size), limit, counts)
    if filters.top_p is None:
        return counts
    # Mass never increases along the rank order, so the sorted masses are the masses in rank order.
    mass = sorted_descending(weights.mass)
    cumulative = mass.cumsum(dim=1)
    last = counts - 1 if filters.order == "sequential" else torch.full_like(counts, vocab_size - 1)
    total = cumulative.gather(1, last.unsqueeze(1)).squeeze(1)
    kept = torch.searchsorted(cumulative - mass, _threshold(filters.top_p, total).unsqueeze(1)).squeeze(1)
    kept = torch.where(filters.top_p < 1, kept.clamp(min=1), vocab_size)
    return torch.minimum(counts, kept)


def _threshold(fraction: Tensor, total: Tensor) -> Tensor:
    """floor(round(fraction * 2^31) * total / 2^31), for fractions clamped to [0, 1 - 2^-31]."""
    fixed = (fraction.to(torch.float64) * 2.0**31).round().to(torch.int64).clamp(0, 2**31 - 1)
    return scale_fraction(fixed, total)


def _typical(weights: Weights, typical_p: Tensor, considered: Tensor | None) -> Tensor:
    """Locally typical tokens (Meister et al., 2023) among ``considered`` (None: all), as ``fi_core.sample`` defines
    them."""
    mass = weights.mass if considered is None else weights.mass.masked_fill(~considered, 0)
    total = mass.sum(dim=1)
    # 0 * inf at excluded tokens is NaN, whose mass is 0 by definition.
    moment = torch.where(mass > 0, weights.weight * weights.shortfall * 2.0**32, 0.0).to(torch.int64).sum(dim=1)
    mean = (moment.to(torch.float64) / total.clamp(min=1).to(torch.float64)).to(torch.float32)
    deviation = (weights.shortfall - mean.unsqueeze(1)).abs()
    if considered is not None:
        deviation = deviation.masked_fill(~considered, torch.inf)
    order = deviation.sort(dim=1, stable=True).indices
    ordered = mass.gather(1, order)
    kept = ordered.cumsum(dim=1) - ordered < _threshold(typical_p, total).unsqueeze(1)
    kept[:, 0] = True
    mask = torch.zeros_like(kept).scatter_(1, order, kept)
    return mask | (typical_p >= 1).unsqueeze(1)
