"""What the rope, norm and activation kernels serve; importing this imports no Triton."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fi_core.contract import Between, OneOf, Rule

from .entries import entries_of

_MAX_NORM_WIDTH = 16384  # a row stays in the registers of one program

_FLOATS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16)}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "rope": {
        **_FLOATS,
        "head_dim": Between(2, 4096),
        "rotary_dim": Between(2, 4096, multiple_of=2),
        "pairs": OneOf("half", "interleaved"),
        "source": OneOf("table", "computed"),
    },
    "rmsnorm": {**_FLOATS, "hidden_size": Between(1, _MAX_NORM_WIDTH)},
    "add_rmsnorm": {**_FLOATS, "hidden_size": Between(1, _MAX_NORM_WIDTH)},
    "silu_mul": {**_FLOATS, "width": Between(1, 2**25)},
    "gelu_mul": {**_FLOATS, "width": Between(1, 2**25), "approximate": OneOf("none", "tanh")},
}
_MODULES = {
    "rope": "rope",
    "rmsnorm": "norms",
    "add_rmsnorm": "norms",
    "silu_mul": "activations",
    "gelu_mul": "activations",
}

ENTRIES = entries_of(_RULES, _MODULES)
"""Kernels of this module's operations."""
