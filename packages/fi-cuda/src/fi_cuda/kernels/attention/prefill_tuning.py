"""Tiles, rings and costs of the prefill kernel: built-in rules, which the hook ``fi_tuning`` may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from fi_core.contract import target_of
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec, Capacity
from fi_core.registry import registry
from fi_scheduler.partition import UNLIMITED_ROWS, PartitionParams, TileKind, plan_params

from .tuning import HOPPER_SHARED_BYTES, shared_limit

TUNED_OP = "attention_prefill"
"""What ``fi_tuning`` is asked for."""

WARPGROUP_ROWS = 64
MAX_GROUP = 64
"""Query heads of a KV head: a token's lie in one warpgroup's rows."""

BOX_ROW_BYTES = 128
MAX_PIECES = 16
_PATTERN_TOKENS = 8
_ITEM_BYTES = 64
_BARRIER_BYTES = 512
_ALIGNMENT = 1024
_NARROW_HEAD_DIM = 128
_MAX_TOKENS = 128  # where rows are copied one by one, a thread looks up the page of one row of eight


@dataclass(frozen=True)
class PrefillTuning:
    """``consumers``: warpgroups of 64 packed query rows; ``tokens``: keys a step; ``edge_tokens``: unit of the keys of an
    item's first step; ``key_stages``, ``value_stages`` and ``query_stages`` of the rings; ``ping_pong``: warpgroups take turns in
    starting products; ``overlap``: a step's scores are started before the values of the step before, else ``parts`` of a step's
    weights are each computed beside the values of the part before; ``polynomials``: of every 8 exponentials, those not left to
    the special unit; ``keys_ahead``: a step's keys are copied before the values of the step before, else after them;
    ``pieces``: of a tile that is left after whole rounds of tiles, at most; costs as in TileKind, in any common unit."""

    consumers: int
    tokens: int
    edge_tokens: int
    key_stages: int
    value_stages: int
    query_stages: int
    ping_pong: bool
    overlap: bool
    parts: int
    polynomials: int
    keys_ahead: bool
    pieces: int
    item_cost: int
    step_cost: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("consumers", (1, 2, 3, 4)),
            ("tokens", tuple(range(16, _MAX_TOKENS + 1, 16))),
            ("edge_tokens", tuple(size for size in range(16, self.tokens + 1, 16) if self.tokens % size == 0)),
            ("ping_pong", (False, True)),
            ("overlap", (False, True)),
            ("polynomials", tuple(range(9))),
            ("keys_ahead", (False, True)),
            ("pieces", tuple(range(1, MAX_PIECES + 1))),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"tuning.{name}", f"one of {allowed}", getattr(self, name))
        for name in ("key_stages", "value_stages", "query_stages", "parts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ArgumentError(f"tuning.{name}", "an int of at least 1", getattr(self, name))

    @property
    def slot_rows(self) -> int:
        return self.consumers * WARPGROUP_ROWS

    def kind(self, group_size: int) -> TileKind:
        """The only kind of q tile: as many whole tokens as the warpgroups hold."""
        rows = self.consumers * (WARPGROUP_ROWS // group_size * group_size)
        return TileKind(rows, self.tokens, UNLIMITED_ROWS, self.item_cost, self.step_cost)


def box_tokens(page_size: int | None, tokens: int) -> int | None:
    """Tokens of a copy: a step's, or those of a page where it is smaller; None where pages and steps do not fit into each
    other, or a copy would not begin where the swizzle's pattern does."""
    size = tokens if page_size is None else page_size
    fits = size % tokens == 0 or tokens % size == 0
    box = min(size, tokens)
    return box if fits and box % _PATTERN_TOKENS == 0 else None


def prefill_shared_bytes(tuning: PrefillTuning, head_dim: int, head_dim_vo: int, element_bytes: int) -> int:
    """Shared memory of a block: rings of queries, keys and values, items and barriers, and what aligning them may take."""
    key_columns, value_columns = (-(-dim * element_bytes // BOX_ROW_BYTES) for dim in (head_dim, head_dim_vo))
    queries = tuning.query_stages * tuning.slot_rows * key_columns
    rings = tuning.tokens * (tuning.key_stages * key_columns + tuning.value_stages * value_columns)
    items = 2 * tuning.query_stages * _ITEM_BYTES
    return (queries + rings) * BOX_ROW_BYTES + items + _BARRIER_BYTES + _ALIGNMENT


def prefill_tuning_for(spec: AttentionSpec, device: torch.device) -> PrefillTuning:
    """The parameters for a plan. Raises ArgumentError for unknown names or values in what
    ``fi_tuning`` returns, and for tiles that do not fit the pages or the shared memory."""
    limit = shared_limit(device)
    built_in = built_in_prefill_tuning(spec, limit)
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    if not given:
        return built_in
    names = [item.name for item in fields(PrefillTuning)]
    unknown = set(given) - set(names)
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
    tuning = replace(built_in, **given)
    size = prefill_shared_bytes(tuning, spec.head_dim, spec.head_dim_vo or 0, spec.dtype.itemsize)
    if size > limit:
        raise ArgumentError("tuning.key_stages", f"rings that fit into {limit} bytes", size)
    return tuning


def built_in_prefill_tuning(spec: AttentionSpec, limit: int = HOPPER_SHARED_BYTES) -> PrefillTuning:
    """Three warpgroups, each a step at a time, where the registers of a thread hold the scores of 128 keys beside its output;
    else two, whose steps overlap (docs/kernels/prefill.md)."""
    head_dim_vo = spec.head_dim_vo or 0
    widest = max(spec.head_dim, head_dim_vo)
    tokens, edge_tokens = (128, 32) if head_dim_vo <= _NARROW_HEAD_DIM else (64, 32)
    boxes = spec.kv_dtype == spec.dtype and box_tokens(spec.page_size, tokens) is not None
    three = widest <= _NARROW_HEAD_DIM and boxes
    tuning = PrefillTuning(
        consumers=3 if three else 2,
        tokens=tokens,
        edge_tokens=edge_tokens,
        key_stages=2 if three else 3,
        value_stages=2,
        query_stages=2,
        ping_pong=not three,
        overlap=not three,
        parts=2 if three else 1,
        polynomials=0,
        keys_ahead=True,
        pieces=1,
        item_cost=2,
        step_cost=2,
    )
    for smaller in (replace(tuning, query_stages=1), replace(tuning, query_stages=1, key_stages=2)):
        if prefill_shared_bytes(tuning, spec.head_dim, head_dim_vo, spec.dtype.itemsize) > limit:
            tuning = smaller
    return tuning


def prefill_params(
    spec: AttentionSpec, capacity: Capacity, tuning: PrefillTuning, window: int | None, processors: int
) -> PartitionParams:
    """The scheduler's parameters for one window of ``spec``."""
    return plan_params(spec, capacity, window, (tuning.kind(spec.group_size),), tuning.slot_rows, processors)
