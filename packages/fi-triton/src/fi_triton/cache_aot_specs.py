"""Specialisations of append_kv, copy_pages and merge_states that are compiled ahead of time as a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .aot import AotSpec

_INTS = ("q_indptr_ptr", "kv_lens_ptr", "table_ptr", "table_row_ptr", "kv_indptr_ptr")
_FLOATS = ("cos_sin_ptr", "inv_freq_ptr", "k_scale_ptr", "v_scale_ptr")
_NUMBERS = ("k_scale", "v_scale", "attention_factor")
_COUNTS = ("num_requests", "num_kv_heads", "num_q_heads", "k_scale_stride", "v_scale_stride", "table_stride")
_ROWS = tuple(f"{name}_stride_{part}" for name in "kvq" for part in ("token", "head"))
_CACHES = tuple(f"{name}_cache_stride_{part}" for name in "kv" for part in ("page", "token", "head"))
_LIMITS = {"bf16": 0.0, "fp32": 0.0, "fp8e4nv": 448.0, "fp8e5": 57344.0}


def _append(dtype: str, stored: str, rope: int, use_table: bool, addressing: int) -> AotSpec:
    arguments = {**dict.fromkeys(_INTS, "*i32"), **dict.fromkeys(_FLOATS, "*fp32"), **dict.fromkeys(_NUMBERS, "fp32")}
    arguments |= dict.fromkeys(("k_ptr", "v_ptr", "q_ptr"), f"*{dtype}")
    arguments |= {"k_cache_ptr": f"*{stored}", "v_cache_ptr": f"*{stored}", "slots_ptr": "*i64", "num_pairs": "i32:16"}
    arguments |= {**dict.fromkeys(_COUNTS, "i32"), **dict.fromkeys((*_ROWS, *_CACHES, "cos_sin_stride"), "i32:16")}
    quantised = _LIMITS[stored] > 0
    constants: dict[str, Any] = {"HEADS": 8, "DIM": 128, "BLOCK_D": 128, "DIM_VO": 128, "BLOCK_DV": 128}
    constants |= {
        "PAIRS": 64,
        "REST": 0,
        "PAGE_SIZE": 16,
        "ADDRESSING": addressing,
        "TABLE_ROW": False,
        "ROPE": rope,
        "USE_TABLE": use_table,
    }
    constants |= {"K_SCALE": quantised, "V_SCALE": quantised, "LIMIT": _LIMITS[stored]}
    source = ("computed", "table")[use_table] if rope else "none"
    name = f"append_kv_{dtype}_to_{stored}_{('plain', 'half', 'interleaved')[rope]}_{source}"
    min_arch = 89 if quantised else 80
    return AotSpec(name, "fi_triton.append_kv:append_kernel", arguments, constants, 2, min_arch=min_arch)


def _merge(dtype: str) -> AotSpec:
    arguments = {"o_ptr": f"*{dtype}", "o_out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "lse_out_ptr": "*fp32"}
    arguments |= dict.fromkeys(("num_states", "num_rows", "num_heads"), "i32")
    arguments |= dict.fromkeys(("o_stride_state", "o_stride_token", "o_stride_head"), "i32:16")
    arguments |= dict.fromkeys(("out_stride_token", "out_stride_head"), "i32:16")
    arguments |= dict.fromkeys(("lse_stride_state", "lse_stride_token", "lse_out_stride_token"), "i32")
    constants = {"ROWS": 32, "DIM": 128, "BLOCK_D": 128}
    return AotSpec(f"merge_states_{dtype}", "fi_triton.merge_states:merge_states_kernel", arguments, constants)


def _copy(bits: str, index: str, alignment: int) -> AotSpec:
    arguments = {f"{side}_{part}_ptr": f"*{bits}" for side in ("source", "target") for part in "kv"}
    arguments |= {"source_pages_ptr": f"*{index}", "target_pages_ptr": f"*{index}"}
    arguments |= dict.fromkeys(("num_rows", "num_inner", "num_k_parts"), "i32")
    stride = f"i32:{alignment}" if alignment > 1 else "i32"
    arguments |= {
        f"{side}_{part}_{dim}": stride
        for side in ("source", "target")
        for part in "kv"
        for dim in ("page", "outer", "inner")
    }
    constants = {"K_ROWS": 32, "DIM": 128, "BLOCK_D": 128, "V_ROWS": 32, "DIM_VO": 128, "BLOCK_DV": 128}
    name = f"copy_pages_{bits}_{index}_strides_of_{alignment}"
    return AotSpec(name, "fi_triton.copy_pages:copy_pages_kernel", arguments, constants)


def _find() -> Iterator[AotSpec]:
    """Of a dense table with rows of its own, pages of 16."""
    addressing = {
        **dict.fromkeys(("q_indptr_ptr", "kv_lens_ptr"), "*i32"),
        "table_stride": "i32",
        "num_requests": "i32",
    }
    addressing |= dict.fromkeys(("table_ptr", "table_row_ptr", "table_indptr_ptr"), "*i32")
    table: dict[str, Any] = {"PAGE_SIZE": 16, "ROWS": True, "INDPTR": False}
    arrays = {
        "begin": ("state_ptr", "counts_ptr", "nodes_ptr"),
        "leader": ("group_ptr", "matched_ptr", "next_page_ptr", "place_ptr", "order_ptr", "leader_ptr", "length_ptr"),
        "node": ("nodes_ptr", "count_ptr", "covered_ptr", "leader_ptr", "matched_ptr", "place_ptr", "size_ptr"),
    }
    constants = {"begin": {"DEPTH": 2}, "leader": {"REQUESTS": 256, "ENTRIES": 1024}, "node": {"REQUESTS": 256}}
    module = "fi_triton.find_shared_prefixes"
    for name, pointers in arrays.items():
        arguments = {**dict.fromkeys(pointers, "*i32"), **addressing}
        arguments |= {} if name == "leader" else {"num_nodes": "i32"}
        arguments |= {"wanted_ptr": "*i32", "next_page_ptr": "*i32"} if name == "node" else {}
        yield AotSpec(f"find_prefixes_{name}", f"{module}:{name}_kernel", arguments, table | constants[name], 4)
    pointers = ("matched_ptr", "covered_ptr", "place_ptr", "order_ptr", "leader_ptr", "length_ptr", "new_matched_ptr")
    arguments = dict.fromkeys((*pointers, "new_place_ptr", "new_order_ptr", "size_ptr", "wanted_ptr"), "*i32")
    arguments |= {"num_requests": "i32", "min_saved": "i32"}
    yield AotSpec("find_prefixes_part", f"{module}:part_kernel", arguments, {"PAGE_SIZE": 16, "REQUESTS": 256}, 4)


def _specs() -> Iterator[AotSpec]:
    for rope in (0, 1, 2):
        yield _append("bf16", "bf16", rope, use_table=False, addressing=1)
    yield _append("bf16", "bf16", 1, use_table=True, addressing=3)
    yield _append("fp32", "fp32", 2, use_table=True, addressing=2)
    for stored in ("fp8e4nv", "fp8e5"):
        yield _append("bf16", stored, 1, use_table=True, addressing=1)
    yield _merge("bf16")
    yield _merge("fp32")
    yield from _find()
    yield _copy("i16", "i64", 16)
    yield _copy("i32", "i32", 16)
    yield _copy("u8", "i64", 1)


AOT_SPECS = list(_specs())
