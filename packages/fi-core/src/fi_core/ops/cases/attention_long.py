"""Cases of what attention kernels for many new tokens do by themselves: features, FP8 and RoPE over several steps of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...contract import Case
from ...records import ATTENTION_FEATURES
from ...rope import FusedRope, Llama3Scaling

_LENS = (40, 1, 18), (290, 150, 18)
_BF16, _FP16 = torch.bfloat16, torch.float16
_EVERY = set(ATTENTION_FEATURES)

_FEATURES: Mapping[str, Mapping[str, Any]] = {
    "window": {"windows": (50,), "features": {"lse"}},
    "window_wide": {"windows": (200,), "page_size": 64},
    "window_not_causal": {"windows": (30,), "causal": False, "table": "ragged"},
    "soft_cap": {"features": {"soft_cap", "lse"}, "head_dim": 128},
    "alibi_sinks": {"features": {"alibi", "sinks"}, "heads": (7, 1)},
    "every_feature": {"features": _EVERY, "mask": "kv", "windows": (None, 60), "window": 60},
}
_FP8_CACHES: Mapping[str, Mapping[str, Any]] = {
    "e4m3_d128": {"head_dim": 128, "scale": "heads", "features": {"lse"}},
    "e4m3_d64": {"page_size": 64, "kv_layout": "HND", "storage": "interleaved", "windows": (50,)},
    "e4m3_d256_ragged": {"head_dim": 256, "table": "ragged", "scale": "tensor", "heads": (2, 1)},
    "e4m3_page1": {"page_size": 1, "scale": "float", "head_dim": 96},
    "e5m2_fp16": {"dtype": _FP16, "kv_format": "fp8_e5m2", "scale": "heads", "head_dim": 96},
}
_FP8_PRODUCTS: Mapping[str, Mapping[str, Any]] = {
    "d64": {"features": {"lse"}},
    "d128": {"head_dim": 128, "features": {"lse"}, "scale": "heads", "q_scale": "heads", "heads": (8, 2)},
    "d128_ragged": {"head_dim": 128, "table": "ragged", "causal": False, "strided": True, "q_scale": "float"},
    "d256": {"head_dim": 256, "page_size": 8, "scale": "tensor", "q_scale": "tensor", "heads": (2, 1)},
    "d96_fp16": {"head_dim": 96, "dtype": _FP16, "heads": (7, 1), "page_size": 64, "kv_layout": "HND"},
    "d192_128": {"head_dim": 192, "head_dim_vo": 128, "storage": "interleaved", "before": True},
    "page1": {"page_size": 1, "head_dim": 128, "q_scale": "tensor", "windows": (100,)},
    "invariant": {"batch_invariant": True, "page_size": 32},
    "every_feature": {
        "features": _EVERY,
        "mask": "new",
        "windows": (60,),
        "heads": (6, 2),
        "q_scale": "heads",
        "scale": "heads",
    },
}
_ROTATIONS: Mapping[str, Mapping[str, Any]] = {
    "d64": {"rope": FusedRope(64), "features": {"lse"}},
    "d128": {"head_dim": 128, "rope": FusedRope(128), "heads": (8, 2), "scaling": Llama3Scaling()},
    "interleaved": {"head_dim": 128, "rope": FusedRope(128, "interleaved"), "heads": (7, 1), "strided": True},
    "partial": {"head_dim": 192, "head_dim_vo": 128, "rope": FusedRope(64), "table": "ragged"},
    "d256": {"head_dim": 256, "rope": FusedRope(128), "windows": (70,), "dtype": _FP16, "heads": (2, 1)},
    "fp8_kv": {"head_dim": 128, "rope": FusedRope(128), "kv_format": "fp8_e4m3", "scale": "heads"},
}
_FORMS: tuple[tuple[str, Mapping[str, Mapping[str, Any]], Mapping[str, Any]], ...] = (
    ("prefill", _FEATURES, {}),
    ("prefill_kv", _FP8_CACHES, {"kv_format": "fp8_e4m3"}),
    ("prefill_fp8", _FP8_PRODUCTS, {"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "fp8_weights": True}),
    ("prefill_rope_q", _ROTATIONS, {}),
)


def long_query_cases(case: Callable[..., Case]) -> Iterator[Case]:
    """``case`` makes one of its name, q_lens, kv_lens and options."""
    for prefix, named, form in _FORMS:
        for name, options in named.items():
            yield case(f"{prefix}_{name}", *_LENS, **{"dtype": _BF16, **form, **options})
