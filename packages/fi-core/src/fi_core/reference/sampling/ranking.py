"""References of ``top_k`` and ``logprobs``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sampling import LogprobsOut
from .. import serving_dtype


def top_k(logits: Tensor, values: Tensor, indices: Tensor) -> None:
    """The ``TopK`` protocol."""
    _top_k(logits.to(torch.float32), values, indices)


def _top_k(numbers: Tensor, values: Tensor, indices: Tensor) -> None:
    """``torch.topk`` leaves open which of equal values it takes: take its last value as the cutoff and choose by
    index."""
    k = values.shape[1]
    numbers = torch.where(numbers.isnan(), -torch.inf, numbers)
    cutoff = numbers.topk(k, dim=1).values[:, -1:]
    above, tied = numbers > cutoff, numbers == cutoff
    wanted = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= wanted))
    by_index = chosen.nonzero()[:, 1].view(-1, k)
    ordered, place = numbers.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    values.copy_(ordered)
    indices.copy_(by_index.gather(1, place))


def logprobs(logits: Tensor, tokens: Tensor, out: LogprobsOut, compute_dtype: torch.dtype | None = None) -> None:
    """The ``Logprobs`` protocol; the oracle passes ``compute_dtype`` float64 and float64 outputs."""
    wide = logits.to(compute_dtype or serving_dtype(logits.dtype))
    logs = torch.log_softmax(wide, dim=1)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    chosen = logs.gather(1, torch.where(inside, tokens, 0).unsqueeze(1)).squeeze(1)
    out.chosen.copy_(torch.where(inside, chosen, -torch.inf))
    if out.indices.shape[1]:
        _top_k(logits.to(torch.float32), torch.empty_like(out.values, dtype=torch.float32), out.indices)
        out.values.copy_(logs.gather(1, out.indices))
