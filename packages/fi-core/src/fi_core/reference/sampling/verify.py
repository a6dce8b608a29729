"""References of ``verify_chain`` and ``verify_tree``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...random import PURPOSE_ACCEPT, PURPOSE_DRAW, PURPOSE_RESIDUAL, random_bits, scale_bits
from ...sampling import DrawKeys
from .masses import draw, to_mass


def _probability_mass(probs: Tensor) -> Tensor:
    """Masses int64 [B, V] of probabilities; a row with a value outside [0, 2) or NaN has none."""
    usable = ((probs >= 0) & (probs < 2)).all(dim=1, keepdim=True)
    return to_mass(torch.where(usable, probs, 0.0))


def verify_chain(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyChain`` protocol, one step of all requests at a time."""
    num_draft = draft_tokens.shape[1]
    tokens.fill_(-1)
    num_accepted.zero_()
    going = torch.ones_like(num_accepted, dtype=torch.bool)
    for step in range(num_draft + 1):
        target = _probability_mass(target_probs[:, step])
        drafted = _drafted(draft_tokens, step, target_probs.shape[2])
        if draft_probs is None or step == num_draft:
            purpose = PURPOSE_DRAW if draft_probs is None else PURPOSE_RESIDUAL
            token = draw(target, random_bits(keys, purpose, step))
            accepted = (token == drafted) & (drafted >= 0)
        else:
            accepted = _accepted(drafted, draft_probs[:, step], target_probs[:, step], keys, step)
            proposal = _probability_mass(draft_probs[:, step])
            token = torch.where(accepted, drafted, _redrawn(drafted, proposal, target, keys, step))
        tokens[:, step] = torch.where(going, token, -1)
        going &= accepted
        num_accepted += going


def _drafted(draft_tokens: Tensor, step: int, vocab_size: int) -> Tensor:
    """Tokens drafted at ``step``, -1 for those outside the vocabulary and after the last."""
    if step == draft_tokens.shape[1]:
        return draft_tokens.new_full(draft_tokens.shape[:1], -1)
    drafted = draft_tokens[:, step]
    return torch.where(drafted < vocab_size, drafted, -1).clamp(min=-1)


def _accepted(drafted: Tensor, proposal_probs: Tensor, target_probs: Tensor, keys: DrawKeys, step: int) -> Tensor:
    """Whether speculative rejection sampling accepts the tokens drafted at ``step``, from their probabilities [B, V]
    alone."""
    at_draft = drafted.clamp(min=0).unsqueeze(1)
    offered, wanted = (_probability_mass(probs.gather(1, at_draft))[:, 0] for probs in (proposal_probs, target_probs))
    return (drafted >= 0) & (scale_bits(random_bits(keys, PURPOSE_ACCEPT, step), offered) < wanted)


def _redrawn(drafted: Tensor, proposal: Tensor, target: Tensor, keys: DrawKeys, step: int) -> Tensor:
    """The tokens that take the place of rejected ones, from masses [B, V]."""
    residual = (target - proposal).clamp(min=0)
    use_residual = (drafted >= 0) & (residual.sum(dim=1) > 0)
    mass = torch.where(use_residual.unsqueeze(1), residual, target)
    return draw(mass, random_bits(keys, PURPOSE_RESIDUAL, step))


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyTree`` protocol, one level of all requests at a time."""
    num_requests, num_draft = draft_tokens.shape
    tokens.fill_(-1)
    path.fill_(-1)
    num_accepted.zero_()
    request = torch.arange(num_requests, device=draft_tokens.device)
    node = torch.full_like(num_accepted, -1)
    going = torch.ones_like(num_accepted, dtype=torch.bool)
    for depth in range(num_draft + 1):
        mass = _probability_mass(target_probs[request, node.to(torch.int64) + 1])
        token = draw(mass, random_bits(keys, PURPOSE_DRAW, depth))
        tokens[:, depth] = torch.where(going, token, -1)
        child = (parents == node.unsqueeze(1)) & (draft_tokens == token.unsqueeze(1)) & (token >= 0).unsqueeze(1)
        going &= child.any(dim=1)
        if not going.any():
            return
        node = torch.where(going, child.to(torch.int32).argmax(dim=1), node).to(path.dtype)
        path[:, depth] = torch.where(going, node, -1)
        num_accepted += going
