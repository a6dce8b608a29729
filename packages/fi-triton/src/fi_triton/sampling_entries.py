"""What the sampling kernels serve; importing this imports no Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fi_core.contract import Between, KernelEntry, OneOf, Rule, SubsetOf
from fi_core.sampling import FILTERS

from .interpreter import kernel_devices, prepare_interpreter
from .names import BACKEND, MIN_CAPABILITY

_MAX_K = 2048  # found tokens are sorted in the registers of one program
_MAX_TREE = 4096  # the nodes of a tree are held in the registers of one program

_VOCAB: Mapping[str, Rule] = {"vocab_size": Between(1, 2**19)}
_LOGITS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16), **_VOCAB}
_FILTERED: Mapping[str, Rule] = {**_LOGITS, "filters": SubsetOf(*FILTERS), "order": OneOf("sequential", "joint")}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "sample": _FILTERED,
    "filter_logits": {**_FILTERED, "kind": OneOf("logits", "probs")},
    "top_k": {**_LOGITS, "k": Between(1, _MAX_K)},
    "logprobs": {**_LOGITS, "top_n": Between(0, _MAX_K)},
    "penalize_logits": {**_LOGITS, "parts": SubsetOf("allowed", "bias", "repetition", "frequency", "presence")},
    "verify_chain": {**_VOCAB, "num_draft": Between(0), "has_draft_probs": OneOf(False, True)},
    "verify_tree": {**_VOCAB, "num_draft": Between(1, _MAX_TREE)},
}
_MODULES = {"verify_chain": "verify", "verify_tree": "verify"}


def _loader(op: str) -> Callable[[], Any]:
    def load() -> Any:
        prepare_interpreter()
        return getattr(importlib.import_module(f"fi_triton.sampling.{_MODULES.get(op, op)}"), op)

    return load


ENTRIES: list[KernelEntry] = [
    KernelEntry(op, op, BACKEND, rules, _loader(op), kernel_devices(), MIN_CAPABILITY) for op, rules in _RULES.items()
]
"""Kernels of this module's operations."""
