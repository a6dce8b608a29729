"""Rotary position embedding of q and k in one launch (RoFormer, Su et al., 2021, section 3.4.2)."""

from __future__ import annotations

import triton
import triton.language as tl
from fi_core.rope import RopeTable
from torch import Tensor

from .launch import on_device
from .rope_device import load_pairs, rope_cos_sin, rotate_pairs, store_pairs

_TILE_ELEMENTS = 1024


@triton.jit
def _rotate_heads(
    heads,  # (token's first input head, first output head, their head strides, first head of the block, number of heads)
    cos,
    sin,
    rotary_dim,
    head_dim,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,  # power of 2 that covers the dims behind rotary_dim; 0 when there are none to copy
    INTERLEAVED: tl.constexpr,
):
    in_ptr, out_ptr, in_stride_h, out_stride_h, first_head, num_heads = heads
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    num_pairs = rotary_dim // 2
    mask = (head < num_heads) & (pair < num_pairs)
    source, target = in_ptr + head * in_stride_h, out_ptr + head * out_stride_h
    first, second = load_pairs(source, pair, mask, num_pairs, PAIRS, INTERLEAVED)
    first, second = rotate_pairs(first, second, cos, sin)
    store_pairs(target, first, second, pair, mask, num_pairs, PAIRS, INTERLEAVED)
    if REST > 0:
        dim = rotary_dim + tl.arange(0, REST)[None, :]
        rest_mask = (head < num_heads) & (dim < head_dim)
        tl.store(target + dim, tl.load(source + dim, mask=rest_mask), mask=rest_mask)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    positions_ptr,
    table_ptr,
    inv_freq_ptr,
    attention_factor,
    table_stride,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    k_out_stride_t,
    k_out_stride_h,
    num_q_heads,
    num_k_heads,
    rotary_dim,
    head_dim,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    Q_REST: tl.constexpr,
    K_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    USE_TABLE: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """Program (token, head block); the blocks of k follow those of q."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, PAIRS)[None, :]
    num_pairs = rotary_dim // 2
    position = tl.load(positions_ptr + token)
    cos, sin = rope_cos_sin(
        position, pair, pair < num_pairs, num_pairs, table_ptr, table_stride, inv_freq_ptr, attention_factor, USE_TABLE
    )
    num_q_blocks = tl.cdiv(num_q_heads, HEADS)
    if block < num_q_blocks:
        source, target = q_ptr + token * q_stride_t, q_out_ptr + token * q_out_stride_t
        heads = (source, target, q_stride_h, q_out_stride_h, block * HEADS, num_q_heads)
        _rotate_heads(heads, cos, sin, rotary_dim, head_dim, HEADS, PAIRS, Q_REST, INTERLEAVED)
    elif HAS_K:
        source, target = k_ptr + token * k_stride_t, k_out_ptr + token * k_out_stride_t
        heads = (source, target, k_stride_h, k_out_stride_h, (block - num_q_blocks) * HEADS, num_k_heads)
        _rotate_heads(heads, cos, sin, rotary_dim, head_dim, HEADS, PAIRS, K_REST, INTERLEAVED)


def _rest_block(x: Tensor, out: Tensor, rotary_dim: int) -> int:
    """Tile width that copies the dims behind ``rotary_dim``; 0 in place or when all dims rotate."""
    rest = x.shape[2] - rotary_dim
    in_place = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    return 0 if in_place or rest == 0 else triton.next_power_of_2(rest)


def rope(q: Tensor, k: Tensor | None, positions: Tensor, rope: RopeTable, q_out: Tensor, k_out: Tensor | None) -> None:
    """The ``Rope`` protocol: float32 rotation, rounded once; q and k in one launch, offsets in int64."""
    num_tokens, num_q_heads, head_dim = q.shape
    keys, keys_out = (q, q_out) if k is None or k_out is None else (k, k_out)
    num_k_heads = 0 if k is None else k.shape[1]
    rotary_dim = rope.config.rotary_dim
    num_pairs = triton.next_power_of_2(rotary_dim // 2)
    num_heads = min(max(1, _TILE_ELEMENTS // num_pairs), triton.next_power_of_2(max(num_q_heads, num_k_heads, 1)))
    table = rope.inv_freq if rope.cos_sin is None else rope.cos_sin
    grid = (num_tokens, triton.cdiv(num_q_heads, num_heads) + triton.cdiv(num_k_heads, num_heads))
    with on_device(q.device):
        rope_kernel[grid](
            q,
            keys,
            q_out,
            keys_out,
            positions,
            table,
            rope.inv_freq,
            rope.config.attention_factor,
            table.stride(0),
            *q.stride()[:2],
            *keys.stride()[:2],
            *q_out.stride()[:2],
            *keys_out.stride()[:2],
            num_q_heads,
            num_k_heads,
            rotary_dim,
            head_dim,
            HEADS=num_heads,
            PAIRS=num_pairs,
            Q_REST=_rest_block(q, q_out, rotary_dim),
            K_REST=0 if k is None else _rest_block(keys, keys_out, rotary_dim),
            INTERLEAVED=rope.config.pairs == "interleaved",
            USE_TABLE=rope.cos_sin is not None,
            HAS_K=k is not None,
        )
