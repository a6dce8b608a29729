"""Rotary position embedding: configurations, scalings and tables.

Sources: RoFormer (Su et al., 2021, section 3.4); position interpolation (Chen et al., 2023); YaRN (Peng et al., 2023,
sections 3.2 to 3.4); the Llama 3.1 frequency scaling as defined by the model's reference implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import ArgumentError

RopePairs = Literal["half", "interleaved"]


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: all frequencies divided by ``factor``."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies between ``beta_slow`` and ``beta_fast`` rotations over the original context are blended, and cos
    and sin are multiplied by ``attention_factor`` (None: 0.1 * ln(factor) + 1)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class RopeConfig:
    """Which dims rotate and how fast: the first ``rotary_dim`` of a head, in pairs (i, i + rotary_dim / 2) for "half" or
    (2 i, 2 i + 1) for "interleaved", pair i by the angle position * inv_freq[i]."""

    rotary_dim: int
    base: float = 10000.0
    pairs: RopePairs = "half"
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ArgumentError("rope.rotary_dim", "a positive even int", self.rotary_dim)
        if self.pairs not in ("half", "interleaved"):
            raise ArgumentError("rope.pairs", "'half' or 'interleaved'", self.pairs)
        if not self.base > 0:
            raise ArgumentError("rope.base", "a positive number", self.base)
        if self.scaling is not None and not self.scaling.factor >= 1:
            raise ArgumentError("rope.scaling.factor", "at least 1", self.scaling.factor)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by (YaRN; otherwise 1)."""
        if not isinstance(self.scaling, YarnScaling):
            return 1.0
        given = self.scaling.attention_factor
        return 0.1 * math.log(self.scaling.factor) + 1.0 if given is None else given

    def inv_freq(self) -> torch.Tensor:
        """Radians a position for each pair: float64 [rotary_dim / 2] on the CPU, scaling applied."""
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        plain = torch.pow(torch.tensor(self.base, dtype=torch.float64), -exponent)
        if isinstance(self.scaling, LinearScaling):
            return plain / self.scaling.factor
        if isinstance(self.scaling, Llama3Scaling):
            return _llama3(plain, self.scaling)
        if isinstance(self.scaling, YarnScaling):
            return _yarn(plain, self.scaling, self.base, self.rotary_dim)
        return plain


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    rotations = scaling.original_max_position * plain / (2 * math.pi)
    ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = ramp.clamp(0.0, 1.0)
    return plain * keep + plain / scaling.factor * (1.0 - keep)


def _yarn(plain: torch.Tensor, scaling: YarnScaling, base: float, rotary_dim: int) -> torch.Tensor:
    def pair_with(rotations: float) -> float:
        return rotary_dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), rotary_dim - 1)
    span = max(high - low, 0.001)
    interpolate = ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / span).clamp(0.0, 1.0)
    return plain * (1.0 - interpolate) + plain / scaling.factor * interpolate


@dataclass(frozen=True)
class RopeTable:
    """A configuration made ready on a device: ``inv_freq`` float32 [rotary_dim / 2], and optionally a table ``cos_sin``
    float32 [max_position, rotary_dim] holding cos then sin (attention factor included). With a table kernels read it
    (positions beyond it are an error in checked mode); without one they compute the angles."""

    config: RopeConfig
    inv_freq: torch.Tensor
    cos_sin: torch.Tensor | None = None

    @classmethod
    def make(cls, config: RopeConfig, device: torch.device | str, max_position: int | None = None) -> RopeTable:
        """Prepare ``config`` on ``device``; with ``max_position`` also tabulate positions 0 .. max_position - 1 (the
        angles are computed in float64)."""
        frequencies = config.inv_freq()
        table = None
        if max_position is not None:
            angles = torch.outer(torch.arange(max_position, dtype=torch.float64), frequencies)
            table = torch.cat([angles.cos(), angles.sin()], dim=1) * config.attention_factor
            table = table.to(device=device, dtype=torch.float32)
        return cls(config, frequencies.to(device=device, dtype=torch.float32), table)
