"""What the kernels around the KV cache serve: attention, append_kv, copy_pages, find_shared_prefixes and merge_states."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from fi_core.contract import Anything, Between, Condition, KernelEntry, OneOf, Request, Rule, SubsetOf
from fi_core.records import ATTENTION_FEATURES, KV_FORMATS, format_of

from .entries import converts_fp8
from .interpreter import kernel_devices, prepare_interpreter
from .names import BACKEND, MIN_CAPABILITY

_FLOATS = OneOf(torch.float32, torch.float16, torch.bfloat16)
_HEAD_DIM = Between(1, 256)
_MAX_GROUP = 1024  # the scheduler's own limit


def _format_served(request: Request) -> bool:
    return not request["kv_format"].startswith("fp8") or converts_fp8(request)


def _same_or_fp8(request: Request) -> bool:
    kv_format: str = request["kv_format"]
    return kv_format.startswith("fp8") or kv_format == format_of(request["dtype"])


_KV: dict[str, Rule] = {
    "dtype": _FLOATS,
    "kv_format": OneOf(*KV_FORMATS),
    "head_dim": _HEAD_DIM,
    "head_dim_vo": _HEAD_DIM,
    "page_size": Anything(),  # the contract's own limits: 1 to 256, or None with ragged K and V
    "kv_layout": OneOf("NHD", "HND"),
}

_RULES: dict[str, dict[str, Rule]] = {
    "attention": {
        **_KV,
        "group_size": Between(1, _MAX_GROUP),
        "table": OneOf("dense", "indptr", "ragged"),
        "causal": OneOf(False, True),
        "windowed": OneOf(False, True),
        "features": SubsetOf(*sorted(ATTENTION_FEATURES)),
        "batch_invariant": OneOf(False, True),
        "max_q_len": Between(1),
        "levels": OneOf(False, True),
        "q_format": OneOf("same"),
        "rope": OneOf("none"),
        "rope_pairs": OneOf("none"),
        "rotary_dim": OneOf(0),
    },
    "append_kv": {
        **_KV,
        "addressing": OneOf("dense", "indptr", "ragged", "slots"),
        "rope": OneOf("none", "half", "interleaved"),
        "rope_source": OneOf("none", "table", "computed"),
    },
    "copy_pages": {
        **{name: rule for name, rule in _KV.items() if name != "dtype"},
        "placement": OneOf("device", "from_host", "to_host"),
    },
    "find_shared_prefixes": {"table": OneOf("dense", "indptr"), "max_depth": Between(1, 8)},
    "merge_states": {"dtype": _FLOATS, "head_dim": Between(1, 1024)},
}

_CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "attention": (
        Condition("compute capability 8.9 for FP8", _format_served),
        Condition("an FP8 kv_format or that of q's dtype", _same_or_fp8),
    ),
    "append_kv": (Condition("compute capability 8.9 for an FP8 kv_format (rounding in hardware)", _format_served),),
    "copy_pages": (),
    "find_shared_prefixes": (),
    "merge_states": (),
}

_MODULES = {
    "attention": ("fi_triton.attention.state", "load_kernel"),
    "append_kv": ("fi_triton.append_kv", "load_kernel"),
    "copy_pages": ("fi_triton.copy_pages", "load_kernel"),
    "find_shared_prefixes": ("fi_triton.find_shared_prefixes", "load_kernel"),
    "merge_states": ("fi_triton.merge_states", "load_kernel"),
}


def _loader(op: str) -> Callable[[], Any]:
    module, function = _MODULES[op]

    def load() -> Any:
        prepare_interpreter()
        return getattr(importlib.import_module(module), function)()

    return load


ENTRIES = tuple(
    KernelEntry(
        op=op,
        name=op,
        backend=BACKEND,
        rules=rules,
        load=_loader(op),
        devices=kernel_devices(),
        min_capability=MIN_CAPABILITY,
        conditions=_CONDITIONS[op],
    )
    for op, rules in _RULES.items()
)
