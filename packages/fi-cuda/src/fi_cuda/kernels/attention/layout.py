"""The device memory of an attention plan: one buffer, laid out from capacities alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from fi_core.records import AttentionSpec, Capacity
from fi_scheduler.partition import RECORD_WIDTH, PartitionBounds, PartitionParams
from fi_scheduler.regions import Region, RegionBuilder
from torch import Tensor

from .order import HEADER_WIDTH, OrderList, order_rows, order_slots
from .plan import ITEM_WIDTH, START_WIDTH, DeviceWorkList, scratch_bytes
from .prefill_tuning import (
    WARPGROUP_WARPS,
    HeadBytes,
    PrefillTuning,
    dense_step_bytes,
    dense_steps,
    prefill_params,
    prefill_tuning_for,
)
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
class OrderRegions:
    """Where one list of tiles in order lies (see OrderList)."""

    items: Region
    header: Region
    tile_prefix: Region

    def of(self, buffer: Tensor) -> OrderList:
        return OrderList(*(region.of(buffer) for region in (self.items, self.header, self.tile_prefix)))


@dataclass(frozen=True)
class Slots:
    """What a kernel keeps of split tiles: ``rows`` rows of ``head_dim_vo`` float32 a slot, and of ``row_shape`` float32 what
    is known of a row; ``counters`` a tile."""

    rows: int
    head_dim_vo: int
    row_shape: tuple[int, ...] = ()
    counters: int = 0


@dataclass(frozen=True)
class DenseCopies:
    """How much a plan keeps of gathered keys and values: ``steps`` of ``step_bytes``, and where those of ``owners`` requests and
    heads lie."""

    steps: int = 0
    step_bytes: int = 0
    owners: int = 0


@dataclass(frozen=True)
class Layout:
    """Regions of a plan's buffer.

    ``lists`` has a work list for each distinct window, and ``orders`` that of a prefill plan's tiles; these make up the first
    ``host_bytes``, which an update from the CPU copies at once. ``scratch`` is the planning kernel's (of no bytes where it
    needs none). ``partials`` and ``partial_rows`` are the slots of pieces' results: of decode with base and mass of the
    softmax, once for every four dims, all bits set while a piece is not there; of prefill with the log-sum-exp in base 2, and
    ``arrivals`` counts the pieces of each split tile that are there. ``dense`` has dense copies, ``dense_records`` where they lie
    (``fi/attention/prefill_dense.cuh``), zeros to begin with.
    """

    tuning: DecodeTuning | PrefillTuning
    params: dict[int | None, PartitionParams]
    bounds: PartitionBounds
    num_slots: int
    lists: dict[int | None, ListRegions]
    orders: dict[int | None, OrderRegions]
    host_bytes: int
    scratch: Region
    arrivals: Region
    partials: Region
    partial_rows: Region
    dense: Region
    dense_records: Region
    num_bytes: int

    @classmethod
    def of(cls, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Layout:
        """The layout of a decode plan; raises CapacityError where no work list can hold the capacity."""
        tuning = tuning_for(spec, capacity, device)
        processors = num_processors(device)
        params = {
            window: partition_params(spec, capacity, tuning, window, processors)
            for window in dict.fromkeys(spec.windows)
        }
        head_dim_vo = spec.head_dim_vo or 0
        slots = Slots(tuning.rows * tuning.head_warps, head_dim_vo, row_shape=(head_dim_vo // 4, 2))
        return cls._arranged(tuning, params, capacity, slots)

    @classmethod
    def of_prefill(cls, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Layout:
        """The layout of a prefill plan; raises CapacityError likewise."""
        tuning = prefill_tuning_for(spec, device)
        steps = dense_steps(spec, capacity, tuning)
        if steps == 0:
            tuning = replace(tuning, dense_tiles=0)
        owners = capacity.max_batch * spec.num_kv_heads if steps else 0
        dense = DenseCopies(steps, dense_step_bytes(tuning, HeadBytes.of(spec)), owners)
        processors = num_processors(device)
        params = {
            window: prefill_params(spec, capacity, tuning, window, processors) for window in dict.fromkeys(spec.windows)
        }
        slots = Slots(tuning.slot_rows, spec.head_dim_vo or 0, counters=tuning.consumers)
        return cls._arranged(tuning, params, capacity, slots, dense)

    @classmethod
    def _arranged(
        cls,
        tuning: DecodeTuning | PrefillTuning,
        params: dict[int | None, PartitionParams],
        capacity: Capacity,
        slots: Slots,
        dense: DenseCopies = DenseCopies(),
    ) -> Layout:
        some = next(iter(params.values()))
        bounds = PartitionBounds.from_capacity(some, capacity)  # a window changes no bound
        max_merges = max(bounds.max_merges, 1)
        ordered = tuning if isinstance(tuning, PrefillTuning) else None
        num_pieces = order_slots(some, ordered) if ordered else 0
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
        orders = (
            {
                window: OrderRegions(
                    items=build.add((order_rows(some, ordered, bounds.max_tiles), ITEM_WIDTH), torch.int32),
                    header=build.add((HEADER_WIDTH,), torch.int32),
                    tile_prefix=build.add((capacity.max_batch + 1,), torch.int32),
                )
                for window in params
            }
            if ordered
            else {}
        )
        host_bytes = build.end
        return cls(
            tuning=tuning,
            params=params,
            bounds=bounds,
            num_slots=max(bounds.num_slots, num_pieces),
            lists=lists,
            orders=orders,
            host_bytes=host_bytes,
            scratch=build.add((scratch_bytes(capacity.max_batch),), torch.uint8),
            arrivals=build.add((max(max_merges, num_pieces // 2) * slots.counters,), torch.int32),
            partials=build.add((max(bounds.num_slots, num_pieces), slots.rows, slots.head_dim_vo), torch.float32),
            partial_rows=build.add((max(bounds.num_slots, num_pieces), slots.rows, *slots.row_shape), torch.float32),
            dense=build.add((dense.steps, dense.step_bytes), torch.uint8),
            dense_records=build.add((2 + dense.owners, WARPGROUP_WARPS), torch.int64),
            num_bytes=build.end,
        )
