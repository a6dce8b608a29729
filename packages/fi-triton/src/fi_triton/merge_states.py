"""Merge partial attention states over disjoint key sets.

Source: the associative merge of (output, log-sum-exp) pairs, as in FlashAttention (Dao et al., 2022, section 3.1).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_states", "num_rows"])
def merge_states_kernel(
    o_ptr, lse_ptr, o_out_ptr, lse_out_ptr, num_states, num_rows, num_heads,
    o_stride_state, o_stride_token, o_stride_head, lse_stride_state, lse_stride_token,
    out_stride_token, out_stride_head, lse_out_stride_token,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) rows a program; states in ascending order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    token = (row // num_heads).to(tl.int64)
    head = (row % num_heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    wanted = live[:, None] & (dims < DIM)[None, :]
    lse_rows = lse_ptr + token * lse_stride_token + head
    o_rows = o_ptr + token * o_stride_token + head * o_stride_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for state in range(0, num_states):
        lse = tl.load(lse_rows + tl.cast(state, tl.int64) * lse_stride_state, mask=live, other=float("-inf"))
        top = tl.maximum(top, lse * LOG2E)
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for state in range(0, num_states):
        number = tl.cast(state, tl.int64)
        lse = tl.load(lse_rows + number * lse_stride_state, mask=live, other=float("-inf"))
        weight = tl.exp2(lse * LOG2E - base)
        pointers = (o_rows + number * o_stride_state)[:, None] + dims[None, :]
        part = tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)
        # A state that saw nothing may hold anything: 0 * NaN must not reach the sum.
        total += tl.where((weight == 0.0)[:, None], 0.0, weight[:, None] * part)
        mass += weight
    empty = mass == 0.0
    divisor = tl.where(empty, 1.0, mass)
    out_rows = o_out_ptr + token * out_stride_token + head * out_stride_head
    tl.store(out_rows[:, None] + dims[None, :], (total / divisor[:, None]).to(o_out_ptr.dtype.element_ty), mask=wanted)
    merged = tl.where(empty, float("-inf"), (base + tl.log2(divisor)) * LN2)
    tl.store(lse_out_ptr + token * lse_out_stride_token + head, merged, mask=live)


def merge_states(o: Tensor, lse: Tensor, o_out: Tensor, lse_out: Tensor) -> None:
    """The ``MergeStates`` protocol: o [N, T, H, D], lse float32 [N, T, H] -> o_out [T, H, D], lse_out float32 [T, H]."""
    num_states, num_tokens, num_heads, dim = o.shape
    if num_tokens * num_heads == 0:
        return
    block_d = triton.next_power_of_2(dim)
    rows = max(1, min(_ELEMENTS // block_d, triton.next_power_of_2(num_tokens * num_heads), 32))
    with on_device(o.device):
        merge_states_kernel[(triton.cdiv(num_tokens * num_heads, rows),)](
            o,
            lse,
            o_out,
            lse_out,
            num_states,
            num_tokens * num_heads,
            num_heads,
            *o.stride()[:3],
            *lse.stride()[:2],
            *o_out.stride()[:2],
            lse_out.stride(0),
            ROWS=rows,
            DIM=dim,
            BLOCK_D=block_d,
            num_warps=4,
        )


def load_kernel() -> object:
    """What the kernel entry loads."""
    return merge_states
