"""Work lists in a plan's buffer, and what every launch over one needs."""

from __future__ import annotations

from collections.abc import Mapping

from fi_scheduler.partition import PartitionBounds, WorkList
from torch import Tensor

from .plan_kernel import DeviceWorkList
from .workspace import Layout

TABLE_FORMS: Mapping[str, int] = {"ragged": 0, "dense": 1, "indptr": 2}

_MERGE_PROGRAMS_A_TILE = 4
_MAX_MERGE_PROGRAMS = 512


def lists_in(buffer: Tensor, layout: Layout) -> dict[int | None, DeviceWorkList]:
    """Views of the work list of each distinct window."""
    return {
        window: DeviceWorkList(
            regions.worker_indptr.of(buffer),
            regions.items.of(buffer),
            regions.merges.of(buffer),
            regions.num_merges.of(buffer),
        )
        for window, regions in layout.lists.items()
    }


def work_list_of(lists: DeviceWorkList) -> WorkList:
    """The same arrays, in CPU memory, as the scheduler writes them."""
    return WorkList(lists.worker_indptr.numpy(), lists.items.numpy(), lists.merges.numpy())


def merge_grid(bounds: PartitionBounds) -> tuple[int, int]:
    """Programs of a merge: they take the records in turns, so a fixed number serves any batch."""
    return min(bounds.max_merges, _MAX_MERGE_PROGRAMS), _MERGE_PROGRAMS_A_TILE
