"""Copy whole pages between paged caches or within one (Kwon et al., 2023, section 4): K and V in one launch, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fi_core.records import KVCache
from torch import Tensor

from .launch import on_device

_ELEMENTS = 4096
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def copy_rows(
    source_ptr, target_ptr, first_row, num_rows, num_inner, source_outer, source_inner, target_outer, target_inner,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of DIM elements of one page; row r stands at (r // num_inner, r % num_inner) of the dims before the last."""
    row = first_row + tl.arange(0, ROWS)
    outer = (row // num_inner).to(tl.int64)
    inner = (row % num_inner).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    wanted = (row < num_rows)[:, None] & (dims < DIM)[None, :]
    read = source_ptr + outer * source_outer + inner * source_inner
    written = target_ptr + outer * target_outer + inner * target_inner
    tl.store(written[:, None] + dims[None, :], tl.load(read[:, None] + dims[None, :], mask=wanted), mask=wanted)


@triton.jit
def copy_pages_kernel(
    source_k_ptr, source_v_ptr, target_k_ptr, target_v_ptr, source_pages_ptr, target_pages_ptr,
    num_rows, num_inner, num_k_parts,
    source_k_page, source_k_outer, source_k_inner, source_v_page, source_v_outer, source_v_inner,
    target_k_page, target_k_outer, target_k_inner, target_v_page, target_v_outer, target_v_inner,
    K_ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_ROWS: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A program copies one part of one pair of pages; K's parts come before V's."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    source = tl.load(source_pages_ptr + pair).to(tl.int64)
    target = tl.load(target_pages_ptr + pair).to(tl.int64)
    if (source >= 0) & (target >= 0):
        if part < num_k_parts:
            copy_rows(
                source_k_ptr + source * source_k_page, target_k_ptr + target * target_k_page, part * K_ROWS,
                num_rows, num_inner, source_k_outer, source_k_inner, target_k_outer, target_k_inner,
                K_ROWS, DIM, BLOCK_D,
            )  # fmt: skip
        else:
            copy_rows(
                source_v_ptr + source * source_v_page, target_v_ptr + target * target_v_page,
                (part - num_k_parts) * V_ROWS, num_rows, num_inner,
                source_v_outer, source_v_inner, target_v_outer, target_v_inner,
                V_ROWS, DIM_VO, BLOCK_DV,
            )  # fmt: skip


def copy_pages(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    """The ``CopyPages`` protocol; layouts are strides to it, and elements are integers, so that every bit is kept."""
    num_outer, num_inner, dim = source.k.shape[1:]
    dim_vo, num_rows, num_pairs = source.v.shape[3], num_outer * num_inner, source_pages.shape[0]
    if num_pairs * num_rows == 0:
        return
    bits = _BITS[source.k.element_size()]
    caches = [tensor.view(bits) for tensor in (source.k, source.v, target.k, target.v)]
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(dim_vo)
    most_rows = triton.next_power_of_2(num_rows)
    k_rows, v_rows = (max(1, min(_ELEMENTS // block, most_rows)) for block in (block_d, block_dv))
    num_k_parts = triton.cdiv(num_rows, k_rows)
    with on_device(source_pages.device):
        copy_pages_kernel[(num_pairs, num_k_parts + triton.cdiv(num_rows, v_rows))](
            *caches,
            source_pages,
            target_pages,
            num_rows,
            num_inner,
            num_k_parts,
            *(stride for tensor in caches for stride in tensor.stride()[:3]),
            K_ROWS=k_rows,
            DIM=dim,
            BLOCK_D=block_d,
            V_ROWS=v_rows,
            DIM_VO=dim_vo,
            BLOCK_DV=block_dv,
            num_warps=4,
        )


def load_kernel() -> object:
    """What the kernel entry loads."""
    return copy_pages
