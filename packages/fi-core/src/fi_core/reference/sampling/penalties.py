"""Reference of ``penalize_logits``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sampling import PenaltyParams
from .. import serving_dtype
from .history import dense_counts, unpacked


def penalize_logits(
    logits: Tensor,
    penalties: PenaltyParams,
    out: Tensor,
    slots: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """The ``PenalizeLogits`` protocol; the oracle passes ``compute_dtype`` float64 and a float64 ``out``."""
    num_rows, vocab_size = logits.shape
    values = logits.to(compute_dtype or serving_dtype(logits.dtype), copy=True)
    outputs = torch.arange(num_rows, device=logits.device)
    if slots is not None:
        outputs = (slots >= 0).nonzero().squeeze(1)
        values = values[outputs]
    places = outputs if slots is None else slots[outputs]
    for allowed, rows in ((penalties.allowed, places), (penalties.step_allowed, outputs)):
        if allowed is not None:
            values.masked_fill_(~unpacked(allowed[rows], vocab_size), -torch.inf)
    histories = places if penalties.rows is None else penalties.rows[outputs].to(torch.int64)
    if penalties.bias_indptr is not None:
        _add_bias(values, penalties, places, histories)
    values = _penalised(values, penalties, places, histories)
    if slots is None:
        out.copy_(values)
    else:
        out.copy_(logits)
        out[outputs] = values.to(out.dtype)


def _add_bias(values: Tensor, penalties: PenaltyParams, places: Tensor, histories: Tensor) -> None:
    """Add the entries of ``places`` in place, a row each; entries past the last row's belong to none."""
    indptr, tokens, bias = penalties.bias_indptr, penalties.bias_tokens, penalties.bias_values
    assert indptr is not None and tokens is not None and bias is not None
    begin, end = indptr[places].to(torch.int64), indptr[places + 1].to(torch.int64)
    longest = int((end - begin).max()) if len(places) else 0
    entry = begin.unsqueeze(1) + torch.arange(longest, device=values.device)
    used = entry < end.unsqueeze(1)
    row, entry = used.nonzero()[:, 0], entry[used]
    token, value = tokens[entry].to(torch.int64), bias[entry].to(values.dtype)
    if penalties.bias_until is not None and penalties.history is not None:
        made = penalties.history.num_output[histories[row]]
        value = torch.where(made < penalties.bias_until[entry], -torch.inf, value)
    inside = (token >= 0) & (token < values.shape[1])
    where = (row[inside], token[inside])
    values[where] = values[where] + value[inside]


def _penalised(values: Tensor, penalties: PenaltyParams, places: Tensor, histories: Tensor) -> Tensor:
    def column(values_of_slots: Tensor) -> Tensor:
        return values_of_slots[places].to(values.dtype).unsqueeze(1)

    prompt, output = (
        None if counts is None else counts.index_select(0, histories)
        for counts in (penalties.prompt_counts, penalties.output_counts)
    )
    unfit = None
    if penalties.history is not None:
        seen, output, unfit = dense_counts(penalties.history, histories, values.shape[1])
    else:
        seen = torch.zeros_like(values, dtype=torch.bool)
        for counts in (prompt, output):
            if counts is not None:
                seen |= counts != 0
    if penalties.repetition is not None:
        factor = column(penalties.repetition)
        values = torch.where(seen, torch.where(values > 0, values / factor, values * factor), values)
    if output is None:
        return values
    counted = torch.zeros_like(values[:, :1], dtype=torch.bool)
    for each, amount in ((penalties.frequency, output), (penalties.presence, output > 0)):
        if each is not None:
            values = values - column(each) * amount
            counted |= column(each) != 0
    return values if unfit is None else values.masked_fill(counted & unfit.unsqueeze(1), -torch.inf)
