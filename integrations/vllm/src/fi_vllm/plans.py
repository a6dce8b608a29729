"""Plans of one KV group: two for each form of its layers, made from capacities and updated with device tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import fi_core as fi
import torch

from .forms import LayerForm, Limits, refusal, spec_of


class GroupPlans:
    """The plans of layers that share a KV cache's form and a block table.

    A step whose requests all have few new tokens goes through a plan of its own, for which fi has kernels that hold all of
    a request's queries at once; every other step through the plan with the full capacity. Both depend on capacities alone,
    so a CUDA graph captured for either serves every batch that is padded to it.
    """

    def __init__(
        self,
        windows: Mapping[LayerForm, Iterable[int | None]],
        dtype: torch.dtype,
        page_size: int,
        limits: Limits,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        """``windows``: the sliding windows of the layers of each form. Raises UnsupportedError for what fi lacks."""
        self.limits = limits
        self._mixed: dict[LayerForm, fi.Plan] = {}
        self._decode: dict[LayerForm, fi.Plan] = {}
        # Two kernels differ in their rounding, and which one a token meets would depend on the rest of the batch.
        one_plan = limits.one_plan or batch_invariant
        for form, found in windows.items():
            spec = spec_of(form, dtype, page_size, found, batch_invariant)
            self._mixed[form] = _plan(spec, limits.capacity(decode=False), device)
            self._decode[form] = self._mixed[form] if one_plan else _plan(spec, limits.capacity(decode=True), device)

    def update(self, batch: fi.Batch, longest: int) -> Mapping[LayerForm, fi.Plan]:
        """Plan ``batch``, whose requests have at most ``longest`` new tokens; returns the plans that its layers use. With
        device tensors nothing is copied to the host."""
        plans = self._decode if longest <= self.limits.decode_len else self._mixed
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
