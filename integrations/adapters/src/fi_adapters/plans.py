"""Plans of layers of one form, made from an engine's limits and updated with its device tensors."""

from __future__ import annotations

from collections.abc import Mapping

import fi_core as fi
import torch

from .forms import LayerForm, Limits, refusal


class PlanPair:
    """``mixed`` serves every step; ``decode`` those whose requests all have few new tokens, for which fi has kernels that
    hold all queries of a request at once.

    Both depend on capacities alone, so a CUDA graph captured for either serves every batch that is padded to it.
    """

    def __init__(self, spec: fi.AttentionSpec, limits: Limits, device: torch.device, one_plan: bool = False) -> None:
        """``one_plan``: every step goes through the same kernel. A spec that is batch-invariant needs it: two kernels differ
        in their rounding, and which one a token meets would depend on the rest of the batch. Raises UnsupportedError."""
        self.decode_len = limits.decode_len
        self.mixed = _plan(spec, limits.capacity(decode=False), device)
        single = one_plan or spec.batch_invariant
        self.decode = self.mixed if single else _plan(spec, limits.capacity(decode=True), device)

    def pick(self, longest: int) -> fi.Plan:
        """The plan for a step whose requests have at most ``longest`` new tokens."""
        return self.decode if longest <= self.decode_len else self.mixed


def update(pairs: Mapping[LayerForm, PlanPair], batch: fi.Batch, longest: int) -> dict[LayerForm, fi.Plan]:
    """Plan ``batch``, whose requests have at most ``longest`` new tokens, for layers of every form; returns the plans that
    they use. With device tensors nothing is copied to the host."""
    plans = {form: pair.pick(longest) for form, pair in pairs.items()}
    for plan in plans.values():
        plan.update(batch)
    return plans


def _plan(spec: fi.AttentionSpec, capacity: fi.Capacity, device: torch.device) -> fi.Plan:
    why_not = refusal(spec, capacity.max_q_len, fi.target_of(device))
    if why_not is not None:
        raise why_not
    return fi.plan(
        spec,
        max_batch=capacity.max_batch,
        max_q_tokens=capacity.max_q_tokens,
        max_q_len=capacity.max_q_len,
        max_kv_len=capacity.max_kv_len,
        device=device,
    )
