"""Records of the sampling operations; every per-row tensor lives on the device of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FilterOrder = Literal["sequential", "joint"]

FILTERS = ("top_k", "top_p", "min_p", "typical_p")
"""The filters, in the order "sequential" applies them."""

PENALTIES = ("allowed", "bias", "repetition", "frequency", "presence")
"""The parts of PenaltyParams, in the order in which they are applied."""


@dataclass(frozen=True)
class FilterParams:
    """Temperature and filters, one value a row; None means that no row uses it.

    ``temperature`` float32 [N] (0: greedy, the first index of the largest logit; None: 1). ``top_k`` int32 [N] (0 or
    >= V: off), ``top_p`` float32 [N] in (0, 1] (1: off), ``min_p`` float32 [N] in [0, 1] (0: off), ``typical_p`` float32
    [N] in (0, 1] (1: off). A row with a value out of its range (below 0 for temperature and top_k), or NaN, is unusable.
    ``order``: "sequential" applies each filter to what the previous ones left, renormalised, in the order of FILTERS;
    "joint" computes each on the whole distribution and intersects.
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
class TokenHistory:
    """What R requests have said, kept sparse: fixed capacities, and updates on the device (``fi_core.record_tokens``).

    ``seen`` int32 [R, ceil(V / 32)]: bit (i % 32) of word i // 32 set = token i is in the prompt or the output.
    ``entries`` int32 [R, C, 2]: (token, count) of each distinct output token, in any order, of which the first
    ``num_entries`` int32 [R] are in use; more than C says that they did not fit. ``num_output`` int32 [R]: tokens of
    output. ``entries`` is contiguous in its last two dims, 1 <= C.
    """

    seen: Tensor
    entries: Tensor
    num_entries: Tensor
    num_output: Tensor

    @classmethod
    def empty(cls, num_rows: int, vocab_size: int, capacity: int, device: torch.device | str = "cpu") -> TokenHistory:
        """Histories of requests that have said nothing, with room for ``capacity`` distinct output tokens each."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        words = (vocab_size + 31) // 32
        return cls(zeros(num_rows, words), zeros(num_rows, capacity, 2), zeros(num_rows), zeros(num_rows))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in order."""
        return self.seen, self.entries, self.num_entries, self.num_output


@dataclass(frozen=True)
class PenaltyParams:
    """Changes of logits that depend on a request, applied in this order; None means that no row uses it.

    ``allowed`` int32 [N, ceil(V / 32)]: bit (i % 32) of word i // 32 set = token i allowed (xgrammar's layout), others
    become -inf; ``step_allowed`` likewise, always a row for each output, however ``allowed`` is indexed (a grammar's mask
    of this step beside a request's own). ``bias_indptr`` int32 [N + 1], ``bias_tokens`` int32, ``bias_values`` float32:
    added to the named tokens (at most one entry a token and row); with ``bias_until`` int32, -inf instead while the
    request's ``history.num_output`` is below it (a stop token before min_tokens). ``repetition`` float32 [N] (> 0, 1:
    off): for tokens in the prompt or the output, positive logits are divided by it and others multiplied. ``frequency``
    float32 [N] times the token's count in the output, and ``presence`` float32 [N] where that is not 0, are subtracted.

    The tokens of prompt and output are either a ``history``, or dense counts ``prompt_counts`` and ``output_counts`` int32
    [R, V]; both are indexed by ``rows`` int32 [N] (None: as the other members).
    """

    allowed: Tensor | None = None
    step_allowed: Tensor | None = None
    bias_indptr: Tensor | None = None
    bias_tokens: Tensor | None = None
    bias_values: Tensor | None = None
    bias_until: Tensor | None = None
    repetition: Tensor | None = None
    frequency: Tensor | None = None
    presence: Tensor | None = None
    history: TokenHistory | None = None
    prompt_counts: Tensor | None = None
    output_counts: Tensor | None = None
    rows: Tensor | None = None

    @property
    def active(self) -> frozenset[str]:
        """Names of the parts that some row uses, of PENALTIES."""
        masked = self.allowed is not None or self.step_allowed is not None
        parts = {"allowed": masked or None, "bias": self.bias_indptr}
        parts |= {"repetition": self.repetition, "frequency": self.frequency, "presence": self.presence}
        return frozenset(name for name, value in parts.items() if value is not None)

    @property
    def counts(self) -> str:
        """Where the tokens of prompt and output are: "none", "dense" or "sparse"."""
        if self.history is not None:
            return "sparse"
        return "none" if self.prompt_counts is None and self.output_counts is None else "dense"


NO_PENALTIES = PenaltyParams()
