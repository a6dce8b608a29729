"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..rope import RopeConfig, RopeTable, YarnScaling
from ..settings import settings
from .arguments import call_checked, check_float, check_like, output_like


def _cases() -> Iterator[Case]:
    from .cases.rope import cases

    return cases()


OPERATION = Operation(
    name="rope",
    summary="rotate the first rotary_dim dims of each head of q and k by position",
    fields={
        "dtype": "dtype of q and k",
        "head_dim": "length of a head",
        "rotary_dim": "leading dims that rotate; the rest is copied",
        "pairs": "'half' (i, i + rotary_dim / 2) or 'interleaved' (2 i, 2 i + 1)",
        "source": "'table' reads cos and sin, 'computed' derives the angles from inv_freq",
    },
    typical={"dtype": torch.bfloat16, "head_dim": 128, "rotary_dim": 128, "pairs": "half", "source": "table"},
    cases=_cases,
)

_dispatch = Dispatcher("rope", "dtype", "head_dim", "rotary_dim", "pairs", "source")


def source_of(table: RopeTable) -> str:
    """The request field "source" (``append_kv``: "rope_source") of a table: "table" or "computed"."""
    return "computed" if table.cos_sin is None else "table"


def check_rope(q: Tensor, k: Tensor | None, positions: Tensor, table: RopeTable) -> None:
    """Raise ArgumentError unless the inputs of ``rope`` fit each other."""
    check_float("q", q)
    if q.dim() != 3:
        raise ArgumentError("q", "shape [tokens, heads, head_dim]", tuple(q.shape))
    num_tokens, _, head_dim = q.shape
    if k is not None:
        if k.dim() != 3:
            raise ArgumentError("k", "shape [tokens, heads, head_dim]", tuple(k.shape))
        check_like("k", k, q, (num_tokens, k.shape[1], head_dim))
    if positions.dtype not in (torch.int32, torch.int64):
        raise ArgumentError("positions.dtype", "int32 or int64", positions.dtype)
    if tuple(positions.shape) != (num_tokens,):
        raise ArgumentError("positions", f"shape ({num_tokens},)", tuple(positions.shape))
    if not positions.is_contiguous():
        raise ArgumentError("positions", "a contiguous tensor", f"strides {positions.stride()}")
    if positions.device != q.device:
        raise ArgumentError("positions.device", str(q.device), positions.device)
    table.check("table", q.device)
    if table.config.rotary_dim > head_dim:
        raise ArgumentError("table.config.rotary_dim", f"at most head_dim={head_dim}", table.config.rotary_dim)


def rope(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    table: RopeTable,
    *,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the heads of q and k by their token's position (RoFormer, Su et al., 2021, section 3.4).

    q [T, Hq, D]; k [T, Hk, D] of q's dtype (Hk may differ), or None; float32, float16, bfloat16 or float64, contiguous
    last dim, any other strides. positions int32 or int64 [T], 0 or more, and below the table's length when ``table``
    has one. Dims from rotary_dim on are copied. The arithmetic is float32 (float64 for float64), rounded once. Outputs
    default to new tensors; pass ``q_out=q`` and ``k_out=k`` to rotate in place (any other overlap is not allowed).
    Returns (q_out, k_out), k_out None when k is. Raises ArgumentError and UnsupportedError; checked mode (FI_CHECK=1)
    reports positions that are negative or beyond the table.
    """
    check_rope(q, k, positions, table)
    q_out = output_like("q_out", q_out, q, q.shape)
    if k is not None:
        k_out = output_like("k_out", k_out, k, k.shape)
    elif k_out is not None:
        raise ArgumentError("k_out", "None when k is None", "a tensor")
    if torch.compiler.is_compiling():
        config = table.config
        rotation = (config.rotary_dim, config.pairs, config.attention_factor)
        _OP(q, k, positions, table.inv_freq, table.cos_sin, *rotation, q_out, k_out)
    else:
        _run(q, k, positions, table, q_out, k_out)
    return q_out, k_out


def _run(q: Tensor, k: Tensor | None, positions: Tensor, table: RopeTable, q_out: Tensor, k_out: Tensor | None) -> None:
    if settings().check:
        _check_positions(positions, table)
    config = table.config
    kernel = _dispatch(q.device, q.dtype, q.shape[2], config.rotary_dim, config.pairs, source_of(table))
    if q.numel() or (k is not None and k.numel()):
        call_checked(kernel, (q, k, positions, table, q_out, k_out), lambda: _check_positions(positions, table))


def _check_positions(positions: Tensor, table: RopeTable) -> None:
    from .. import checks

    checks.check_rope(positions, table)


def _run_flat(*flat: Any) -> None:
    """The operator's arguments, in the order of its schema."""
    q, k, positions, inv_freq, cos_sin, rotary_dim, pairs, attention_factor, q_out, k_out = flat
    # inv_freq already holds the scaling; of it kernels read the attention factor only.
    scaling = YarnScaling(1.0, 1, attention_factor=attention_factor)
    table = RopeTable(RopeConfig(rotary_dim, pairs=pairs, scaling=scaling), inv_freq, cos_sin)
    _run(q, k, positions, table, q_out, k_out)


_OP = register(
    "rope(Tensor q, Tensor? k, Tensor positions, Tensor inv_freq, Tensor? cos_sin, int rotary_dim, str pairs, "
    "float attention_factor, Tensor(a!) q_out, Tensor(b!)? k_out) -> ()",
    _run_flat,
)


def cost(num_tokens: int, num_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, table: bool) -> Cost:
    """Every head (q's and k's together: ``num_heads``) read and written once, a float32 table row and an int64 position
    read a token; three operations a rotated element."""
    elements = num_tokens * num_heads * head_dim
    per_token = 8 + (4 * rotary_dim if table else 0)
    return Cost(2 * elements * dtype.itemsize + num_tokens * per_token, 3 * num_tokens * num_heads * rotary_dim)
