"""Verification of speculative drafts (chain and tree), one program a request; fi_core's operations define the result.

Without draft probabilities each step draws from the target's row and goes on while the draw is drafted. With them a chain
follows speculative rejection sampling (Leviathan et al., 2023, section 2.3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from fi_core.sampling import DrawKeys
from torch import Tensor

from ..launch import on_device
from .philox import random_bits, scale_bits

BLOCK = 1024
NUM_WARPS = 16

_DRAW = tl.constexpr(0)
_ACCEPT = tl.constexpr(1)
_RESIDUAL = tl.constexpr(2)


@triton.jit
def _probabilities(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(row_ptr + token, mask=token < vocab_size, other=0.0)


@triton.jit
def _probability_mass(probability):
    """int64(p * 2^32) of 0 <= p < 2, else 0."""
    legal = (probability >= 0.0) & (probability < 2.0)
    return (tl.where(legal, probability, 0.0) * 4294967296.0).to(tl.int64)


@triton.jit
def _is_illegal(probability):
    """1 where a value makes its row unusable (NaN, negative, 2 or more), else 0; int32."""
    return 1 - ((probability >= 0.0) & (probability < 2.0)).to(tl.int32)


@triton.jit
def _row_total(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """Mass of a row, 0 if it holds an illegal value."""
    sums = tl.zeros((BLOCK,), tl.int64)
    illegal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        _, probability = _probabilities(row_ptr, start, vocab_size, BLOCK)
        sums += _probability_mass(probability)
        illegal = illegal | _is_illegal(probability)
    return tl.where(tl.max(illegal, axis=0) == 0, tl.sum(sums, axis=0), 0)


@triton.jit
def _draw(target_ptr, proposal_ptr, goal, vocab_size, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """The first token whose inclusive cumulative mass exceeds ``goal`` (below the total): of the target's row, or with
    RESIDUAL of max(target - proposal, 0)."""
    found = tl.full((), -1, tl.int32)
    carry = tl.full((), 0, tl.int64)
    start = tl.full((), 0, tl.int32)
    while (found < 0) & (start < vocab_size):
        token, probability = _probabilities(target_ptr, start, vocab_size, BLOCK)
        mass = _probability_mass(probability)
        if RESIDUAL:
            _, proposed = _probabilities(proposal_ptr, start, vocab_size, BLOCK)
            mass = tl.maximum(mass - _probability_mass(proposed), 0)
        total = tl.sum(mass, axis=0)
        if carry + total > goal:
            cumulative = carry + tl.cumsum(mass, axis=0)
            found = tl.min(tl.where(cumulative > goal, token, 0x7FFFFFFF), axis=0)
        carry += total
        start += BLOCK
    return found


@triton.jit
def _draw_from_row(row_ptr, seed, position, sample, purpose, vocab_size, BLOCK: tl.constexpr):
    """A token of the row's distribution, int32; -1 if the row is unusable."""
    total = _row_total(row_ptr, vocab_size, BLOCK)
    token = tl.full((), -1, tl.int32)
    if total > 0:
        hi, lo = random_bits(seed, position, sample, purpose)
        token = _draw(row_ptr, row_ptr, scale_bits(hi, lo, total), vocab_size, False, BLOCK)
    return token


@triton.jit
def _residual_totals(target_ptr, proposal_ptr, vocab_size, BLOCK: tl.constexpr):
    """(target's mass, residual mass, whether the proposal's row is usable); masses 0 if the target's row is unusable."""
    totals = tl.zeros((BLOCK,), tl.int64)
    residuals = tl.zeros((BLOCK,), tl.int64)
    bad_target = tl.zeros((BLOCK,), tl.int32)
    bad_proposal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        _, probability = _probabilities(target_ptr, start, vocab_size, BLOCK)
        _, proposed = _probabilities(proposal_ptr, start, vocab_size, BLOCK)
        mass = _probability_mass(probability)
        totals += mass
        residuals += tl.maximum(mass - _probability_mass(proposed), 0)
        bad_target = bad_target | _is_illegal(probability)
        bad_proposal = bad_proposal | _is_illegal(proposed)
    usable = tl.max(bad_target, axis=0) == 0
    total = tl.where(usable, tl.sum(totals, axis=0), 0)
    residual = tl.where(usable, tl.sum(residuals, axis=0), 0)
    return total, residual, tl.max(bad_proposal, axis=0) == 0


@triton.jit
def _accept_or_redraw(target_ptr, proposal_ptr, drafted, seed, position, sample, vocab_size, BLOCK: tl.constexpr):
    """(token, whether it is the drafted one accepted) of one step of rejection sampling; ``drafted`` -1 is rejected."""
    is_token = drafted >= 0
    at_draft = tl.maximum(drafted, 0)
    wanted = _probability_mass(tl.load(target_ptr + at_draft))
    offered = _probability_mass(tl.load(proposal_ptr + at_draft))
    hi, lo = random_bits(seed, position, sample, _ACCEPT)
    accepted = is_token & (scale_bits(hi, lo, offered) < wanted)
    token = drafted
    if accepted == 0:
        total, residual, proposal_usable = _residual_totals(target_ptr, proposal_ptr, vocab_size, BLOCK)
        hi, lo = random_bits(seed, position, sample, _RESIDUAL)
        token = tl.full((), -1, tl.int32)
        if is_token & proposal_usable & (residual > 0):
            token = _draw(target_ptr, proposal_ptr, scale_bits(hi, lo, residual), vocab_size, True, BLOCK)
        elif total > 0:
            token = _draw(target_ptr, proposal_ptr, scale_bits(hi, lo, total), vocab_size, False, BLOCK)
    return token, accepted


