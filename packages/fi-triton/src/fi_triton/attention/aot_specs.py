"""Specialisations of the attention, merge and planning kernels that are compiled ahead of time as a check.

Tile sizes, warps and stages come from the tuning table, so what is compiled is what a plan launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from fi_core.records import AttentionSpec, Capacity, KVFormat
from fi_scheduler.partition import PartitionParams

from ..aot import AotSpec
from .plan_kernel import plan_constants
from .tuning import Tuning, block_dim, built_in_tuning
from .workspace import CUT_COLUMNS, REQUEST_COLUMNS

_ELEMENT = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8_e4m3": "fp8e4nv", "fp8_e5m2": "fp8e5"}
_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_INTS = ("worker_indptr_ptr", "items_ptr", "q_indptr_ptr", "kv_lens_ptr", "table_ptr", "table_row_ptr", "kv_indptr_ptr")
_FLOATS = ("lse_ptr", "partial_ptr", "partial_lse_ptr", "sinks_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr")
_STATE = {"own_begin_ptr": "*i32", "state_ptr": "*fp32", "state_lse_ptr": "*fp32"}
_ALIGNED = (
    *(f"{name}_stride_{part}" for name in ("q", "out") for part in ("token", "head")),
    *(f"{name}_stride_{part}" for name in ("k", "v") for part in ("page", "token", "head")),
)
_PLAIN = ("window", "lse_stride_token", "table_stride", "k_scale_stride", "v_scale_stride")
_TABLES = {"ragged": 0, "dense": 1, "indptr": 2}
_WORKERS = 264

_STACK = 128
"""Bytes a thread: a tile of 64 rows takes all 255 registers and may spill a few that live across the loops."""
_MANY_FEATURES_STACK = 320


def _attention(
    name: str, spec: AttentionSpec, max_q_len: int, mask: int = 0, scales: bool = False, levels: bool = False
) -> AotSpec:
    """The specialisation that a plan of ``spec`` launches; every feature of the spec is in use."""
    tuning = _tuning(spec, max_q_len)
    q_type = _ELEMENT[next(kind for kind, dtype in _DTYPE.items() if dtype == spec.dtype)]
    kv_type = _ELEMENT[spec.kv_format or ""]
    arguments = {**dict.fromkeys(_INTS, "*i32"), **dict.fromkeys(_FLOATS, "*fp32")}
    arguments |= {"q_ptr": f"*{q_type}", "out_ptr": f"*{q_type}", "k_ptr": f"*{kv_type}", "v_ptr": f"*{kv_type}"}
    arguments |= {"bits_ptr": "*u8", "bits_indptr_ptr": "*i64", "scale": "fp32", "soft_cap": "fp32", "v_scale": "fp32"}
    arguments |= {**_STATE, **dict.fromkeys(_ALIGNED, "i32:16"), **dict.fromkeys(_PLAIN, "i32"), "state_begin": "i32"}
    dim_vo = spec.head_dim_vo or 0
    constants: dict[str, Any] = {
        "ROWS": tuning.rows,
        "STEP": tuning.step,
        "BIG_ROWS": tuning.big_rows,
        "BIG_STEP": tuning.big_step,
        "STAGES": tuning.num_stages,
        "GROUP": spec.group_size,
        "DIM": spec.head_dim,
        "BLOCK_D": block_dim(spec.head_dim),
        "DIM_VO": dim_vo,
        "BLOCK_DV": block_dim(dim_vo),
        "PAGE_SIZE": spec.page_size or 0,
        "TABLE": _TABLES[spec.table],
        "TABLE_ROW": False,
        "CAUSAL": spec.causal,
        "WINDOWED": spec.windows != (None,),
        "SOFT_CAP": "soft_cap" in spec.features,
        "ALIBI": "alibi" in spec.features,
        "SINKS": "sinks" in spec.features,
        "MASK": mask,
        "LSE": "lse" in spec.features,
        "K_SCALE": scales,
        "V_SCALE": scales,
        "LEVELS": levels,
        "HEADS": spec.num_qo_heads,
    }
    kernel = "fi_triton.attention.kernel:attention_kernel"
    return AotSpec(
        f"attention_{name}",
        kernel,
        arguments,
        constants,
        tuning.num_warps,
        tuning.num_stages,
        max_stack_bytes=_MANY_FEATURES_STACK if spec.features else _STACK,
        min_arch=89 if spec.kv_is_fp8 else 80,
    )


def _tuning(spec: AttentionSpec, max_q_len: int) -> Tuning:
    return built_in_tuning(spec, Capacity(256, 8192, max_q_len, 131072))


def _merge(dtype: str, dim: int, sinks: bool, levels: bool = False) -> AotSpec:
    arguments = {"merges_ptr": "*i32", "num_merges_ptr": "*i32", "q_indptr_ptr": "*i32", "out_ptr": f"*{dtype}"}
    arguments |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr", "sinks_ptr"), "*fp32")
    arguments |= {"out_stride_token": "i32:16", "out_stride_head": "i32:16", "lse_stride_token": "i32", **_STATE}
    arguments["state_begin"] = "i32"
    constants = {"ROWS": 16, "BIG_ROWS": 64, "BLOCK_ROWS": 4, "PIECES": 8, "GROUP": 4, "SINKS": sinks, "LSE": sinks}
    constants |= {"DIM_VO": dim, "BLOCK_DV": block_dim(dim), "LEVELS": levels, "HEADS": 32}
    kernel = "fi_triton.attention.merge:merge_kernel"
    name = f"attention_{'levels_' if levels else ''}merge_{dtype}_d{dim}"
    return AotSpec(name, kernel, arguments, constants, max_stack_bytes=16)


def _plan(max_splits: int, windowed: bool) -> Iterator[AotSpec]:
    spec = AttentionSpec(32, 8, 128)
    params = PartitionParams(
        num_workers=_WORKERS,
        num_kv_heads=spec.num_kv_heads,
        group_size=spec.group_size,
        kinds=_tuning(spec, 2048).kinds(),
        causal=True,
        window=4096 if windowed else None,
        max_splits=max_splits,
    )
    shared: dict[str, Any] = plan_constants(params)
    line = {"WORKERS": _WORKERS, "HEADS": params.num_kv_heads, **shared}
    lengths = {"q_indptr_ptr": "*i32", "kv_lens_ptr": "*i32", "window": "i32"}
    suffix = f"{'invariant' if max_splits else 'balanced'}{'_window' if windowed else ''}"
    module = "fi_triton.attention.plan_kernel"
    requests = {"requests_ptr": "*i64", **lengths}
    scan = {"COLUMNS": REQUEST_COLUMNS, "TILES": 128}
    yield AotSpec(f"plan_requests_{suffix}", f"{module}:request_kernel", requests, shared | scan, 1)
    cuts = {"cuts_ptr": "*i64", "num_requests": "i32", **requests}
    scan |= {"CUT_WIDTH": CUT_COLUMNS, "REQUESTS": 1024}
    yield AotSpec(f"plan_cuts_{suffix}", f"{module}:cut_kernel", cuts, line | scan, 4)
    lists = dict.fromkeys(("worker_indptr_ptr", "items_ptr", "merges_ptr", "num_merges_ptr"), "*i32")
    emit = {**lists, "cuts_ptr": "*i64", **dict.fromkeys(("max_items", "max_merges", "num_requests"), "i32"), **lengths}
    constants = line | {"CUT_WIDTH": CUT_COLUMNS, "CUTS": 512}
    yield AotSpec(f"plan_emit_{suffix}", f"{module}:emit_kernel", emit, constants, 4)


def _specs() -> Iterator[AotSpec]:
    every = frozenset({"soft_cap", "sinks", "alibi", "lse"})
    plain = AttentionSpec(32, 8, 128)
    for kind, dtype in _DTYPE.items():
        yield _attention(f"decode_{kind}_d128", replace(plain, dtype=dtype, kv_format=None), 1)
        yield _attention(f"mixed_{kind}_d128", replace(plain, dtype=dtype, kv_format=None), 2048)
    yield _attention("tree_bf16_d128", replace(plain, features=every | {"mask"}), 8, mask=2)
    features = replace(plain, windows=(4096,), features=every | {"mask"}, table="indptr")
    yield _attention("mixed_bf16_every_feature", features, 2048, mask=2)
    ragged = replace(plain, page_size=None, table="ragged", causal=False)
    yield _attention("prefill_bf16_ragged", ragged, 2048)
    for dim in (64, 80, 256):
        spec = AttentionSpec(32, 8, dim)
        yield _attention(f"decode_bf16_d{dim}", spec, 1)
        yield _attention(f"mixed_bf16_d{dim}", spec, 2048)
    yield _attention("mixed_bf16_d192_dv128", AttentionSpec(32, 32, 192, 128), 2048)
    formats: tuple[KVFormat, ...] = ("fp8_e4m3", "fp8_e5m2")
    for kv_format in formats:
        spec = replace(plain, kv_format=kv_format)
        yield _attention(f"decode_{kv_format}_d128", spec, 1, scales=True)
        yield _attention(f"mixed_{kv_format}_d128", spec, 2048, scales=True)
    for dtype_name, dim in (("bf16", 128), ("fp32", 256)):
        yield _merge(dtype_name, dim, sinks=dim == 128)
        yield _merge(dtype_name, dim, sinks=dim == 128, levels=True)
    for max_splits in (0, 8):
        yield from _plan(max_splits, windowed=max_splits == 0)
    for max_q_len in (1, 2048):
        yield _attention(f"levels_{'mixed' if max_q_len > 1 else 'decode'}_bf16_d128", plain, max_q_len, levels=True)


AOT_SPECS = list(_specs())
