"""What a plan asks of the partition: a function of its spec and capacity and of a kernel family's tiles."""

from __future__ import annotations

from collections.abc import Sequence

from fi_core.records import AttentionSpec, Capacity

from .records import PartitionParams, TileKind

_SPLIT_WORKSPACE_BYTES = 256 << 20
_MAX_SPLITS = 16
_MIN_SPLIT_TOKENS = 1024


def plan_params(
    spec: AttentionSpec,
    capacity: Capacity,
    window: int | None,
    kinds: tuple[TileKind, ...],
    slot_rows: int,
    num_workers: int,
) -> PartitionParams:
    """The partition of a plan for one window of ``spec``, on ``num_workers`` workers of a kernel family with tiles of
    ``kinds``; ``slot_rows`` rows of float32 are a slot for partial results."""
    max_splits, min_split_steps = 0, 1
    if spec.batch_invariant:
        max_splits, min_split_steps = _invariant_splits(spec, capacity, kinds, slot_rows)
    return PartitionParams(
        num_workers=num_workers,
        num_kv_heads=spec.num_kv_heads,
        group_size=spec.group_size,
        kinds=kinds,
        causal=spec.causal,
        window=window,
        max_splits=max_splits,
        min_split_steps=min_split_steps,
    )


def _invariant_splits(
    spec: AttentionSpec, capacity: Capacity, kinds: Sequence[TileKind], slot_rows: int
) -> tuple[int, int]:
    """(``max_splits``, ``min_split_steps``) of a batch-invariant plan: a function of the capacity, never of a batch.

    Pieces have at least 1024 tokens; a tile has at most 16, and fewer where the slots of their partial results would
    take more than 256 MiB.
    """
    least_step = min(kind.kv_tokens for kind in kinds)
    slot_bytes = slot_rows * ((spec.head_dim_vo or 0) + 1) * 4
    rows = capacity.max_q_tokens * spec.group_size
    tiles = spec.num_kv_heads * (rows // min(kind.q_rows for kind in kinds) + capacity.max_batch)
    affordable = _SPLIT_WORKSPACE_BYTES // (slot_bytes * tiles)
    useful = -(-capacity.max_kv_len // _MIN_SPLIT_TOKENS)
    return max(1, min(_MAX_SPLITS, affordable, useful)), max(1, _MIN_SPLIT_TOKENS // least_step)
