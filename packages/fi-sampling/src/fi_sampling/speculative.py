"""Speculative verification on logits under the requests' own parameters.

Without draft probabilities the target's draws are made for every row in one call and then matched, so the output equals
non-speculative sampling token for token, whatever the pipeline holds. With them a chain goes through
``fi_core.verify_chain`` (rejection sampling), whose output follows the target's distribution. Penalties and min_tokens
of a row count the drafted tokens that the row assumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import fi_core as fi
import torch
from fi_core import ArgumentError, DrawKeys
from torch import Tensor

from .builtin import DRAW, SOFTMAX
from .pipeline import Pipeline, Step
from .state import SamplingState


@dataclass(frozen=True)
class ChainVerdict:
    """``tokens`` int64 [N, n + 1]: accepted drafts, then one drawn token, then -1; ``num_accepted`` int32 [N]."""

    tokens: Tensor
    num_accepted: Tensor


@dataclass(frozen=True)
class TreeVerdict:
    """``tokens`` and ``num_accepted`` as in ChainVerdict; ``path`` int32 [N, n + 1]: accepted nodes, then -1."""

    tokens: Tensor
    path: Tensor
    num_accepted: Tensor


def verify_chain(
    state: SamplingState,
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
) -> ChainVerdict:
    """Verify draft_tokens int64 [N, n] (-1 pads the end) with the target's logits [N, n + 1, V]; positions int64 [N] of
    the first drafted tokens; draft_probs float32 [N, n, V]: what the drafts were drawn from. Device work only;
    ``record`` the tokens afterwards. With draft_probs the state's pipeline must end in the built-in draw."""
    num_requests, num_draft = _check_shapes(state, logits, slots, draft_tokens)
    device = logits.device
    parents = torch.arange(-1, num_draft - 1, device=device).expand(num_requests, -1)
    ancestry = torch.ones((num_draft, num_draft), dtype=torch.bool, device=device).tril().expand(num_requests, -1, -1)
    step = _step(state, slots, positions, draft_tokens, ancestry)
    if draft_probs is not None:
        probs = _probabilities(state.pipeline)(logits.flatten(0, 1), step).view(logits.shape)
        keys = Step(step.filters, step.penalties, DrawKeys(step.keys.seed, step.keys.sample, positions), slots).row_keys
        return ChainVerdict(*fi.verify_chain(draft_tokens, draft_probs, probs, keys))
    draws = state.pipeline(logits.flatten(0, 1), step).view(num_requests, num_draft + 1)
    verdict = _match(draws, draft_tokens, parents, ancestry)
    return ChainVerdict(verdict.tokens, verdict.num_accepted)


def verify_tree(
    state: SamplingState, logits: Tensor, slots: Tensor, positions: Tensor, draft_tokens: Tensor, parents: Tensor
) -> TreeVerdict:
    """Verify trees of draft_tokens int64 [N, n] (pad with -1) with parents int32 [N, n] (-1: child of the root) and the
    target's logits [N, n + 1, V] (row 0 after the root, row i + 1 after node i); positions int64 [N] of the root's
    children. Nodes that do not descend from the root, or whose parent is none, are never reached. Gives what
    ``fi_core.verify_tree`` gives on the filtered distributions. Device work only."""
    _check_shapes(state, logits, slots, draft_tokens)
    if parents.dtype != torch.int32 or parents.shape != draft_tokens.shape:
        raise ArgumentError("parents", f"int32 {tuple(draft_tokens.shape)}", f"{parents.dtype} {tuple(parents.shape)}")
    # A parent that does not exist becomes the node itself, from where there is no way to the root.
    nodes = torch.arange(parents.shape[1], device=parents.device)
    parents = torch.where((parents < -1) | (parents >= nodes.shape[0]), nodes, parents.to(torch.int64))
    ancestry = _ancestry(parents)
    step = _step(state, slots, positions, draft_tokens, ancestry)
    draws = state.pipeline(logits.flatten(0, 1), step).view(logits.shape[:2])
    return _match(draws, draft_tokens, parents, ancestry)


