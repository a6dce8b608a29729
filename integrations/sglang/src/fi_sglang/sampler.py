"""SGLang's sampler on ``fi_core.sample``: temperature, filters and draw in one operation, from logits."""

from __future__ import annotations

from typing import Any

import fi_core as fi
import torch
from fi_adapters.draws import draw, fresh_keys, seeded_keys
from sglang.srt.layers.sampler import Sampler
from torch import Tensor


class FiSampler(Sampler):
    """Filters as SGLang's own torch backend defines them: top-k, top-p and min-p each on the whole distribution,
    intersected. Requests with a seed draw by (seed, position), the same in any batch; the tokens are not those that SGLang's
    own hash would draw.

    Greedy batches, on-policy training, and calls that return log-probabilities go through the base class, which computes
    those from the softmax; it draws through ``_sample_from_probs`` here too.
    """

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: Tensor,
    ) -> Tensor:
        """Tokens int32 [B]."""
        if sampling_info.is_all_greedy or return_logprob or self.rl_on_policy_target is not None:
            return super().forward(
                logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions
            )
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        filters = filters_of(sampling_info, sampling_info.temperatures.view(-1).to(torch.float32))
        tokens = draw(logits, filters, keys_of(sampling_info, positions, logits)).to(torch.int32)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> Tensor:
        logits = probs.log()
        return draw(logits, filters_of(sampling_info, None), keys_of(sampling_info, positions, logits)).to(torch.int32)


def filters_of(info: Any, temperature: Tensor | None) -> fi.FilterParams:
    """The filters that some request of the batch uses."""
    return fi.FilterParams(
        temperature=temperature,
        top_k=info.top_ks.to(torch.int32) if info.need_top_k_sampling else None,
        top_p=info.top_ps.to(torch.float32) if info.need_top_p_sampling else None,
        min_p=info.min_ps.to(torch.float32) if info.need_min_p_sampling else None,
        order="joint",
    )


def keys_of(info: Any, positions: Tensor, logits: Tensor) -> fi.DrawKeys:
    """Keys from the requests' seeds and the positions of the drawn tokens, or fresh ones."""
    if info.sampling_seed is None:
        return fresh_keys(logits.shape[0], logits.device)
    return seeded_keys(info.sampling_seed, positions)
