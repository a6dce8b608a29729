"""What the specs of both attention kernels take from a plan's spec and from a call, and the parameters that both have."""

from __future__ import annotations

from typing import Any, NamedTuple

from fi_core.records import AttentionSpec

TABLE_FORMS = {"ragged": 0, "dense": 1, "indptr": 2}
MASK_FORMS = {None: 0, "kv": 1, "new": 2}

TENSOR_PARAMS = (
    ("out", "output"),
    ("lse", "output"),
    ("table", "pointer"),
    ("table_row", "pointer"),
    ("kv_indptr", "pointer"),
    ("mask_bits", "pointer"),
    ("mask_indptr", "pointer"),
    ("sinks", "pointer"),
    ("slopes", "pointer"),
)
"""Outputs, and what says which keys a row sees and how: name and kind as in ParamsLayout."""

STRIDE_PARAMS = (
    ("k_stride_page", "int64"),
    ("k_stride_token", "int64"),
    ("k_stride_head", "int64"),
    ("v_stride_page", "int64"),
    ("v_stride_token", "int64"),
    ("v_stride_head", "int64"),
    ("out_stride_token", "int64"),
    ("out_stride_head", "int64"),
    ("lse_stride_token", "int64"),
    ("table_stride", "int64"),
)
"""In elements."""


class CallForm(NamedTuple):
    """What the kernel of a call depends on besides its plan: whether a window is set, the LSE is wanted, scales are in
    memory, the batch has ``table_row``; the columns of its mask; whether K and V have tensor maps. Also whether scales
    of FP8 queries are in memory. Of prefill alone: whether the softmax scale is not above 0."""

    windowed: bool = False
    lse: bool = False
    k_scales: bool = False
    v_scales: bool = False
    table_row: bool = False
    mask_columns: str | None = None
    boxes: bool = False
    q_scales: bool = False
    signed_scale: bool = False


def call_fields(spec: AttentionSpec, form: CallForm) -> dict[str, Any]:
    """Fields of both kernels' specs; soft cap, ALiBi and sinks are there exactly when ``spec`` has the feature."""
    return {
        "dtype": spec.dtype,
        "stored": spec.kv_dtype,
        "head_dim": spec.head_dim,
        "head_dim_vo": spec.head_dim_vo or 0,
        "group_size": spec.group_size,
        "page_size": spec.page_size or 0,
        "table": TABLE_FORMS[spec.table],
        "table_row": form.table_row,
        "causal": spec.causal,
        "windowed": form.windowed,
        "soft_cap": "soft_cap" in spec.features,
        "alibi": "alibi" in spec.features,
        "sinks": "sinks" in spec.features,
        "mask": MASK_FORMS[form.mask_columns],
        "k_scales": form.k_scales,
        "v_scales": form.v_scales,
        "lse": form.lse,
    }
