"""Specialisations of the kernels for shared prefixes that are compiled ahead of time as a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fi_core.records import AttentionSpec, Capacity

from ..aot import AotSpec
from .tuning import block_dim, built_in_tuning

_MODULE = "fi_triton.attention.level_kernel"
_DEPTH = 4


def _node(spec: AttentionSpec, element: str, stored: str) -> AotSpec:
    tuning = built_in_tuning(spec, Capacity(64, 256, 256, 131072))
    every = spec.features != frozenset()
    pointers = dict.fromkeys(("worker_indptr_ptr", "items_ptr", "nodes_ptr", "node_rows_ptr", "rows_ptr"), "*i32")
    pointers |= {"q_ptr": f"*{element}", "k_ptr": f"*{stored}", "v_ptr": f"*{stored}"}
    floats = (
        "state_ptr",
        "state_lse_ptr",
        "partial_ptr",
        "partial_lse_ptr",
        "slopes_ptr",
        "k_scale_ptr",
        "v_scale_ptr",
    )
    pointers |= dict.fromkeys(floats, "*fp32")
    pointers |= dict.fromkeys(("kv_lens_ptr", "table_ptr", "table_row_ptr", "table_indptr_ptr"), "*i32")
    pointers |= {"bits_ptr": "*u8", "bits_indptr_ptr": "*i64", "scale": "fp32", "soft_cap": "fp32", "v_scale": "fp32"}
    aligned = [f"q_stride_{part}" for part in ("token", "head")]
    aligned += [f"{name}_stride_{part}" for name in ("k", "v") for part in ("page", "token", "head")]
    plain = ("window", "max_tokens", "table_stride", "k_scale_stride", "v_scale_stride")
    constants: dict[str, Any] = {
        "ROWS": tuning.rows,
        "STEP": tuning.step,
        "BIG_ROWS": tuning.big_rows,
        "BIG_STEP": tuning.big_step,
        "STAGES": tuning.num_stages,
        "GROUP": spec.group_size,
        "DIM": spec.head_dim,
        "BLOCK_D": block_dim(spec.head_dim),
        "DIM_VO": spec.head_dim_vo,
        "BLOCK_DV": block_dim(spec.head_dim_vo or 0),
        "PAGE_SIZE": spec.page_size,
        "TABLE": 2 if every else 1,
        "TABLE_ROW": False,
        "WINDOWED": every,
        "SOFT_CAP": every,
        "ALIBI": every,
        "MASK": int(every),
        "K_SCALE": spec.kv_is_fp8,
        "V_SCALE": spec.kv_is_fp8,
        "HEADS": spec.num_qo_heads,
        "DEPTH": _DEPTH,
    }
    return AotSpec(
        f"level_nodes_{spec.kv_format}_{spec.head_dim}{'_every_feature' if every else ''}",
        f"{_MODULE}:node_kernel",
        {**pointers, **dict.fromkeys(aligned, "i32:16"), **dict.fromkeys(plain, "i32")},
        constants,
        tuning.num_warps,
        tuning.num_stages,
        max_stack_bytes=320 if every else 128,
        min_arch=89 if spec.kv_is_fp8 else 80,
    )


def _merges() -> Iterator[AotSpec]:
    shared = {"DIM_VO": 128, "BLOCK_DV": 128, "HEADS": 32, "DEPTH": _DEPTH}
    states = dict.fromkeys(("state_ptr", "state_lse_ptr"), "*fp32") | {"max_tokens": "i32"}
    arguments = dict.fromkeys(("merges_ptr", "num_merges_ptr", "node_rows_ptr", "rows_ptr"), "*i32") | states
    arguments |= dict.fromkeys(("partial_ptr", "partial_lse_ptr"), "*fp32")
    constants: dict[str, Any] = {"ROWS": 16, "BIG_ROWS": 128, "BLOCK_ROWS": 4, "PIECES": 8, "GROUP": 4, **shared}
    yield AotSpec("level_node_merge", f"{_MODULE}:node_merge_kernel", arguments, constants, max_stack_bytes=16)
    arguments = dict.fromkeys(("q_indptr_ptr", "own_begin_ptr", "depths_ptr"), "*i32") | states
    arguments |= {"sinks_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "lse_stride_token": "i32"}
    arguments |= dict.fromkeys(("out_stride_token", "out_stride_head"), "i32:16")
    constants = {"BLOCK_ROWS": 8, **shared, "SINKS": True, "LSE": True}
    yield AotSpec("level_parts", f"{_MODULE}:parts_kernel", arguments, constants, max_stack_bytes=16)


def _plans() -> Iterator[AotSpec]:
    module = "fi_triton.attention.level_plan"
    lists = dict.fromkeys(("nodes_ptr", "order_ptr", "q_indptr_ptr", "kv_lens_ptr", "place_indptr_ptr"), "*i32")
    lists |= dict.fromkeys(("own_begin_ptr", "own_lens_ptr", "depths_ptr", "rows_ptr"), "*i32")
    lists |= dict.fromkeys(("num_nodes", "num_requests", "max_tokens"), "i32")
    constants: dict[str, Any] = {"ORDER": True, "DEPTH": _DEPTH, "BLOCK": 256, "TOKENS": 128}
    yield AotSpec("level_plan_requests", f"{module}:level_requests_kernel", lists, constants, 4)
    lists = dict.fromkeys(("nodes_ptr", "order_ptr", "place_indptr_ptr", "node_rows_ptr", "node_indptr_ptr"), "*i32")
    lists |= {"node_lens_ptr": "*i32", "num_nodes": "i32", "num_requests": "i32"}
    yield AotSpec("level_plan_nodes", f"{module}:level_nodes_kernel", lists, {"ORDER": True, "BLOCK": 256}, 4)


def _specs() -> Iterator[AotSpec]:
    yield _node(AttentionSpec(32, 8, 128), "bf16", "bf16")
    yield _node(AttentionSpec(32, 8, 128, kv_format="fp8_e4m3"), "bf16", "fp8e4nv")
    yield _node(AttentionSpec(32, 8, 128, features=frozenset({"soft_cap", "alibi", "mask"})), "bf16", "bf16")
    yield from _merges()
    yield from _plans()


AOT_SPECS = list(_specs())
