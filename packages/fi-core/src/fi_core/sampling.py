"""Records of the sampling operations; every per-row tensor lives on the device of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FilterOrder = Literal["sequential", "joint"]

FILTERS = ("top_k", "top_p", "min_p", "typical_p")
"""The filters, in the order "sequential" applies them."""


@dataclass(frozen=True)
class FilterParams:
    """Temperature and filters, one value a row; None means that no row uses it.

    ``temperature`` float32 [N] (0: greedy, the first index of the largest logit; None: 1). ``top_k`` int32 [N] (0 or
    below, or >= V: off), ``top_p`` float32 [N] (>= 1: off), ``min_p`` float32 [N] (<= 0: off), ``typical_p`` float32 [N]
    (>= 1: off). ``order``: "sequential" applies each filter to what the previous ones left, renormalised, in the order of
    FILTERS; "joint" computes each on the whole distribution and intersects. What NaN in a filter's tensor keeps is not
    defined; a row whose temperature is NaN is unusable.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None
    order: FilterOrder = "sequential"

    @property
    def active(self) -> frozenset[str]:
        """Names of the filters that some row uses."""
        return frozenset(name for name in FILTERS if getattr(self, name) is not None)


@dataclass(frozen=True)
class DrawKeys:
    """What a random number is keyed by: ``seed`` int64 [N], ``sample`` int32 [N] (which of a prompt's samples) and
    ``position`` int64 [N] (position of the drawn token in its sequence)."""

    seed: Tensor
    sample: Tensor
    position: Tensor


@dataclass(frozen=True)
class LogprobsOut:
    """Outputs of ``logprobs``: ``chosen`` float32 [N]; ``values`` float32 [N, n] and ``indices`` int64 [N, n] of the n
    most likely tokens, descending, ties by lowest index (n may be 0)."""

    chosen: Tensor
    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class PenaltyParams:
    """Logit changes that depend on a request's history, applied in this order; None means that no row uses it.

    ``allowed`` int32 [N, ceil(V / 32)]: bit (i % 32) of word i // 32 set = token i allowed (xgrammar's layout), others
    become -inf. ``bias_indptr`` int32 [N + 1], ``bias_tokens`` int32, ``bias_values`` float32: added to the named tokens
    (at most one entry a token and row). ``repetition`` float32 [N] (> 0, 1: off): for tokens with a nonzero
    ``prompt_counts`` or ``output_counts``, positive logits are divided by it and others multiplied. ``frequency`` float32
    [N] times output_counts and ``presence`` float32 [N] times (output_counts > 0) are subtracted. ``prompt_counts`` and
    ``output_counts`` int32 [R, V] are indexed by ``rows`` int32 [N] (None: row n).
    """

    allowed: Tensor | None = None
    bias_indptr: Tensor | None = None
    bias_tokens: Tensor | None = None
    bias_values: Tensor | None = None
    repetition: Tensor | None = None
    frequency: Tensor | None = None
    presence: Tensor | None = None
    prompt_counts: Tensor | None = None
    output_counts: Tensor | None = None
    rows: Tensor | None = None

    @property
    def active(self) -> frozenset[str]:
        """Names of the parts that some row uses: "allowed", "bias", "repetition", "frequency", "presence"."""
        parts = {"allowed": self.allowed, "bias": self.bias_indptr, "repetition": self.repetition}
        parts |= {"frequency": self.frequency, "presence": self.presence}
        return frozenset(name for name, value in parts.items() if value is not None)
