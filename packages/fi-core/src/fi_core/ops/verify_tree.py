"""Speculative verification of one drafted token tree a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..library import register
from ..sampling import DrawKeys
from .sampling_arguments import KEY_SCHEMA, check_keys, check_tensor, flat_keys
from .verify_chain import check_drafts


def _cases() -> Iterator[Case]:
    from .cases.verify_tree import cases

    return cases()


OPERATION = Operation(
    name="verify_tree",
    summary="walk each drafted token tree along the target's own draws",
    fields={
        "vocab_size": "tokens of the vocabulary",
        "num_draft": "nodes of a tree (columns of draft_tokens)",
    },
    typical={"vocab_size": 128256, "num_draft": 16},
    cases=_cases,
)

_dispatch = Dispatcher("verify_tree", "vocab_size", "num_draft")


def verify_tree(
    draft_tokens: Tensor, parents: Tensor, target_probs: Tensor, keys: DrawKeys
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify drafted trees; return tokens int64 [B, n + 1] (accepted, then one drawn token, then -1), path int32
    [B, n + 1] (accepted nodes in order, then -1) and num_accepted int32 [B].

    draft_tokens int64 [B, n], n >= 1: the nodes' tokens; pad with -1, which nothing matches. parents int32 [B, n]: a
    node's parent node, -1 for children of the root (the last committed token); any order of nodes, and nodes that do
    not descend from the root are never reached. target_probs float32 [B, n + 1, V], not necessarily normalised: row 0
    is the target's distribution after the root, row i + 1 the one after node i. ``keys``: position is that of the
    root's children; a node at depth d draws with position + d.

    From the root, draw from the current node's row with purpose 0 (as ``verify_chain`` without draft_probs does); if a
    child holds the drawn token go to it (to the lowest such node), else the draw is the last token. These are the
    tokens that ``sample`` draws one by one from the same weights, so the output does not depend on the tree. A row
    without usable mass draws -1, which ends the walk. Trees are those of SpecInfer (Miao et al., 2024); the walk is
    lossless by construction. Raises ArgumentError and UnsupportedError.
    """
    num_requests, num_draft, _ = check_drafts(draft_tokens, target_probs)
    device = target_probs.device
    check_tensor("parents", parents, torch.int32, (num_requests, num_draft), device)
    check_keys(keys, num_requests, device)
    tokens = torch.empty((num_requests, num_draft + 1), dtype=torch.int64, device=device)
    path = torch.empty((num_requests, num_draft + 1), dtype=torch.int32, device=device)
    num_accepted = torch.empty(num_requests, dtype=torch.int32, device=device)
    if torch.compiler.is_compiling():
        _OP(draft_tokens, parents, target_probs, *flat_keys(keys), tokens, path, num_accepted)
    else:
        _run(draft_tokens, parents, target_probs, keys, (tokens, path, num_accepted))
    return tokens, path, num_accepted


def _run(
    draft_tokens: Tensor, parents: Tensor, target_probs: Tensor, keys: DrawKeys, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    num_requests, num_draft = draft_tokens.shape
    kernel = _dispatch(target_probs.device, target_probs.shape[2], num_draft)
    if num_requests:
        kernel(draft_tokens, parents, target_probs, keys, *outputs)


def _run_flat(*flat: Any) -> None:
    draft_tokens, parents, target_probs = flat[:3]
    _run(draft_tokens, parents, target_probs, DrawKeys(*flat[3:6]), (flat[6], flat[7], flat[8]))


_OP = register(
    f"verify_tree(Tensor draft_tokens, Tensor parents, Tensor target_probs, {KEY_SCHEMA}, "
    "Tensor(a!) tokens, Tensor(b!) path, Tensor(c!) num_accepted) -> ()",
    _run_flat,
)


def cost(num_requests: int, num_draft: int, vocab_size: int) -> Cost:
    """At least one row of target probabilities read a request, and the tree itself."""
    elements = num_requests * vocab_size
    return Cost(4 * elements + 28 * num_requests * (num_draft + 1), 2 * elements)
