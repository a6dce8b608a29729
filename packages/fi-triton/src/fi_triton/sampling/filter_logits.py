"""Temperature and filters without the draw: masked logits or renormalised probabilities, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fi_core.sampling import FilterParams
from torch import Tensor

from ..launch import on_device
from .rows import load_block, scan_row, to_mass, weight_and_shortfall
from .select import filter_row, is_kept, kept_total, open_limits, valid_filters

BLOCK = 1024
NUM_WARPS = 16


@triton.jit
def _write_row(row, limits, kept, out_ptr, PROBS: tl.constexpr, BY_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, row[3], BLOCK):
        token, scaled = load_block(row, start, BLOCK)
        weight, shortfall = weight_and_shortfall(scaled, row[5])
        keep = is_kept(token, scaled, weight, shortfall, limits, BY_DISTANCE)
        if PROBS:
            value = (to_mass(weight).to(tl.float64) / kept.to(tl.float64)).to(tl.float32)
            value = tl.where(keep, value, 0.0)
        else:
            value = tl.where(keep, scaled, float("-inf"))
        tl.store(out_ptr + token, value, mask=token < row[3])


@triton.jit
def _write_single(row_ptr, vocab_size, chosen, out_ptr, PROBS: tl.constexpr, BLOCK: tl.constexpr):
    """The row of a single kept token; none if ``chosen`` is -1."""
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(row_ptr + token, mask=token < vocab_size, other=0.0).to(tl.float32)
        if PROBS:
            value = (token == chosen).to(tl.float32)
        else:
            value = tl.where(token == chosen, logit, float("-inf"))
        tl.store(out_ptr + token, value, mask=token < vocab_size)


@triton.jit
def filter_logits_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    typical_p_ptr,
    out_ptr,
    no_list_ptr,  # int32, never read: the row is not narrowed, because zero-mass tokens count here
    logits_stride,
    out_stride,
    vocab_size,
    JOINT: tl.constexpr,
    PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every pass reads the row before the last one writes it, so out may be the logits themselves."""
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + index * logits_stride
    out_row_ptr = out_ptr + index * out_stride
    largest, first, no_nan = scan_row(row_ptr, vocab_size, 4 * BLOCK)
    temperature = tl.full((), 1.0, tl.float32) if temperature_ptr is None else tl.load(temperature_ptr + index)
    k_ptr = None if top_k_ptr is None else top_k_ptr + index
    p_ptr = None if top_p_ptr is None else top_p_ptr + index
    m_ptr = None if min_p_ptr is None else min_p_ptr + index
    t_ptr = None if typical_p_ptr is None else typical_p_ptr + index
    valid = valid_filters(temperature, k_ptr, p_ptr, m_ptr, t_ptr)
    greedy = temperature <= 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    peak = tl.div_rn(largest, temperature)
    usable = (tl.abs(peak) < float("inf")) & no_nan & valid
    if usable & (greedy == 0):
        row = (row_ptr, no_list_ptr, tl.full((), 0, tl.int32), tl.cast(vocab_size, tl.int32), temperature, peak)
        total = kept_total(row, open_limits(), False, BLOCK)
        limits, kept = filter_row(row, total, vocab_size, k_ptr, p_ptr, m_ptr, t_ptr, JOINT, BLOCK)
        _write_row(row, limits, kept, out_row_ptr, PROBS, typical_p_ptr is not None, BLOCK)
    else:
        _write_single(row_ptr, vocab_size, tl.where(usable, first, -1), out_row_ptr, PROBS, BLOCK)


def filter_logits(logits: Tensor, filters: FilterParams, kind: str, out: Tensor) -> None:
    """The ``FilterLogits`` protocol; float32 ``out`` may be the logits."""
    num_rows, vocab_size = logits.shape
    with on_device(logits.device):
        filter_logits_kernel[(num_rows,)](
            logits,
            filters.temperature,
            filters.top_k,
            filters.top_p,
            filters.min_p,
            filters.typical_p,
            out,
            torch.empty(1, dtype=torch.int32, device=logits.device),
            logits.stride(0),
            out.stride(0),
            vocab_size,
            JOINT=filters.order == "joint",
            PROBS=kind == "probs",
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
