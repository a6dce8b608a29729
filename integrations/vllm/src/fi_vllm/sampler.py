"""vLLM's top-k and top-p sampler on ``fi_core.sample``, requests with seeds included, and its penalties."""

from __future__ import annotations

import fi_core as fi
import torch
import vllm.v1.sample.ops.penalties as engine_penalties
import vllm.v1.sample.sampler as engine_sampler
from fi_adapters.draws import draw, fresh_keys
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler


def filters_of(top_k: Tensor | None, top_p: Tensor | None) -> fi.FilterParams:
    """top-k, then top-p on what is left, as vLLM applies them; k of the vocabulary's size and p of 1 switch a row's off."""
    return fi.FilterParams(
        top_k=None if top_k is None else top_k.to(torch.int32),
        top_p=None if top_p is None else top_p.to(torch.float32),
    )


class FiTopKTopPSampler(TopKTopPSampler):
    """Draws with fi. vLLM applies the grammar's mask, temperature and min-p before, and gathers log-probabilities itself;
    where it wants them after the filters (processed_*), the filtered logits are made once and drawn from."""

    def __init__(self, logprobs_mode: str = "raw_logprobs") -> None:
        torch.nn.Module.__init__(
            self
        )  # the base class picks among its own ways to draw, and may import FlashInfer for it
        self.logprobs_mode = logprobs_mode

    def forward(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens int64 [N], None or the filtered logits or log-probabilities float32 [N, V])."""
        keys = fresh_keys(logits.shape[0], logits.device, generators)
        if self.logprobs_mode not in ("processed_logits", "processed_logprobs"):
            return draw(logits, filters_of(k, p), keys), None
        kept = fi.filter_logits(logits, filters_of(k, p), "logits")
        tokens = draw(kept, fi.FilterParams(), keys)
        return tokens, kept if self.logprobs_mode == "processed_logits" else kept.log_softmax(dim=-1)


def penalize(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """Repetition, frequency and presence penalties (float32 [N] each) on float32 logits [N, V], in place and in one pass.

    ``prompt_tokens`` and ``output_tokens`` int64 [N, any], padded with V.
    """
    vocab_size = logits.shape[1]
    penalties = fi.PenaltyParams(
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        prompt_counts=_counts(prompt_tokens, vocab_size),
        output_counts=_counts(output_tokens, vocab_size),
    )
    return fi.penalize_logits(logits, penalties, out=logits)


def _counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """int32 [N, V]: how often each token occurs in its row; the padding is counted beside it."""
    counts = torch.zeros((tokens.shape[0], vocab_size + 1), dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))[:, :vocab_size]


def install() -> None:
    """Make vLLM's sampler use these: ``FiTopKTopPSampler``, which it looks up in its own module, and ``penalize``, which its
    function for all penalties looks up in that of its penalties (speculation's sampler calls it too)."""
    engine_sampler.TopKTopPSampler = FiTopKTopPSampler
    engine_penalties.apply_penalties = penalize
