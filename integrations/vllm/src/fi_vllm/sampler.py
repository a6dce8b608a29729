"""vLLM's top-k and top-p sampler on ``fi_core.sample``, requests with seeds included."""

from __future__ import annotations

import fi_core as fi
import torch
import vllm.v1.sample.sampler as engine_sampler
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from .draws import draw, filters_of


class FiTopKTopPSampler(TopKTopPSampler):
    """Draws with fi. vLLM applies penalties, the grammar's mask, temperature and min-p before, and gathers log-probabilities
    itself; where it wants them after the filters (processed_*), the filtered logits are made once and drawn from."""

    def __init__(self, logprobs_mode: str = "raw_logprobs") -> None:
        torch.nn.Module.__init__(self)  # the base class picks among its own ways to draw, and may import FlashInfer for it
        self.logprobs_mode = logprobs_mode

    def forward(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens int64 [N], None or the filtered logits or log-probabilities float32 [N, V])."""
        if self.logprobs_mode not in ("processed_logits", "processed_logprobs"):
            return draw(logits, generators, k, p), None
        kept = fi.filter_logits(logits, filters_of(k, p), "logits")
        tokens = draw(kept, generators, None, None)
        return tokens, kept if self.logprobs_mode == "processed_logits" else kept.log_softmax(dim=-1)


def install() -> None:
    """Make ``FiTopKTopPSampler`` the class that vLLM's sampler uses. It looks the name up in its own module."""
    engine_sampler.TopKTopPSampler = FiTopKTopPSampler
