"""What the rope, norm and activation kernels serve; importing this imports no Triton."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fi_core.contract import Between, Condition, OneOf, Request, Rule

from .entries import converts_fp8, entries_of

_MAX_NORM_WIDTH = 16384  # a row stays in the registers of one program

_FLOATS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16)}
_NORM: Mapping[str, Rule] = {
    **_FLOATS,
    "hidden_size": Between(1, _MAX_NORM_WIDTH),
    "out_format": OneOf("same", "fp8_e4m3", "fp8_e5m2"),
}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "rope": {
        **_FLOATS,
        "head_dim": Between(2, 4096),
        "rotary_dim": Between(2, 4096, multiple_of=2),
        "pairs": OneOf("half", "interleaved"),
        "source": OneOf("table", "computed"),
    },
    "rmsnorm": _NORM,
    "add_rmsnorm": _NORM,
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


def _output_served(request: Request) -> bool:
    return request["out_format"] == "same" or converts_fp8(request)


_CONDITIONS = dict.fromkeys(
    ("rmsnorm", "add_rmsnorm"),
    (Condition("compute capability 8.9 for an FP8 output (rounding in hardware)", _output_served),),
)

ENTRIES = entries_of(_RULES, _MODULES, _CONDITIONS)
"""Kernels of this module's operations."""
