"""Specialisations of the rope, norm and activation kernels that are compiled ahead of time as a check."""

from __future__ import annotations

from collections.abc import Iterator

from .aot import AotSpec

_ROPE_STRIDES = [f"{name}_stride_{dim}" for name in ("q", "k", "q_out", "k_out") for dim in "th"]
_NORM_STRIDES = [f"{name}_{part}_stride" for name in ("x", "residual", "out") for part in ("outer", "inner")]
_GATED_STRIDES = [f"{name}_{part}_stride" for name in ("x", "out") for part in ("outer", "inner")]


def _rope(dtype: str, interleaved: bool, use_table: bool) -> AotSpec:
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    others = {"positions_ptr": "*i64", "table_ptr": "*fp32", "inv_freq_ptr": "*fp32", "attention_factor": "fp32"}
    sizes = dict.fromkeys(("table_stride", *_ROPE_STRIDES, "rotary_dim", "head_dim"), "i32:16")
    counts = dict.fromkeys(("num_q_heads", "num_k_heads"), "i32")
    constants = {"HEADS": 8, "PAIRS": 64, "Q_REST": 0, "K_REST": 0, "HAS_K": True}
    constants |= {"INTERLEAVED": interleaved, "USE_TABLE": use_table}
    name = f"rope_{dtype}_{'interleaved' if interleaved else 'half'}_{'table' if use_table else 'computed'}"
    return AotSpec(name, "fi_triton.rope:rope_kernel", tensors | others | sizes | counts, constants)


def _norm(dtype: str, rows: int, width: int, add: bool, num_warps: int, fp8_limit: float = 0.0) -> AotSpec:
    """``fp8_limit``: of an e4m3 output with its scale in memory; 0 for an output of ``dtype``."""
    arguments = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), f"*{dtype}")
    arguments |= {"out_ptr": "*fp8e4nv" if fp8_limit else f"*{dtype}", "scale_ptr": "*fp32", "scale_value": "fp32"}
    arguments |= {"eps": "fp32", "weight_bias": "fp32", "num_rows": "i32", "width": "i32:16", "inner_size": "i32"}
    arguments |= dict.fromkeys(_NORM_STRIDES, "i32:16")
    name = f"{'add_' if add else ''}rmsnorm_{dtype}_{width}{'_fp8_e4m3' if fp8_limit else ''}"
    constants = {"ROWS": rows, "WIDTH": width, "ADD": add, "SCALE_IN_MEMORY": fp8_limit > 0, "LIMIT": fp8_limit}
    min_arch = 89 if fp8_limit else 80
    return AotSpec(name, "fi_triton.norms:rmsnorm_kernel", arguments, constants, num_warps, min_arch=min_arch)


def _gated(dtype: str, activation: str) -> AotSpec:
    arguments = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "width": "i32:16", "inner_size": "i32"}
    arguments |= dict.fromkeys(_GATED_STRIDES, "i32:16")
    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    return AotSpec(f"{activation}_mul_{dtype}", "fi_triton.activations:gated_kernel", arguments, constants)


def _specs() -> Iterator[AotSpec]:
    for dtype in ("bf16", "fp16", "fp32"):
        for interleaved in (False, True):
            yield _rope(dtype, interleaved, use_table=True)
        for add in (False, True):
            yield _norm(dtype, 8, 128, add, 4)
            yield _norm(dtype, 1, 4096, add, 8)
            yield _norm(dtype, 1, 16384, add, 16)
            yield _norm(dtype, 1, 4096, add, 8, 448.0)
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield _gated(dtype, activation)
    yield _rope("bf16", False, use_table=False)


AOT_SPECS = list(_specs())
