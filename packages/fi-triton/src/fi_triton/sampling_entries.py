"""What the sampling kernels serve; importing this imports no Triton."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fi_core.contract import Between, OneOf, Rule, SubsetOf
from fi_core.sampling import FILTERS, PENALTIES

from .entries import entries_of

_MAX_K = 2048  # found tokens are sorted in the registers of one program
_MAX_TREE = 4096  # the nodes of a tree are held in the registers of one program

_VOCAB: Mapping[str, Rule] = {"vocab_size": Between(1, 2**19)}
_LOGITS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16), **_VOCAB}
_FILTERED: Mapping[str, Rule] = {**_LOGITS, "filters": SubsetOf(*FILTERS), "order": OneOf("sequential", "joint")}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "sample": {**_FILTERED, "penalties": SubsetOf(), "slots": OneOf(False, True)},  # penalize_logits comes before
    "filter_logits": {**_FILTERED, "kind": OneOf("logits", "probs")},
    "top_k": {**_LOGITS, "k": Between(1, _MAX_K)},
    "logprobs": {**_LOGITS, "top_n": Between(0, _MAX_K)},
    "penalize_logits": {**_LOGITS, "parts": SubsetOf(*PENALTIES), "counts": OneOf("none", "dense", "sparse")},
    "record_tokens": {"capacity": Between(1)},
    "verify_chain": {**_VOCAB, "num_draft": Between(0), "has_draft_probs": OneOf(False, True)},
    "verify_tree": {**_VOCAB, "num_draft": Between(1, _MAX_TREE)},
}
_MODULES = {op: f"sampling.{'verify' if op.startswith('verify') else op}" for op in _RULES}

ENTRIES = entries_of(_RULES, _MODULES)
"""Kernels of this module's operations."""
