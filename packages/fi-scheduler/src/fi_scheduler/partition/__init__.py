"""The work partition: equal shares of a batch's attention work for every worker."""

from .entry import Implementation, implementation, partition
from .header import include_folder
from .oracle import oracle_partition
from .records import (
    COL_HEAD_SLOT,
    COL_KIND,
    COL_KV_BEGIN,
    COL_KV_END,
    COL_KV_HEAD,
    COL_Q_TILE,
    COL_REQUEST,
    COL_SLOT,
    COL_TAIL_BEGIN,
    COL_TAIL_END,
    NO_SLOT,
    RECORD_WIDTH,
    UNLIMITED_ROWS,
    PartitionBounds,
    PartitionParams,
    TileKind,
    WorkList,
)
from .splits import invariant_splits

__all__ = [
    "COL_HEAD_SLOT",
    "COL_KIND",
    "COL_KV_BEGIN",
    "COL_KV_END",
    "COL_KV_HEAD",
    "COL_Q_TILE",
    "COL_REQUEST",
    "COL_SLOT",
    "COL_TAIL_BEGIN",
    "COL_TAIL_END",
    "NO_SLOT",
    "RECORD_WIDTH",
    "UNLIMITED_ROWS",
    "Implementation",
    "PartitionBounds",
    "PartitionParams",
    "TileKind",
    "WorkList",
    "implementation",
    "include_folder",
    "invariant_splits",
    "oracle_partition",
    "partition",
]
