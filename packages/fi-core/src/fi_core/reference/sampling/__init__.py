"""References of the sampling operations, one function an operation, named like it."""

from .draw import filter_logits, sample
from .history import record_tokens
from .penalties import penalize_logits
from .ranking import logprobs, top_k
from .verify import verify_chain, verify_tree

__all__ = [
    "filter_logits",
    "logprobs",
    "penalize_logits",
    "record_tokens",
    "sample",
    "top_k",
    "verify_chain",
    "verify_tree",
]
