"""The device memory of an attention plan: one buffer, laid out from capacities alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fi_core.records import AttentionSpec, Capacity
from fi_scheduler.partition import RECORD_WIDTH, PartitionBounds, PartitionParams
from fi_scheduler.regions import Region, RegionBuilder

from .tuning import Tuning, num_processors, partition_params, tuning_for

REQUEST_COLUMNS = 4
"""int64 columns of a request's totals for one KV head: cost, tiles, pieces, split tiles (the last two batch-invariant only)."""
CUT_COLUMNS = 8
"""int64 columns of a worker's cut: tile, step or piece in it, request, q tile, KV head, items and merges before it, unused."""


@dataclass(frozen=True)
class ListRegions:
    """Where one work list lies (see fi_scheduler's WorkList); ``num_merges`` [1] counts the merge records in use."""

    worker_indptr: Region
    items: Region
    merges: Region
    num_merges: Region


@dataclass(frozen=True)
class Layout:
    """Regions of a plan's buffer.

    ``lists`` has a work list for each distinct window, ``q_indptr`` and ``kv_lens`` hold lengths that came from the CPU;
    these make up the first ``host_bytes``, which an update from the CPU copies at once. ``requests`` and ``cuts`` are
    scratch of the planning kernels, ``partials`` and ``partial_lses`` the slots of split tiles.
    """

    tuning: Tuning
    params: dict[int | None, PartitionParams]
    bounds: PartitionBounds
    lists: dict[int | None, ListRegions]
    q_indptr: Region
    kv_lens: Region
    host_bytes: int
    requests: Region
    cuts: Region
    partials: Region
    partial_lses: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Layout:
        """The layout of a plan; raises CapacityError where no work list can hold the capacity."""
        tuning = tuning_for(spec, capacity, device)
        processors = num_processors(device)
        windows = dict.fromkeys(spec.windows)
        params = {window: partition_params(spec, capacity, tuning, window, processors) for window in windows}
        some = next(iter(params.values()))
        bounds = PartitionBounds.from_capacity(some, capacity)  # a window changes no bound
        build = RegionBuilder()
        workers = some.num_workers
        records = ((bounds.max_items, RECORD_WIDTH), (max(bounds.max_merges, 1), RECORD_WIDTH))
        lists = {
            window: ListRegions(
                num_merges=build.add((1,), torch.int32),
                worker_indptr=build.add((workers + 1,), torch.int32),
                merges=build.add(records[1], torch.int32),
                items=build.add(records[0], torch.int32),
            )
            for window in windows
        }
        q_indptr = build.add((capacity.max_batch + 1,), torch.int32)
        kv_lens = build.add((capacity.max_batch,), torch.int32)
        host_bytes = build.end
        return cls(
            tuning=tuning,
            params=params,
            bounds=bounds,
            lists=lists,
            q_indptr=q_indptr,
            kv_lens=kv_lens,
            host_bytes=host_bytes,
            requests=build.add((capacity.max_batch, REQUEST_COLUMNS), torch.int64),
            cuts=build.add((workers + 1, CUT_COLUMNS), torch.int64),
            partials=build.add((bounds.num_slots, tuning.slot_rows, spec.head_dim_vo or 0), torch.float32),
            partial_lses=build.add((bounds.num_slots, tuning.slot_rows), torch.float32),
            num_bytes=build.end,
        )