def _check_shapes(state: SamplingState, logits: Tensor, slots: Tensor, draft_tokens: Tensor) -> tuple[int, int]:
    num_requests = slots.shape[0]
    if draft_tokens.dtype != torch.int64 or draft_tokens.dim() != 2 or draft_tokens.shape[0] != num_requests:
        actual = f"{draft_tokens.dtype} {tuple(draft_tokens.shape)}"
        raise ArgumentError("draft_tokens", f"int64 [{num_requests}, drafted tokens]", actual)
    num_draft = draft_tokens.shape[1]
    shape = (num_requests, num_draft + 1, state.columns.vocab_size)
    if tuple(logits.shape) != shape:
        raise ArgumentError("logits", f"shape {shape}", tuple(logits.shape))
    return num_requests, num_draft


def _ancestry(parents: Tensor) -> Tensor:
    """bool [N, n, n]: node j is node i or above it, for parents int64 [N, n]. Paths double in length with each
    squaring."""
    num_nodes = parents.shape[1]
    nodes = torch.arange(num_nodes, device=parents.device)
    reached = (parents.unsqueeze(2) == nodes) | (nodes.unsqueeze(1) == nodes)
    for _ in range(max(num_nodes - 1, 0).bit_length()):
        counts = reached.to(torch.float32)
        reached = counts @ counts > 0
    return reached


def _step(state: SamplingState, slots: Tensor, positions: Tensor, draft_tokens: Tensor, ancestry: Tensor) -> Step:
    """The parameters of all rows, N * (n + 1): row 0 of a request assumes no draft, row i + 1 node i and those above
    it. Drafts that are padding (-1) or no token count as none."""
    num_draft = draft_tokens.shape[1]
    assumed = torch.cat([torch.zeros_like(draft_tokens).unsqueeze(1).bool(), ancestry], dim=1)
    drafted = torch.where(assumed, draft_tokens.unsqueeze(1), -1).flatten(0, 1)
    rows = slots.unsqueeze(1).expand(-1, num_draft + 1).reshape(-1)
    places = (positions.unsqueeze(1) + assumed.sum(dim=2)).flatten()
    return state.step(rows, places, drafted=drafted)


def _match(draws: Tensor, draft_tokens: Tensor, parents: Tensor, ancestry: Tensor) -> TreeVerdict:
    """Walk from the root along draws int64 [N, n + 1] without a loop: a node is accepted when it and all nodes above it
    hold their parent's draw, each as the first of its siblings to do so, and the topmost is a child of the root."""
    num_draft = draft_tokens.shape[1]
    wanted = draws.gather(1, parents + 1)
    holds = (draft_tokens == wanted) & (draft_tokens >= 0)
    same_parent = parents.unsqueeze(2) == parents.unsqueeze(1)
    earlier = torch.ones((num_draft, num_draft), dtype=torch.bool, device=draws.device).tril(-1)
    first = holds & ~(same_parent & earlier & holds.unsqueeze(1)).any(dim=2)
    rooted = (ancestry & (parents < 0).unsqueeze(1)).any(dim=2)
    accepted = rooted & ~(ancestry & ~first.unsqueeze(1)).any(dim=2)
    num_accepted = accepted.sum(dim=1)
    # A spare last column takes the nodes that are not accepted.
    place = torch.where(accepted, ancestry.sum(dim=2) - 1, num_draft)
    nodes = torch.arange(num_draft, device=draws.device).expand_as(draft_tokens)
    path = draws.new_full(draws.shape, -1).scatter_(1, place, nodes)
    path[:, num_draft] = -1
    # The draw after k accepted nodes is that of the k-th node's row, and the accepted tokens are draws too.
    rows = torch.cat([torch.zeros_like(path[:, :1]), path[:, :num_draft] + 1], dim=1)
    depth = torch.arange(num_draft + 1, device=draws.device)
    tokens = torch.where(depth <= num_accepted.unsqueeze(1), draws.gather(1, rows), -1)
    return TreeVerdict(tokens, path.to(torch.int32), num_accepted.to(torch.int32))


@lru_cache(maxsize=16)
def _probabilities(pipeline: Pipeline) -> Pipeline:
    """The pipeline with its draw replaced by a softmax."""
    if pipeline.ops[-1] != DRAW:
        raise ArgumentError("state.pipeline", "a pipeline that ends in the built-in draw", pipeline.ops[-1].name)
    return Pipeline((*pipeline.ops[:-1], SOFTMAX), pipeline.rules)
