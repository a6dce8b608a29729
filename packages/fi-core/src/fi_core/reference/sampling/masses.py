"""From logits to fixed-point masses, and from masses to a token: the two ends of a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...random import scale_bits

MASS_ONE = float(2**32)
"""Mass of weight 1."""


@dataclass(frozen=True)
class Weights:
    """Rows on their way to a draw, [N, V] unless said otherwise.

    ``scaled`` float32 logits over temperature; ``shortfall`` float32, the row's largest minus it; ``weight`` float32
    exp(-shortfall); ``mass`` int64; ``usable`` bool [N]. What an unusable row holds has no meaning.
    """

    scaled: Tensor
    shortfall: Tensor
    weight: Tensor
    mass: Tensor
    usable: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: Tensor | None) -> Weights:
        """Weights of logits [N, V] at ``temperature`` float32 [N], all above 0 (None: 1)."""
        scaled = logits.to(torch.float32)
        if temperature is not None:
            scaled = scaled / temperature.unsqueeze(1)
        largest = scaled.amax(dim=1, keepdim=True)  # NaN if any is, +inf if any is, -inf if none is finite
        shortfall = largest - scaled
        weight = exponential(shortfall)
        return cls(scaled, shortfall, weight, to_mass(weight), largest.squeeze(1).isfinite())


def exponential(shortfall: Tensor) -> Tensor:
    """exp(-shortfall) in float32, taken in float64 and rounded: the correctly rounded value (up to a double rounding, one
    time in 2^29), the same for every position in a vector register, library and device."""
    return shortfall.to(torch.float64).neg_().exp_().to(torch.float32)


def to_mass(weight: Tensor) -> Tensor:
    """int64(weight * 2^32), truncated; the product is exact in float32."""
    return (weight * MASS_ONE).to(torch.int64)


def draw(mass: Tensor, bits: tuple[Tensor, Tensor]) -> Tensor:
    """The token of each row of ``mass`` int64 [N, V] for random numbers ``bits`` (hi, lo) int64 [N]: the first index
    whose inclusive cumulative mass exceeds floor(R * total / 2^62); -1 where the total is 0."""
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1]
    token = torch.searchsorted(cumulative, scale_bits(bits, total).unsqueeze(1), right=True).squeeze(1)
    return torch.where(total > 0, token, -1)


def first_of_largest(values: Tensor) -> Tensor:
    """The first index of the largest value of each row of float32 [N, V], or -1 where the largest is not finite."""
    index = values.argmax(dim=1)
    return torch.where(values.gather(1, index.unsqueeze(1)).squeeze(1).isfinite(), index, -1)
