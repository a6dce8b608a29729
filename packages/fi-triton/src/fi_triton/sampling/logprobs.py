"""Log-softmax at a chosen token and at the most likely ones; the latter are found by ``top_k`` first."""

from __future__ import annotations

import triton
import triton.language as tl
from fi_core.sampling import LogprobsOut
from torch import Tensor

from ..launch import on_device
from .rows import scan_row
from .top_k import top_k

BLOCK = 1024
NUM_WARPS = 16


@triton.jit
def logprobs_kernel(
    logits_ptr,
    tokens_ptr,
    chosen_ptr,
    values_ptr,  # holds the logits of the top tokens; read and replaced
    logits_stride,
    values_stride,
    vocab_size,
    top_n,
    TOP_N: tl.constexpr,  # power of 2, at least top_n; 0 for none
    BLOCK: tl.constexpr,
):
    """A NaN, +inf, or a row without a finite logit makes the sum, hence every log-probability, NaN."""
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + index * logits_stride
    largest, _, _ = scan_row(row_ptr, vocab_size, 4 * BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(row_ptr + place, mask=place < vocab_size, other=float("-inf")).to(tl.float32)
        sums += tl.where(place < vocab_size, tl.exp(logit - largest), 0.0)
    log_sum = tl.log(tl.sum(sums, axis=0))
    token = tl.load(tokens_ptr + index)
    inside = (token >= 0) & (token < vocab_size)
    logit = tl.load(row_ptr + tl.where(inside, token, 0)).to(tl.float32)
    tl.store(chosen_ptr + index, tl.where(inside, logit - largest - log_sum, float("-inf")))
    if TOP_N > 0:
        place = tl.arange(0, TOP_N)
        target = values_ptr + index * values_stride + place
        top = tl.load(target, mask=place < top_n, other=0.0)
        tl.store(target, top - largest - log_sum, mask=place < top_n)


def logprobs(logits: Tensor, tokens: Tensor, out: LogprobsOut) -> None:
    """The ``Logprobs`` protocol; top_n up to ``top_k``'s MAX_K."""
    num_rows, vocab_size = logits.shape
    top_n = out.values.shape[1]
    if top_n:
        top_k(logits, out.values, out.indices)
    with on_device(logits.device):
        logprobs_kernel[(num_rows,)](
            logits,
            tokens,
            out.chosen,
            out.values,
            logits.stride(0),
            out.values.stride(0),
            vocab_size,
            top_n,
            TOP_N=triton.next_power_of_2(top_n) if top_n else 0,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
