"""Attention of any batch under one plan: steps in which every request has few new tokens go to the decode kernel, all others to
the prefill kernel, as the GPU finds from the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from fi_core.protocols import AttentionState
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from torch import Tensor

from .prefill_state import PrefillState, attention_prefill
from .state import DecodeState, attention_decode
from .tuning import built_in_tuning


def short_capacity(spec: AttentionSpec, capacity: Capacity) -> Capacity:
    """The part of ``capacity`` that the decode kernel serves: as many new tokens a request as cost no more than one, because
    their rows fill a tile that would be there anyway."""
    one = replace(capacity, max_q_tokens=min(capacity.max_batch, capacity.max_q_tokens), max_q_len=1)
    q_len = max(min(built_in_tuning(spec, one).rows // spec.group_size, capacity.max_q_len), 1)
    return replace(one, max_q_tokens=min(capacity.max_batch * q_len, capacity.max_q_tokens), max_q_len=q_len)


def has_short_path(spec: AttentionSpec) -> bool:
    """Whether the decode kernel has a part in plans of ``spec``, for all of which there is a prefill kernel. Not if they are
    batch-invariant: which kernel serves a request would depend on the rest of its batch."""
    rope = spec.rope
    return not spec.batch_invariant and (rope is None or rope.pairs != "half" or rope.rotary_dim % 32 == 0)


class MixedAttention:
    """The ``AttentionKernel`` protocol."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        num_bytes = attention_prefill.workspace_bytes(spec, capacity, device)
        if not has_short_path(spec):
            return num_bytes
        return num_bytes + attention_decode.workspace_bytes(spec, short_capacity(spec, capacity), device)

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> AttentionState:
        if not has_short_path(spec):
            return attention_prefill.plan(spec, capacity, device)
        return MixedState(spec, capacity, torch.device(device))


class MixedState:
    """The ``AttentionState`` protocol: both kernels' states, of which one has no work in any step."""

    def __init__(self, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> None:
        short = short_capacity(spec, capacity)
        self._short = DecodeState(spec, short, device)
        self._long = PrefillState(spec, capacity, device, short.max_q_len)
        self._short_q_len = short.max_q_len

    @property
    def workspace(self) -> Sequence[Tensor]:
        return (*self._long.workspace, *self._short.workspace)

    def update(self, batch: Batch) -> None:
        self._short.update(batch)
        self._long.update(batch)

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        # The kernel that usually has more to do starts last, so that the other's end is not waited for after it.
        self._short.run(q, kv, layer, out, lse)
        self._long.run(q, kv, layer, out, lse)

    def describe(self) -> Sequence[str]:
        return (
            *self._long.describe(),
            f"steps of at most {self._short_q_len} new tokens a request: the decode kernel, with",
            *(f"  {line}" for line in self._short.describe()),
        )


attention_mixed = MixedAttention()
"""What the kernel entry loads."""
