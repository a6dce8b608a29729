"""Allowed-token bitmask, logit bias, repetition, frequency and presence penalties in one pass over the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from fi_core.sampling import PenaltyParams
from torch import Tensor

from ..launch import on_device

BLOCK = 1024
_ENTRIES = tl.constexpr(16)


@triton.jit
def penalize_kernel(
    logits_ptr,
    out_ptr,
    allowed_ptr,  # this and the following tensors may be None
    bias_indptr_ptr,
    bias_tokens_ptr,
    bias_values_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    prompt_ptr,
    output_ptr,
    rows_ptr,
    logits_stride,
    out_stride,
    allowed_stride,
    prompt_stride,
    output_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Program (row, block of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    value = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    if allowed_ptr is not None:
        word = tl.load(allowed_ptr + row * allowed_stride + token // 32, mask=inside, other=0)
        value = tl.where(((word >> (token % 32)) & 1) == 1, value, float("-inf"))
    if bias_indptr_ptr is not None:
        end = tl.load(bias_indptr_ptr + row + 1)
        for start in range(tl.load(bias_indptr_ptr + row), end, _ENTRIES):
            entry = start + tl.arange(0, _ENTRIES)
            biased = tl.load(bias_tokens_ptr + entry, mask=entry < end, other=-1)
            bias = tl.load(bias_values_ptr + entry, mask=entry < end, other=0.0)
            value += tl.sum(tl.where(biased[:, None] == token[None, :], bias[:, None], 0.0), axis=0)
    history = row if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
    if output_ptr is not None:
        count = tl.load(output_ptr + history * output_stride + token, mask=inside, other=0)
    if repetition_ptr is not None:
        seen = token < 0
        if prompt_ptr is not None:
            seen = seen | (tl.load(prompt_ptr + history * prompt_stride + token, mask=inside, other=0) != 0)
        if output_ptr is not None:
            seen = seen | (count != 0)
        factor = tl.load(repetition_ptr + row)
        value = tl.where(seen, tl.where(value > 0, tl.div_rn(value, factor), value * factor), value)
    if frequency_ptr is not None:
        value -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    if presence_ptr is not None:
        value -= tl.load(presence_ptr + row) * (count > 0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + token, value.to(out_ptr.dtype.element_ty), mask=inside)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def penalize_logits(logits: Tensor, penalties: PenaltyParams, out: Tensor) -> None:
    """The ``PenalizeLogits`` protocol: float32 arithmetic, rounded once; ``out`` may be the logits."""
    num_rows, vocab_size = logits.shape
    with on_device(logits.device):
        penalize_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
            logits,
            out,
            penalties.allowed,
            penalties.bias_indptr,
            penalties.bias_tokens,
            penalties.bias_values,
            penalties.repetition,
            penalties.frequency,
            penalties.presence,
            penalties.prompt_counts,
            penalties.output_counts,
            penalties.rows,
            logits.stride(0),
            out.stride(0),
            _stride(penalties.allowed),
            _stride(penalties.prompt_counts),
            _stride(penalties.output_counts),
            vocab_size,
            BLOCK=BLOCK,
        )
