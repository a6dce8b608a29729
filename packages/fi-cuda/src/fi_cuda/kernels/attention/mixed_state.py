"""Attention under a plan that has both kernels: the GPU finds from the lengths of a step whether the decode kernel or the prefill
kernel serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from fi_core.plan import attention_request
from fi_core.protocols import AttentionState
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from torch import Tensor

from ...entries import LONG_ATTENTION_ENTRIES, MAX_SHORT_QUERY
from .plan import ShortSteps
from .prefill_state import PrefillState, attention_prefill
from .prefill_tuning import WARPGROUP_ROWS, prefill_tuning_for
from .state import DecodeState, attention_decode
from .tuning import built_in_tuning

_MANY_ROWS, _TALL_ROWS = 32, 64
"""Packed rows of a request up to which the decode kernel reads K and V at the memory's pace, and up to which it is not yet bound
by products alone; in FP8, whose elements the prefill kernel converts, the latter alone matter."""
_FEW, _MANY_WEIGHT, _TALL_WEIGHT = 95, 3, 8
"""What the prefill kernel's tiles weigh with many and with tall rows, and up to which sum they are too few to keep a GPU busy:
the decode kernel is faster with 31 of the former or 11 of the latter (docs/kernels/decode.md)."""


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


def has_long_path(spec: AttentionSpec, capacity: Capacity, device: torch.device) -> bool:
    """Whether the prefill kernel has a part in plans for short queries: those of so many rows and tiles that a step may be bound
    by products, unless they are batch-invariant."""
    steps = _decode_steps(spec, 1)
    if spec.batch_invariant or capacity.max_q_len <= steps.q_len:
        return False
    most_tiles = capacity.max_batch * spec.num_kv_heads * -(-spec.group_size * capacity.max_q_len // WARPGROUP_ROWS)
    if most_tiles * (steps.tall_weight if capacity.max_q_len > steps.tall_q_len else steps.weight) <= steps.most:
        return False
    request = attention_request(spec, MAX_SHORT_QUERY + 1, device)
    return any(not entry.reject(request) for entry in LONG_ATTENTION_ENTRIES)


def _decode_steps(spec: AttentionSpec, tile_tokens: int) -> ShortSteps:
    """The steps that the decode kernel serves under a plan of short queries that has the prefill kernel too."""
    tall = _TALL_ROWS // spec.group_size
    many = tall if spec.kv_is_fp8 else _MANY_ROWS // spec.group_size
    return ShortSteps(many, _FEW, tile_tokens, tall, _MANY_WEIGHT, _TALL_WEIGHT)


def steps_text(steps: ShortSteps) -> str:
    """Which steps the decode kernel serves, for people."""
    many, tall = steps.most // steps.weight, steps.most // steps.tall_weight
    if steps.q_len == steps.tall_q_len:
        return f"steps of at most {tall} tiles in requests of more than {steps.q_len} new tokens"
    text = f"steps of at most {many} tiles in requests of more than {steps.q_len} new tokens"
    return f"{text} ({tall} of more than {steps.tall_q_len})"


class ShortAttention:
    """The ``AttentionKernel`` protocol, for plans of short queries."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        num_bytes = attention_decode.workspace_bytes(spec, capacity, device)
        if not has_long_path(spec, capacity, torch.device(device)):
            return num_bytes
        return num_bytes + attention_prefill.workspace_bytes(spec, capacity, device)

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> AttentionState:
        where = torch.device(device)
        if not has_long_path(spec, capacity, where):
            return attention_decode.plan(spec, capacity, device)
        tile_tokens = prefill_tuning_for(spec, where).kind(spec.group_size).q_rows // spec.group_size
        steps = _decode_steps(spec, tile_tokens)
        short, long = DecodeState(spec, capacity, where, steps), PrefillState(spec, capacity, where, steps)
        return MixedState(short, long, steps_text(steps), steps.q_len)


class MixedAttention:
    """The ``AttentionKernel`` protocol, for plans of long queries."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        num_bytes = attention_prefill.workspace_bytes(spec, capacity, device)
        if not has_short_path(spec):
            return num_bytes
        return num_bytes + attention_decode.workspace_bytes(spec, short_capacity(spec, capacity), device)

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> AttentionState:
        if not has_short_path(spec):
            return attention_prefill.plan(spec, capacity, device)
        where, short = torch.device(device), short_capacity(spec, capacity)
        text = f"steps of at most {short.max_q_len} new tokens a request"
        steps = ShortSteps(short.max_q_len)  # others are beyond the decode kernel's capacity
        return MixedState(
            DecodeState(spec, short, where), PrefillState(spec, capacity, where, steps), text, steps.q_len
        )


class MixedState:
    """The ``AttentionState`` protocol: both kernels' states, of which one has no work in any step. ``steps`` tells which the
    decode kernel serves: all whose requests have at most ``short_q_len`` new tokens, so all of so few rows of q."""

    def __init__(self, short: DecodeState, long: PrefillState, steps: str, short_q_len: int) -> None:
        self._short = short
        self._long = long
        self._steps = steps
        self._short_q_len = short_q_len

    @property
    def workspace(self) -> Sequence[Tensor]:
        return (*self._long.workspace, *self._short.workspace)

    def update(self, batch: Batch) -> None:
        self._short.update(batch)
        self._long.update(batch)

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        # The kernel that usually has more to do starts last, so that the other's end is not waited for after it.
        self._short.run(q, kv, layer, out, lse)
        if q.shape[0] > self._short_q_len:
            self._long.run(q, kv, layer, out, lse)

    def describe(self) -> Sequence[str]:
        return (
            *self._long.describe(),
            f"{self._steps}: the decode kernel, with",
            *(f"  {line}" for line in self._short.describe()),
        )


attention_short = ShortAttention()
attention_mixed = MixedAttention()
"""What the kernel entries load."""
