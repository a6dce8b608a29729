"""Allowed-token bitmask, logit bias, repetition, frequency and presence penalties in one pass over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fi_core.sampling import PenaltyParams, TokenHistory
from torch import Tensor

from ..launch import on_device

BLOCK = 1024
_ENTRIES = tl.constexpr(16)


@triton.jit
def spread_entries_kernel(
    entries_ptr,
    num_entries_ptr,
    rows_ptr,
    slots_ptr,
    counts_ptr,
    entries_stride,
    vocab_size,
    capacity,
    BLOCK: tl.constexpr,
):
    """Program (row, block of entries): counts of a sparse history to where its tokens are in counts [rows, vocab_size]."""
    row = tl.program_id(0).to(tl.int64)
    place = row if slots_ptr is None else tl.load(slots_ptr + row)
    if place >= 0:
        history = place if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
        entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        used = entry < tl.minimum(tl.load(num_entries_ptr + history), capacity)
        pair_ptr = entries_ptr + history * entries_stride + 2 * entry
        token = tl.load(pair_ptr, mask=used, other=-1)
        count = tl.load(pair_ptr + 1, mask=used, other=0)
        tl.store(counts_ptr + row * vocab_size + token, count, mask=(token >= 0) & (token < vocab_size))


@triton.jit
def bits_of(words_ptr, token, inside):
    """Whether bit (token % 32) of word token // 32 is set."""
    word = tl.load(words_ptr + token // 32, mask=inside, other=0)
    return ((word >> (token % 32)) & 1) == 1


@triton.jit
def with_bias(value, token, place, history, lists, until_ptr, num_output_ptr):
    """``value`` with the entries of ``lists`` (indptr, tokens, values) added; -inf where until_ptr holds a token back."""
    indptr_ptr, tokens_ptr, values_ptr = lists
    end = tl.load(indptr_ptr + place + 1)
    for start in range(tl.load(indptr_ptr + place), end, _ENTRIES):
        entry = start + tl.arange(0, _ENTRIES)
        biased = tl.load(tokens_ptr + entry, mask=entry < end, other=-1)
        bias = tl.load(values_ptr + entry, mask=entry < end, other=0.0)
        if until_ptr is not None:
            until = tl.load(until_ptr + entry, mask=entry < end, other=0)
            bias = tl.where(tl.load(num_output_ptr + history) < until, float("-inf"), bias)
        value += tl.sum(tl.where(biased[:, None] == token[None, :], bias[:, None], 0.0), axis=0)
    return value


@triton.jit
def with_repetition(value, seen, factor):
    """``value`` of seen tokens moved away from what is likely."""
    return tl.where(seen, tl.where(value > 0, tl.div_rn(value, factor), value * factor), value)


@triton.jit
def with_counts(value, count, place, frequency_ptr, presence_ptr):
    """(``value`` less what frequency and presence take, whether the row uses one of them)."""
    uses = place < 0
    if frequency_ptr is not None:
        frequency = tl.load(frequency_ptr + place)
        value -= frequency * count.to(tl.float32)
        uses = uses | (frequency != 0.0)
    if presence_ptr is not None:
        presence = tl.load(presence_ptr + place)
        value -= presence * (count > 0).to(tl.float32)
        uses = uses | (presence != 0.0)
    return value, uses


@triton.jit
def penalize_kernel(
    logits_ptr,
    out_ptr,
    slots_ptr,  # this and the following tensors may be None
    allowed_ptr,
    step_allowed_ptr,
    bias_indptr_ptr,
    bias_tokens_ptr,
    bias_values_ptr,
    bias_until_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    prompt_ptr,
    output_ptr,
    seen_ptr,
    num_entries_ptr,  # None unless entries that did not fit matter
    num_output_ptr,
    rows_ptr,
    logits_stride,
    out_stride,
    allowed_stride,
    step_allowed_stride,
    prompt_stride,
    output_stride,
    seen_stride,
    vocab_size,
    capacity,
    COUNTS_BY_ROW: tl.constexpr,  # whether output counts are those of the row, else of its history
    BLOCK: tl.constexpr,
):
    """Program (row, block of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    value = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    place = row if slots_ptr is None else tl.load(slots_ptr + row)
    if place >= 0:
        if allowed_ptr is not None:
            value = tl.where(bits_of(allowed_ptr + place * allowed_stride, token, inside), value, float("-inf"))
        if step_allowed_ptr is not None:
            value = tl.where(bits_of(step_allowed_ptr + row * step_allowed_stride, token, inside), value, float("-inf"))
        history = place if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
        if bias_indptr_ptr is not None:
            lists = (bias_indptr_ptr, bias_tokens_ptr, bias_values_ptr)
            value = with_bias(value, token, place, history, lists, bias_until_ptr, num_output_ptr)
        count = tl.zeros_like(token)
        if output_ptr is not None:
            counts_ptr = output_ptr + (row if COUNTS_BY_ROW else history) * output_stride
            count = tl.load(counts_ptr + token, mask=inside, other=0)
        if repetition_ptr is not None:
            if seen_ptr is not None:
                seen = bits_of(seen_ptr + history * seen_stride, token, inside)
            else:
                seen = count != 0
                if prompt_ptr is not None:
                    seen = seen | (tl.load(prompt_ptr + history * prompt_stride + token, mask=inside, other=0) != 0)
            value = with_repetition(value, seen, tl.load(repetition_ptr + place))
        value, counted = with_counts(value, count, place, frequency_ptr, presence_ptr)
        if num_entries_ptr is not None:
            unfit = counted & (tl.load(num_entries_ptr + history) > capacity)
            value = tl.where(unfit, float("-inf"), value)
    tl.store(out_ptr + row * out_stride + token, value.to(out_ptr.dtype.element_ty), mask=inside)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _spread(penalties: PenaltyParams, history: TokenHistory, slots: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Output counts int32 of ``shape``, a row for each of the logits."""
    counts = torch.zeros(shape, dtype=torch.int32, device=history.entries.device)
    capacity = history.entries.shape[1]
    spread_entries_kernel[(shape[0], triton.cdiv(capacity, BLOCK))](
        history.entries,
        history.num_entries,
        penalties.rows,
        slots,
        counts,
        history.entries.stride(0),
        shape[1],
        capacity,
        BLOCK=BLOCK,
    )
    return counts


def penalize_logits(logits: Tensor, penalties: PenaltyParams, out: Tensor, slots: Tensor | None = None) -> None:
    """The ``PenalizeLogits`` protocol: float32 arithmetic, rounded once; ``out`` may be the logits. A sparse history's counts
    are spread over N * V int32 of scratch memory first, if frequency or presence is given."""
    num_rows, vocab_size = logits.shape
    history, output = penalties.history, penalties.output_counts
    seen = num_entries = num_output = None
    capacity = 0
    with on_device(logits.device):
        if history is not None:
            seen, num_output, capacity = history.seen, history.num_output, history.entries.shape[1]
            if penalties.frequency is not None or penalties.presence is not None:
                num_entries = history.num_entries
                output = _spread(penalties, history, slots, (num_rows, vocab_size))
        penalize_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
            logits,
            out,
            slots,
            penalties.allowed,
            penalties.step_allowed,
            penalties.bias_indptr,
            penalties.bias_tokens,
            penalties.bias_values,
            penalties.bias_until,
            penalties.repetition,
            penalties.frequency,
            penalties.presence,
            penalties.prompt_counts,
            output,
            seen,
            num_entries,
            num_output,
            penalties.rows,
            logits.stride(0),
            out.stride(0),
            _stride(penalties.allowed),
            _stride(penalties.step_allowed),
            _stride(penalties.prompt_counts),
            _stride(output),
            _stride(seen),
            vocab_size,
            capacity,
            COUNTS_BY_ROW=history is not None,
            BLOCK=BLOCK,
        )
