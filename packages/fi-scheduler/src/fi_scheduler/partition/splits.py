"""How far batch-invariant plans split a tile: a function of the capacity, never of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from fi_core.records import AttentionSpec, Capacity

from .records import TileKind

_SPLIT_WORKSPACE_BYTES = 256 << 20
_MAX_SPLITS = 16
_MIN_SPLIT_TOKENS = 1024


def invariant_splits(
    spec: AttentionSpec, capacity: Capacity, kinds: Sequence[TileKind], slot_rows: int
) -> tuple[int, int]:
    """(``max_splits``, ``min_split_steps``) of PartitionParams for a batch-invariant ``spec``.

    Pieces have at least 1024 tokens; a tile has at most 16, and fewer where the slots of their partial results
    (``slot_rows`` rows of float32 each) would take more than 256 MiB.
    """
    least_step = min(kind.kv_tokens for kind in kinds)
    slot_bytes = slot_rows * ((spec.head_dim_vo or 0) + 1) * 4
    rows = capacity.max_q_tokens * spec.group_size
    tiles = spec.num_kv_heads * (rows // min(kind.q_rows for kind in kinds) + capacity.max_batch)
    affordable = _SPLIT_WORKSPACE_BYTES // (slot_bytes * tiles)
    useful = -(-capacity.max_kv_len // _MIN_SPLIT_TOKENS)
    return max(1, min(_MAX_SPLITS, affordable, useful)), max(1, _MIN_SPLIT_TOKENS // least_step)
