"""The device memory of a decode plan: one buffer, laid out from capacities alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fi_core.records import AttentionSpec, Capacity
from fi_scheduler.partition import RECORD_WIDTH, PartitionBounds, PartitionParams
from fi_scheduler.regions import Region, RegionBuilder
from torch import Tensor

from .plan import ITEM_WIDTH, START_WIDTH, DeviceWorkList, scratch_bytes
from .tuning import DecodeTuning, num_processors, partition_params, tuning_for


@dataclass(frozen=True)
class ListRegions:
    """Where one work list lies (see DeviceWorkList)."""

    starts: Region
    items: Region
    worker_indptr: Region
    merges: Region
    num_merges: Region

    def of(self, buffer: Tensor) -> DeviceWorkList:
        regions = (self.starts, self.items, self.worker_indptr, self.merges, self.num_merges)
        return DeviceWorkList(*(region.of(buffer) for region in regions))


@dataclass(frozen=True)
class Layout:
    """Regions of a plan's buffer.

    ``lists`` has a work list for each distinct window; these make up the first ``host_bytes``, which an update from the
    CPU copies at once. ``scratch`` is the planning kernel's (of no bytes where it needs none). ``partials`` and
    ``partial_rows`` (base and mass of the softmax, once for every four dims) are the slots of pieces' results; all bits are
    set while a piece is not there.
    """

    tuning: DecodeTuning
    params: dict[int | None, PartitionParams]
    bounds: PartitionBounds
    lists: dict[int | None, ListRegions]
    host_bytes: int
    scratch: Region
    partials: Region
    partial_rows: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Layout:
        """The layout of a plan; raises CapacityError where no work list can hold the capacity."""
        tuning = tuning_for(spec, capacity, device)
        processors = num_processors(device)
        params = {
            window: partition_params(spec, capacity, tuning, window, processors)
            for window in dict.fromkeys(spec.windows)
        }
        some = next(iter(params.values()))
        bounds = PartitionBounds.from_capacity(some, capacity)  # a window changes no bound
        max_merges = max(bounds.max_merges, 1)
        build = RegionBuilder()
        lists = {
            window: ListRegions(
                starts=build.add((some.num_workers, START_WIDTH), torch.int32),
                items=build.add((bounds.max_items, ITEM_WIDTH), torch.int32),
                worker_indptr=build.add((some.num_workers + 1,), torch.int32),
                merges=build.add((max_merges, RECORD_WIDTH), torch.int32),
                num_merges=build.add((1,), torch.int32),
            )
            for window in params
        }
        host_bytes = build.end
        return cls(
            tuning=tuning,
            params=params,
            bounds=bounds,
            lists=lists,
            host_bytes=host_bytes,
            scratch=build.add((scratch_bytes(capacity.max_batch),), torch.uint8),
            partials=build.add((bounds.num_slots, tuning.rows, spec.head_dim_vo or 0), torch.float32),
            partial_rows=build.add((bounds.num_slots, tuning.rows, (spec.head_dim_vo or 0) // 4, 2), torch.float32),
            num_bytes=build.end,
        )
