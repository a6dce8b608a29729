"""The work partition: equal shares of a batch's attention work for every worker."""

from .entry import Implementation, implementation, partition
from .header import include_folder
from .oracle import oracle_partition
from .planning import plan_params
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
    "oracle_partition",
    "partition",
    "plan_params",
]
