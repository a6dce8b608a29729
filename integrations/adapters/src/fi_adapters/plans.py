"""Plans of layers of one form, made from an engine's limits and updated with its device tensors."""

from __future__ import annotations

from collections.abc import Mapping

import fi_core as fi
import torch
from fi_core.plan import attention_values
from fi_core.registry import registry

from .forms import REFERENCE, LayerForm, Limits, refusal


class PlanPair:
    """``mixed`` serves every step; ``decode`` those whose requests all have few new tokens, for which fi has kernels that
    hold all queries of a request at once; ``shared`` (or None) the same where a step's prefixes were looked for, so that steps
    of few requests keep kernels that know none.

    All depend on capacities alone, so a CUDA graph captured for one serves every batch that is padded to it.
    """

    def __init__(
        self,
        spec: fi.AttentionSpec,
        limits: Limits,
        device: torch.device,
        one_plan: bool = False,
        max_prefixes: int = 0,
        shared: fi.Capacity | None = None,
    ) -> None:
        """``one_plan``: every step goes through the same kernel. A spec that is batch-invariant needs it: two kernels differ
        in their rounding, and which one a token meets would depend on the rest of the batch. ``max_prefixes``: how many
        shared prefixes a batch may name under ``mixed`` and ``decode``; ``shared``: the capacity of that plan. Raises
        UnsupportedError."""
        self.decode_len = limits.decode_len
        self.mixed = _plan(spec, limits.capacity(False, max_prefixes), device)
        single = one_plan or spec.batch_invariant
        self.decode = self.mixed if single else _plan(spec, limits.capacity(True, max_prefixes), device)
        self.shared = None if shared is None else _plan(spec, shared, device)

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


def shares_prefixes(
    spec: fi.AttentionSpec, limits: Limits, target: fi.Target, steps: tuple[bool, ...] = (True, False)
) -> bool:
    """Whether fi reads a prefix that requests share once, in every step of such layers, and by the backend that serves the steps
    that share nothing: those take the same kernels then, and shall not lose by it. ``steps``: of those that only decode
    (True), or of others (False). Raises UnsupportedError where nothing serves such layers at all."""
    if spec.batch_invariant:
        return False  # who shares a prefix is the rest of the batch
    lengths = [limits.capacity(decode).max_q_len for decode in steps]
    if any(refusal(spec, length, target, levels=True) is not None for length in lengths):
        return False
    select, request = registry().select, registry().operations["attention"].request
    chosen = [
        [select(request(target, **attention_values(spec, length, levels))).entry.backend for length in lengths]
        for levels in (False, True)
    ]
    return chosen[0] == chosen[1]


def finds_prefixes(target: fi.Target, max_depth: int) -> bool:
    """Whether what requests share is found from a dense table at ``target`` without waiting for the device, where it is a GPU."""
    request = registry().operations["find_shared_prefixes"].request(target, table="dense", max_depth=max_depth)
    try:
        chosen = registry().select(request)
    except fi.UnsupportedError:
        return False
    return chosen.entry.backend != REFERENCE or target.device_type == "cpu"


def common_prefix(num_requests: int, num_tokens: int, device: torch.device) -> fi.SharedPrefixes:
    """The first ``num_requests`` requests of a batch share their first ``num_tokens`` tokens. Nothing waits for the device."""
    pinned = device.type == "cuda"
    nodes = torch.tensor([[0, num_requests, 0, num_tokens]], dtype=torch.int32, pin_memory=pinned)
    return fi.SharedPrefixes(nodes.to(device, non_blocking=pinned))


def _plan(spec: fi.AttentionSpec, capacity: fi.Capacity, device: torch.device) -> fi.Plan:
    why_not = refusal(spec, capacity.max_q_len, fi.target_of(device), capacity.max_prefixes > 0)
    if why_not is not None:
        raise why_not
    return fi.plan(
        spec,
        max_batch=capacity.max_batch,
        max_q_tokens=capacity.max_q_tokens,
        max_q_len=capacity.max_q_len,
        max_kv_len=capacity.max_kv_len,
        max_prefixes=capacity.max_prefixes,
        max_prefix_depth=capacity.max_prefix_depth,
        device=device,
    )
