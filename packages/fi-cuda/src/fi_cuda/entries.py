"""What the CUDA kernels serve; importing this imports no kernel and touches no driver."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fi_core.contract import Anything, Between, KernelEntry, OneOf, Rule
from fi_core.records import KV_FORMATS

BACKEND = "cuda"
MIN_CAPABILITY = (8, 0)

_MAX_NORM_WIDTH = 16384  # a row stays in the registers of one block
_MAX_ROPE_DIM = 1024  # a head's units are threads of one block
_MAX_APPEND_DIM = 512  # likewise
_MAX_COPY_DIM = 1024  # blocks of a page are the rows of a grid, of which there are 65535
_MAX_WIDTH = 2**26

_FLOATS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16)}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "rmsnorm": {**_FLOATS, "hidden_size": Between(1, _MAX_NORM_WIDTH)},
    "add_rmsnorm": {**_FLOATS, "hidden_size": Between(1, _MAX_NORM_WIDTH)},
    "silu_mul": {**_FLOATS, "width": Between(1, _MAX_WIDTH)},
    "gelu_mul": {**_FLOATS, "width": Between(1, _MAX_WIDTH), "approximate": OneOf("none", "tanh")},
    "rope": {
        **_FLOATS,
        "head_dim": Between(2, _MAX_ROPE_DIM),
        "rotary_dim": Between(2, _MAX_ROPE_DIM, multiple_of=2),
        "pairs": OneOf("half", "interleaved"),
        "source": OneOf("table", "computed"),
    },
    "append_kv": {
        **_FLOATS,
        "kv_format": OneOf(*KV_FORMATS),
        "head_dim": Between(1, _MAX_APPEND_DIM),
        "head_dim_vo": Between(1, _MAX_APPEND_DIM),
        "page_size": Anything(),  # the contract's own limits: 1 to 256, or None with a ragged cache
        "kv_layout": OneOf("NHD", "HND"),
        "addressing": OneOf("dense", "indptr", "ragged", "slots"),
        "rope": OneOf("none", "half", "interleaved"),
        "rope_source": OneOf("none", "table", "computed"),
    },
    "copy_pages": {
        "kv_format": OneOf(*KV_FORMATS),
        "head_dim": Between(1, _MAX_COPY_DIM),
        "head_dim_vo": Between(1, _MAX_COPY_DIM),
        "page_size": Anything(),  # the contract's own limits
        "kv_layout": OneOf("NHD", "HND"),
        "placement": OneOf("device", "from_host", "to_host"),
    },
    "merge_states": {**_FLOATS, "head_dim": Between(1, _MAX_WIDTH)},
}

_STEMS = {"add_rmsnorm": "rmsnorm", "silu_mul": "gated_activation", "gelu_mul": "gated_activation"}


def _loader(op: str) -> Callable[[], Any]:
    def load() -> Any:
        return getattr(importlib.import_module(f"fi_cuda.kernels.{_STEMS.get(op, op)}"), op)

    return load


ENTRIES: list[KernelEntry] = [
    KernelEntry(op, op, BACKEND, rules, _loader(op), devices=("cuda",), min_capability=MIN_CAPABILITY)
    for op, rules in _RULES.items()
]
"""One kernel for each operation."""
