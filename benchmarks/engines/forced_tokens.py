"""A logits processor of vLLM that makes a request emit given tokens, whatever their probability (teacher forcing)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedTokens(AdapterLogitsProcessor):
    """Of requests whose ``extra_args`` hold "forced_tokens". Log-probabilities are those from before (raw_logprobs)."""

    def is_argmax_invariant(self) -> bool:
        return False

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """Every list of tokens is fine."""

    def new_req_logits_processor(self, params: Any) -> Any:
        tokens = (params.extra_args or {}).get("forced_tokens")
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            wanted = tokens[min(len(output_ids), len(tokens) - 1)]
            value = logits[wanted].clone()
            logits.fill_(float("-inf"))
            logits[wanted] = value
            return logits

        return force