@triton.jit
def verify_chain_kernel(
    draft_ptr,
    draft_probs_ptr,  # or None
    target_probs_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    tokens_ptr,
    num_accepted_ptr,
    draft_stride,
    draft_probs_stride_b,
    draft_probs_stride_n,
    target_probs_stride_b,
    target_probs_stride_n,
    tokens_stride,
    num_draft,
    vocab_size,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    seed, sample, position = tl.load(seed_ptr + request), tl.load(sample_ptr + request), tl.load(position_ptr + request)
    target_ptr = target_probs_ptr + request * target_probs_stride_b
    going = tl.full((), 1, tl.int32)
    num_accepted = tl.full((), 0, tl.int32)
    for step in range(0, num_draft + 1):
        token = tl.full((), -1, tl.int32)
        if going == 1:
            row_ptr = target_ptr + tl.cast(step, tl.int64) * target_probs_stride_n
            drafted = tl.load(draft_ptr + request * draft_stride + step, mask=step < num_draft, other=-1)
            drafted = tl.where((drafted >= 0) & (drafted < vocab_size), drafted, -1).to(tl.int32)
            if draft_probs_ptr is None:
                token = _draw_from_row(row_ptr, seed, position + step, sample, _DRAW, vocab_size, BLOCK)
                going = ((token == drafted) & (drafted >= 0)).to(tl.int32)
            else:
                if step < num_draft:
                    proposal_ptr = draft_probs_ptr + request * draft_probs_stride_b
                    proposal_ptr += tl.cast(step, tl.int64) * draft_probs_stride_n
                    token, accepted = _accept_or_redraw(
                        row_ptr, proposal_ptr, drafted, seed, position + step, sample, vocab_size, BLOCK
                    )
                    going = accepted.to(tl.int32)
                else:
                    token = _draw_from_row(row_ptr, seed, position + step, sample, _RESIDUAL, vocab_size, BLOCK)
                    going = tl.full((), 0, tl.int32)
            num_accepted += going
        tl.store(tokens_ptr + request * tokens_stride + step, token.to(tl.int64))
    tl.store(num_accepted_ptr + request, num_accepted)


@triton.jit
def verify_tree_kernel(
    draft_ptr,
    parents_ptr,
    target_probs_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    tokens_ptr,
    path_ptr,
    num_accepted_ptr,
    draft_stride,
    parents_stride,
    target_probs_stride_b,
    target_probs_stride_n,
    tokens_stride,
    path_stride,
    num_draft,
    vocab_size,
    NODES: tl.constexpr,  # power of 2, at least num_draft
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    seed, sample, position = tl.load(seed_ptr + request), tl.load(sample_ptr + request), tl.load(position_ptr + request)
    target_ptr = target_probs_ptr + request * target_probs_stride_b
    nodes = tl.arange(0, NODES)
    held = tl.load(draft_ptr + request * draft_stride + nodes, mask=nodes < num_draft, other=-1)
    parents = tl.load(parents_ptr + request * parents_stride + nodes, mask=nodes < num_draft, other=-2)
    node = tl.full((), -1, tl.int32)
    going = tl.full((), 1, tl.int32)
    num_accepted = tl.full((), 0, tl.int32)
    for depth in range(0, num_draft + 1):
        token = tl.full((), -1, tl.int32)
        if going == 1:
            row_ptr = target_ptr + (node + 1).to(tl.int64) * target_probs_stride_n
            token = _draw_from_row(row_ptr, seed, position + depth, sample, _DRAW, vocab_size, BLOCK)
            child = tl.min(tl.where((parents == node) & (held == token) & (held >= 0), nodes, NODES), axis=0)
            going = (child < NODES).to(tl.int32)
            node = tl.where(going == 1, child, -1)
            num_accepted += going
        tl.store(tokens_ptr + request * tokens_stride + depth, token.to(tl.int64))
        tl.store(path_ptr + request * path_stride + depth, tl.where(going == 1, node, -1))
    tl.store(num_accepted_ptr + request, num_accepted)


def verify_chain(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyChain`` protocol; each step reads one row of target_probs (and draft_probs) at most twice."""
    num_requests, num_draft = draft_tokens.shape
    draft_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    with on_device(target_probs.device):
        verify_chain_kernel[(num_requests,)](
            draft_tokens,
            draft_probs,
            target_probs,
            keys.seed,
            keys.sample,
            keys.position,
            tokens,
            num_accepted,
            draft_tokens.stride(0),
            *draft_strides,
            *target_probs.stride()[:2],
            tokens.stride(0),
            num_draft,
            target_probs.shape[2],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyTree`` protocol; each accepted node reads one row of target_probs at most twice."""
    num_requests, num_draft = draft_tokens.shape
    with on_device(target_probs.device):
        verify_tree_kernel[(num_requests,)](
            draft_tokens,
            parents,
            target_probs,
            keys.seed,
            keys.sample,
            keys.position,
            tokens,
            path,
            num_accepted,
            draft_tokens.stride(0),
            parents.stride(0),
            *target_probs.stride()[:2],
            tokens.stride(0),
            path.stride(0),
            num_draft,
            target_probs.shape[2],
            NODES=triton.next_power_of_2(num_draft),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
