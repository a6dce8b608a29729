"""Tile sizes and launch parameters of the attention family: a static table, which the hook ``fi_tuning`` may override."""

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
from triton.runtime import driver

INTERPRETED_PROCESSORS = 2
"""Processors that a CPU under Triton's interpreter counts as: its programs run one after another."""

HOPPER_SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Tuning:
    """One attention kernel's compile-time and launch parameters.

    Kind 0 has tiles of ``rows`` packed query rows by ``step`` KV tokens; kind 1, for requests with more rows than that,
    ``big_rows`` by ``big_step`` (0: no kind 1, kind 0 serves all). Costs are in any common unit, see TileKind.
    """

    rows: int
    step: int
    big_rows: int
    big_step: int
    num_warps: int
    num_stages: int
    workers_per_processor: int
    item_cost: int
    step_cost: int
    big_item_cost: int
    big_step_cost: int

    def __post_init__(self) -> None:
        for name in ("rows", "step", "big_rows", "big_step"):
            value = getattr(self, name)
            absent = name.startswith("big_") and self.big_rows == 0
            if not absent and (value < 16 or value & (value - 1)):
                raise ArgumentError(f"tuning.{name}", "a power of two from 16 on", value)
        if self.big_rows and self.big_rows <= self.rows:
            raise ArgumentError("tuning.big_rows", f"0 or more than rows={self.rows}", self.big_rows)

    @property
    def slot_rows(self) -> int:
        """Rows of a slot for partial results: those of the larger kind."""
        return max(self.rows, self.big_rows)

    def kinds(self) -> tuple[TileKind, ...]:
        if self.big_rows == 0:
            return (TileKind(self.rows, self.step, UNLIMITED_ROWS, self.item_cost, self.step_cost),)
        small = TileKind(self.rows, self.step, self.rows, self.item_cost, self.step_cost)
        return small, TileKind(self.big_rows, self.big_step, UNLIMITED_ROWS, self.big_item_cost, self.big_step_cost)


def block_dim(dim: int) -> int:
    """Elements of a tile's row that holds a head of ``dim``: a power of two, at least 16 (the least that tl.dot takes)."""
    return max(16, next_power_of_two(dim))


def next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_bytes(device: torch.device) -> int:
    """Shared memory a block of a CUDA device may have."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    properties: Mapping[str, int] = driver.active.utils.get_device_properties(index)
    return properties["max_shared_mem"]


def tuning_for(spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Tuning:
    """The parameters for a plan: from capacities alone, never from lengths. Raises ArgumentError for unknown names in
    what ``fi_tuning`` returns."""
    built_in = built_in_tuning(spec, capacity, shared_bytes(device))
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op="attention", target=target_of(device))
    if not given:
        return built_in
    unknown = set(given) - {item.name for item in fields(Tuning)}
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {[item.name for item in fields(Tuning)]}", sorted(unknown))
    return replace(built_in, **given)


def built_in_tuning(spec: AttentionSpec, capacity: Capacity, shared_limit: int = HOPPER_SHARED_BYTES) -> Tuning:
    """The table, measured on an H100 for head dims of 128 and bfloat16 (docs/kernels/attention_triton.md).

    Decode keeps about 64 KiB of K and V a worker in flight, in ``num_stages`` - 1 steps, with two workers a processor; tall
    tiles take 8 warps and a processor each. Stages are given up where Q and they exceed ``shared_limit`` bytes of shared
    memory. A step of a small tile is bound by memory and costs about twice that of a tall one.
    """
    widest = max(block_dim(spec.head_dim), block_dim(spec.head_dim_vo or 0))
    row_bytes = (block_dim(spec.head_dim) + block_dim(spec.head_dim_vo or 0)) * spec.kv_dtype.itemsize
    max_rows = capacity.max_q_len * spec.group_size
    if spec.dtype == torch.float32:
        # Products in full float32 run on the ordinary cores and hold both operands in registers.
        step, big_rows = (32 if widest <= 128 else 16), 32
    else:
        step, big_rows = (64 if row_bytes <= 512 else 32), (128 if widest <= 128 else 64)
    rows = max(16, next_power_of_two(min(max_rows, big_rows)))
    if max_rows > big_rows:
        # A mixed plan: decode and speculative steps keep a small tile beside the big one.
        rows = max(16, next_power_of_two(spec.group_size))
    if max_rows <= big_rows or rows >= big_rows:
        rows, big_rows = min(rows, big_rows), 0
    tallest = max(rows, big_rows)
    tall = tallest >= 128 or (tallest >= 64 and widest > 128)
    if spec.dtype == torch.float32:
        num_stages = 2
    elif tallest <= 16 and row_bytes == 512:
        step, num_stages = 128, 2
    else:
        num_stages = 3 if tall or step * row_bytes > 16384 else 4
    query_bytes = tallest * block_dim(spec.head_dim) * spec.dtype.itemsize
    while num_stages > 2 and query_bytes + num_stages * step * row_bytes > shared_limit:
        num_stages -= 1
    return Tuning(
        rows=rows,
        step=step,
        big_rows=big_rows,
        big_step=step if big_rows else 0,
        num_warps=8 if tall else 4,
        num_stages=num_stages,
        workers_per_processor=1 if tall else 2,
        item_cost=2,
        step_cost=2,
        big_item_cost=2,
        big_step_cost=1,
    )


def partition_params(
    spec: AttentionSpec, capacity: Capacity, tuning: Tuning, window: int | None, processors: int
) -> PartitionParams:
    """The scheduler's parameters for one window of ``spec``."""
    num_workers = processors * tuning.workers_per_processor
    return plan_params(spec, capacity, window, tuning.kinds(), tuning.slot_rows, num_workers)
