"""Shared prefixes of a batch: the record, and its check where its values are on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import ArgumentError, CapacityError


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of requests whose first KV tokens are the same: a hint that changes the work and nothing in the result.

    ``nodes`` int32 [N, 4], contiguous, on the batch's device: rows (member_begin, member_end, kv_begin, kv_end). The requests
    ``order[member_begin:member_end]`` hold the same keys and values at the positions [kv_begin, kv_end); a kernel reads
    them once, through the table of any member. Two nodes' members are nested or apart; a node stands after those that
    contain its members, and its KV range begins where the innermost of them ends (at 0 without one). So the nodes are
    a forest of any depth, listed with parents first, and what a request shares is [0, kv_end) of its innermost node; the rest,
    which holds at least its new tokens, is its own: kv_end <= kv_len - q_len. Rows without members or without tokens have no
    effect: fill unused ones with 0.

    ``order`` int32 [B]: a permutation of the requests; None: as they stand in the batch.

    Pages that lie wholly within what two requests share must be the same pages in both tables. The page in which a shared
    range ends may be a copy in each. A mask's columns must be "new".

    Batches with levels and batches without (None) have different kernels, so a captured graph serves one of both, for any nodes:
    a batch that shares nothing is replayed in a graph of batches that do with a row of zeros.
    """

    nodes: torch.Tensor
    order: torch.Tensor | None = None

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors with their names."""
        found = [("levels.nodes", self.nodes)]
        return found if self.order is None else [*found, ("levels.order", self.order)]


def check_form(levels: SharedPrefixes, size: int) -> None:
    """Raise ArgumentError unless the tensors have the form that a batch of ``size`` requests needs; reads metadata only."""
    nodes = levels.nodes
    if nodes.dtype != torch.int32 or nodes.dim() != 2 or nodes.shape[1] != 4 or not nodes.is_contiguous():
        raise ArgumentError("batch.levels.nodes", "contiguous int32 [N, 4]", f"{nodes.dtype} {list(nodes.shape)}")
    order = levels.order
    if order is not None and (order.dtype != torch.int32 or order.shape != (size,) or not order.is_contiguous()):
        raise ArgumentError("batch.levels.order", f"contiguous int32 [{size}]", f"{order.dtype} {list(order.shape)}")


def check_values(levels: SharedPrefixes, own_limits: Sequence[int], max_depth: int | None) -> None:
    """Check nodes and order on the host. ``own_limits``: kv_len - q_len of each request. Raises ArgumentError, or CapacityError
    for a request in more than ``max_depth`` nodes."""
    size = len(own_limits)
    order = list(range(size)) if levels.order is None else levels.order.tolist()
    if sorted(order) != list(range(size)):
        raise ArgumentError("batch.levels.order", f"a permutation of 0 to {size - 1}", order)
    depth, shared = [0] * size, [0] * size
    begins, ends = [0] * size, [size] * size  # the innermost node's members so far, at each place of the order
    for row, (begin, end, kv_begin, kv_end) in enumerate(levels.nodes.tolist()):
        where = f"batch.levels.nodes[{row}]"
        if not (0 <= begin <= end <= size and 0 <= kv_begin <= kv_end):
            expected = f"ascending member and KV ranges, members within {size} requests"
            raise ArgumentError(where, expected, [begin, end, kv_begin, kv_end])
        if begin == end or kv_begin == kv_end:
            continue
        if begin < begins[begin] or end > ends[begin] or begins[begin] != begins[end - 1]:
            expected = "members within those of an earlier node, or apart from them"
            raise ArgumentError(where, expected, [begin, end])
        if kv_begin != shared[begin]:
            raise ArgumentError(where, f"kv_begin {shared[begin]}, where the node around it ends", kv_begin)
        room = min(own_limits[request] for request in order[begin:end])
        if kv_end > room:
            raise ArgumentError(where, f"kv_end at most {room}, a member's kv_len - q_len", kv_end)
        for place in range(begin, end):
            depth[place] += 1
            shared[place], begins[place], ends[place] = kv_end, begin, end
        if max_depth is not None and depth[begin] > max_depth:
            raise CapacityError(
                "batch.levels.nodes", f"at most max_prefix_depth={max_depth} around a request", depth[begin]
            )
