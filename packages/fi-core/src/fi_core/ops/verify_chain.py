"""Speculative verification of one drafted chain a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import DrawKeys
from .sampling_arguments import KEY_SCHEMA, MAX_VOCAB, check_keys, check_tensor, flat_keys


def _cases() -> Iterator[Case]:
    from .cases.verify_chain import cases

    return cases()


OPERATION = Operation(
    name="verify_chain",
    summary="accept a prefix of each drafted chain and draw the token after it",
    fields={
        "vocab_size": "tokens of the vocabulary",
        "num_draft": "drafted tokens a request (columns of draft_tokens)",
        "has_draft_probs": "True: rejection sampling against the draft's distribution; False: draw, then match",
    },
    typical={"vocab_size": 128256, "num_draft": 4, "has_draft_probs": False},
    cases=_cases,
)

_dispatch = Dispatcher("verify_chain", "vocab_size", "num_draft", "has_draft_probs")


def check_drafts(draft_tokens: Tensor, target_probs: Tensor) -> tuple[int, int, int]:
    """Raise ArgumentError unless the tensors have shapes [B, n] and [B, n + 1, V]; return (B, n, V)."""
    if draft_tokens.dim() != 2:
        raise ArgumentError("draft_tokens", "shape [requests, drafted tokens]", tuple(draft_tokens.shape))
    num_requests, num_draft = draft_tokens.shape
    if target_probs.dim() != 3 or not 1 <= target_probs.shape[2] <= MAX_VOCAB:
        expected = f"shape [requests, drafted tokens + 1, vocabulary of 1 to {MAX_VOCAB}]"
        raise ArgumentError("target_probs", expected, tuple(target_probs.shape))
    vocab_size = target_probs.shape[2]
    device = target_probs.device
    check_tensor("draft_tokens", draft_tokens, torch.int64, (num_requests, num_draft), device)
    check_tensor("target_probs", target_probs, torch.float32, (num_requests, num_draft + 1, vocab_size), device)
    return num_requests, num_draft, vocab_size


def verify_chain(
    draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor, keys: DrawKeys
) -> tuple[Tensor, Tensor]:
    """Verify drafted chains; return tokens int64 [B, n + 1] (accepted, then one drawn token, then -1) and num_accepted
    int32 [B].

    draft_tokens int64 [B, n]; the first token outside [0, V) (pad with -1) ends a chain. target_probs float32
    [B, n + 1, V]: row i is the target's distribution at draft i, row n the one after the last. draft_probs float32
    [B, n, V] or None. ``keys``: position is that of the first drafted token; step i uses position + i. Probabilities
    become fixed-point mass int64(p * 2^32), as in ``sample``; a NaN or a value outside [0, 2) has none, and a row of
    target_probs with one, or without mass, draws -1, which ends the row.

    Without draft_probs: draw from row i with the key of position + i and purpose 0; while the draw equals draft i go
    on, else it is the last token. These are the tokens that ``sample`` draws one by one from the same weights. Rows
    need not be normalised.

    With draft_probs: speculative rejection sampling (Leviathan et al., 2023, section 2.3). Draft i is accepted iff
    floor(R * q / 2^62) < p, p and q its masses in target and draft (rows must sum to 1) and R the random number of
    purpose 1 at position + i: of a row whose token is accepted nothing else is read. On rejection the token is drawn
    with purpose 2 from the residual masses max(p - q, 0) (from p when no residual mass is left, or a value of the
    draft's row has no mass as above); after a fully accepted chain it is drawn with purpose 2 from the row after it.
    The output follows the target's distribution whatever the draft's is.

    Raises ArgumentError and UnsupportedError.
    """
    num_requests, num_draft, vocab_size = check_drafts(draft_tokens, target_probs)
    check_keys(keys, num_requests, target_probs.device)
    if draft_probs is not None:
        shape = (num_requests, num_draft, vocab_size)
        check_tensor("draft_probs", draft_probs, torch.float32, shape, target_probs.device)
    tokens = torch.empty((num_requests, num_draft + 1), dtype=torch.int64, device=target_probs.device)
    num_accepted = torch.empty(num_requests, dtype=torch.int32, device=target_probs.device)
    if torch.compiler.is_compiling():
        _OP(draft_tokens, draft_probs, target_probs, *flat_keys(keys), tokens, num_accepted)
    else:
        _run(draft_tokens, draft_probs, target_probs, keys, (tokens, num_accepted))
    return tokens, num_accepted


def _run(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    keys: DrawKeys,
    outputs: tuple[Tensor, Tensor],
) -> None:
    num_requests, num_draft = draft_tokens.shape
    kernel = _dispatch(target_probs.device, target_probs.shape[2], num_draft, draft_probs is not None)
    if num_requests:
        kernel(draft_tokens, draft_probs, target_probs, keys, *outputs)


def _run_flat(*flat: Any) -> None:
    draft_tokens, draft_probs, target_probs = flat[:3]
    _run(draft_tokens, draft_probs, target_probs, DrawKeys(*flat[3:6]), (flat[6], flat[7]))


_OP = register(
    f"verify_chain(Tensor draft_tokens, Tensor? draft_probs, Tensor target_probs, {KEY_SCHEMA}, "
    "Tensor(a!) tokens, Tensor(b!) num_accepted) -> ()",
    _run_flat,
)


def cost(num_requests: int, num_draft: int, vocab_size: int, has_draft_probs: bool) -> Cost:
    """One row of target probabilities (and of draft probabilities) read a request: the draw that ends its chain."""
    elements = num_requests * vocab_size * (2 if has_draft_probs else 1)
    return Cost(4 * elements + 16 * num_requests * (num_draft + 1), 2 * elements)
