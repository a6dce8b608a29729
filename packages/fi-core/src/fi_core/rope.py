"""Rotary position embedding: configurations, scalings and tables.

Sources: RoFormer (Su et al., 2021, section 3.4); position interpolation (Chen et al., 2023); YaRN (Peng et al., 2023,
sections 3.2 to 3.4); the Llama 3.1 frequency scaling as defined by the model's reference implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType
from typing import Literal

import torch

from .errors import ArgumentError
from .remembered import Remembered

RopePairs = Literal["half", "interleaved"]


def _require_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ArgumentError("rope.scaling.factor", "at least 1 and finite", factor)


def _require_position(original_max_position: int) -> None:
    if original_max_position < 1:
        raise ArgumentError("rope.scaling.original_max_position", "a positive int", original_max_position)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: all frequencies divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        _require_factor(self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        _require_position(self.original_max_position)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            factors = f"{self.low_freq_factor}, {self.high_freq_factor}"
            raise ArgumentError("rope.scaling.low_freq_factor, high_freq_factor", "0 < low < high, finite", factors)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies between ``beta_slow`` and ``beta_fast`` rotations over the original context are blended, and cos
    and sin are multiplied by ``attention_factor`` (None: 0.1 * ln(factor) + 1)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        _require_position(self.original_max_position)
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            betas = f"{self.beta_slow}, {self.beta_fast}"
            raise ArgumentError("rope.scaling.beta_slow, beta_fast", "0 < slow <= fast, finite", betas)
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ArgumentError("rope.scaling.attention_factor", "positive and finite", self.attention_factor)


@dataclass(frozen=True)
class RopeConfig:
    """Which dims rotate and how fast: the first ``rotary_dim`` of a head, in pairs (i, i + rotary_dim / 2) for "half" or
    (2 i, 2 i + 1) for "interleaved", pair i by the angle position * inv_freq[i]."""

    rotary_dim: int
    base: float = 10000.0
    pairs: RopePairs = "half"
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rotary_dim, int) or self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ArgumentError("rope.rotary_dim", "a positive even int", self.rotary_dim)
        if self.pairs not in ("half", "interleaved"):
            raise ArgumentError("rope.pairs", "'half' or 'interleaved'", self.pairs)
        if not 1 < self.base < math.inf:
            raise ArgumentError("rope.base", "a finite number above 1", self.base)
        if not isinstance(self.scaling, (LinearScaling, Llama3Scaling, YarnScaling, NoneType)):
            expected = "LinearScaling, Llama3Scaling, YarnScaling or None"
            raise ArgumentError("rope.scaling", expected, type(self.scaling).__name__)

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
class FusedRope:
    """RoPE that attention itself applies, by the frequencies that each call brings (LayerArgs.rope): to the query at its
    position kv_len - q_len + i, and with ``keys`` to each key at its position in the cache, which holds keys unrotated
    (positions in the cache rather than in the text: Xiao et al., "Efficient streaming language models with attention
    sinks", 2024, section 3.2). That holds of a packed mask's queries too: the nodes of a tree stand at their index, not at
    their depth. ``rotary_dim`` and ``pairs`` as in RopeConfig."""

    rotary_dim: int
    pairs: RopePairs = "half"
    keys: bool = False

    def __post_init__(self) -> None:
        RopeConfig(self.rotary_dim, pairs=self.pairs)  # the same limits
        if not isinstance(self.keys, bool):
            raise ArgumentError("rope.keys", "a bool", repr(self.keys))

    def check_table(self, argument: str, table: RopeTable) -> None:
        """Raise ArgumentError, naming the field of ``argument``, unless ``table`` rotates these dims by computed angles."""
        for name in ("rotary_dim", "pairs"):
            wanted, actual = getattr(self, name), getattr(table.config, name)
            if actual != wanted:
                raise ArgumentError(f"{argument}.config.{name}", f"{wanted!r} (the spec's)", repr(actual))
        if table.cos_sin is not None:
            raise ArgumentError(f"{argument}.cos_sin", "None (attention computes the angles)", "a tensor")


@dataclass(frozen=True)
class RopeTable:
    """A configuration made ready on a device: ``inv_freq`` float32 [rotary_dim / 2], and optionally a table ``cos_sin``
    float32 [max_position, rotary_dim] holding cos then sin (attention factor included). With a table kernels read it
    (positions beyond it are an error in checked mode); without one they compute the angles. Both are contiguous."""

    config: RopeConfig
    inv_freq: torch.Tensor
    cos_sin: torch.Tensor | None = None

    def check(self, argument: str, device: torch.device) -> None:
        """Raise ArgumentError, naming the field of ``argument``, unless both tensors are as documented, on ``device``."""
        remembering = not torch.compiler.is_compiling()
        if remembering and _checked.get(self) == device:
            return
        rotary_dim = self.config.rotary_dim
        for name, tensor, num_dims, width in (
            ("inv_freq", self.inv_freq, 1, rotary_dim // 2),
            ("cos_sin", self.cos_sin, 2, rotary_dim),
        ):
            if tensor is None:
                continue
            if tensor.device != device:
                raise ArgumentError(f"{argument}.{name}", f"a tensor on {device}", tensor.device)
            fits = tensor.dtype == torch.float32 and tensor.dim() == num_dims and tensor.shape[-1] == width
            if not (fits and tensor.is_contiguous()):
                shape = f"[{width}]" if num_dims == 1 else f"[max_position, {width}]"
                actual = f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}"
                raise ArgumentError(f"{argument}.{name}", f"contiguous float32 {shape}", actual)
        if remembering:
            _checked.put(self, device)

    @classmethod
    def make(cls, config: RopeConfig, device: torch.device | str, max_position: int | None = None) -> RopeTable:
        """Prepare ``config`` on ``device``; with ``max_position`` also tabulate positions 0 .. max_position - 1 (the
        angles are computed in float64)."""
        if max_position is not None and (not isinstance(max_position, int) or max_position < 1):
            raise ArgumentError("max_position", "a positive int or None", max_position)
        frequencies = config.inv_freq()
        table = None
        if max_position is not None:
            angles = torch.outer(torch.arange(max_position, dtype=torch.float64), frequencies)
            table = torch.cat([angles.cos(), angles.sin()], dim=1) * config.attention_factor
            table = table.to(device=device, dtype=torch.float32)
        return cls(config, frequencies.to(device=device, dtype=torch.float32), table)


_checked: Remembered[torch.device] = Remembered()
