"""Tile size, ring depth and costs of the decode kernel: built-in rules, which the hook ``fi_tuning`` may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from cuda.bindings import driver
from fi_core.contract import target_of
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec, Capacity
from fi_core.registry import registry
from fi_scheduler.partition import UNLIMITED_ROWS, PartitionParams, TileKind, plan_params

from ...launch import check

TUNED_OP = "attention_decode"
"""What ``fi_tuning`` is asked for."""

HOPPER_SHARED_BYTES = 227 << 10
HOPPER_MEMORY_GBS = 3350.0
"""Of an H100."""

_ROW_CHOICES = (8, 16, 32, 64, 128)
_WARP_ROWS = (8, 16)
_CHUNK_CHOICES = (16, 32)
_STEP_TOKENS = 16
_WIDE_HEAD_DIM = 128
_SHORT_ROW_BYTES = 128
_MAX_STAGES = 6
_FEW_WARPS = 4
_MANY_WARPS = 8  # as many as find 255 registers a thread
_MIN_STAGES = 2
_HEADS_ITEM_COST = 3
_MANY_HEADS, _SHORT_WINDOW = 256, 1024
_STAGE_ALIGNMENT = 1024
_BARRIER_BYTES = 8
_RESERVED_BYTES = 1024  # of shared memory, which the driver keeps for each block
_PROCESSOR_REGISTERS = 65536
_MAX_REGISTERS = 256
_ITEM_ROWS_BYTES = 64 * 64
_ANGLE_BYTES, _HALF_ANGLE_BYTES = 8, 4
_GROUP_TOKENS = 8
_PART_BYTES = 24  # four dims of a row, and what is known of it


@dataclass(frozen=True)
class DecodeTuning:
    """``rows``: packed query rows a tile; ``chunk_tokens``: KV tokens that a warp loads and multiplies at once;
    ``num_warps`` a block; ``num_stages``: chunks of a warp's ring; costs of an item and of a chunk in any common unit.
    ``row_warps`` warps share the rows of a tile and their chunks, the others take other chunks; or a tile has ``head_warps``
    KV heads, one for each warp."""

    rows: int
    chunk_tokens: int
    num_warps: int
    num_stages: int
    workers_per_processor: int
    item_cost: int
    step_cost: int
    row_warps: int = 1
    head_warps: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rows", _ROW_CHOICES),
            ("chunk_tokens", _CHUNK_CHOICES),
            ("num_warps", (1, 2, 4, 8, 16)),
            ("row_warps", [warps for warps in (1, 2, 4, 8, 16) if self.num_warps % warps == 0]),
            ("head_warps", (1, self.num_warps) if self.row_warps == 1 else (1,)),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"tuning.{name}", f"one of {allowed}", getattr(self, name))
        if self.rows // self.row_warps not in _WARP_ROWS:
            raise ArgumentError("tuning.row_warps", f"{self.rows} rows in parts of {_WARP_ROWS}", self.row_warps)
        for name, least in (("num_stages", _MIN_STAGES), ("workers_per_processor", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ArgumentError(f"tuning.{name}", f"an int of at least {least}", getattr(self, name))

    @property
    def num_rings(self) -> int:
        """Groups of warps with chunks, and a ring, of their own."""
        return self.num_warps // self.row_warps

    def kind(self, spec: AttentionSpec, capacity: Capacity) -> TileKind:
        """The only kind of q tile. Where no request of the capacity needs a second one, the kind says so, which makes
        the planning kernel much smaller."""
        limit = self.rows if capacity.max_q_len * spec.group_size <= self.rows else UNLIMITED_ROWS
        step = self.step_tokens(spec.page_size)
        return TileKind(self.rows, step, limit, self.item_cost * self.chunk_tokens // step, self.step_cost)

    def step_tokens(self, page_size: int | None) -> int:
        """KV tokens of the partition's step, at whose multiples an item's first chunk may begin: 16, so that shares are even,
        or a chunk's where a chunk that began elsewhere would lie in more pages than are looked up for it."""
        chunk = self.chunk_tokens
        fits = page_size is not None and (chunk % page_size == 0 or page_size % chunk == 0)
        together = min(page_size or 1, chunk) if fits else 1
        return _STEP_TOKENS if _STEP_TOKENS % together == 0 else chunk


def swizzle_of(row_bytes: int) -> int:
    """Bytes of the widest swizzle whose boxes fill a row of K or V (``fi/attention/stage.cuh``)."""
    return next(size for size in (128, 64, 32) if row_bytes % size == 0 or size == 32)


def _stage_bytes(chunk_tokens: int, row_bytes: tuple[int, int]) -> int:
    """Shared memory of one chunk of one warp: rows of K, then of V, in whole columns of the swizzle."""
    total = 0
    for size in row_bytes:
        columns = -(-size // swizzle_of(size))
        total += -(-columns * chunk_tokens * swizzle_of(size) // _STAGE_ALIGNMENT) * _STAGE_ALIGNMENT
    return total


class HeadForm(NamedTuple):
    """What of a spec decides how much shared memory a tuning takes: dims, bytes of a stored element, dims that rotate, and
    whether those of keys do, with angles in float16 or not."""

    head_dim: int
    head_dim_vo: int
    stored_bytes: int
    rotary_dim: int = 0
    rope_keys: bool = False
    half_angles: bool = False

    @classmethod
    def of(cls, spec: AttentionSpec) -> HeadForm:
        dims = (spec.head_dim, spec.head_dim_vo or 0, spec.kv_dtype.itemsize)
        rope = spec.rope
        return (
            cls(*dims)
            if rope is None
            else cls(*dims, rope.rotary_dim, rope.keys, spec.kv_is_fp8 and rope.pairs == "half")
        )


def shared_bytes(tuning: DecodeTuning, heads: HeadForm) -> int:
    """Shared memory of a block: the warps' rings with a barrier a stage, the warps' shares of an item, item rows,
    angles, and what aligning them may take."""
    row_bytes = (heads.head_dim * heads.stored_bytes, heads.head_dim_vo * heads.stored_bytes)
    rings = tuning.num_rings * tuning.num_stages * _stage_bytes(tuning.chunk_tokens, row_bytes)
    num_barriers = tuning.num_rings * (tuning.num_stages + (tuning.row_warps > 1))  # of stages, and to meet at
    barriers = -(-num_barriers * _BARRIER_BYTES // 16) * 16
    shared_rows = tuning.num_rings * tuning.rows
    shares = max(shared_rows * (heads.head_dim_vo + 4) * 4, tuning.num_warps * 32 * _PART_BYTES) + shared_rows * 8
    rotations = _rotation_bytes(tuning, heads)
    return rings + barriers + shares + rotations + _ITEM_ROWS_BYTES + _STAGE_ALIGNMENT


def _rotation_bytes(tuning: DecodeTuning, heads: HeadForm) -> int:
    """Angles of ``fi/attention/rotation.cuh``: of 8 tokens, a table of the block, and a scratch for each warp."""
    pairs = heads.rotary_dim // 2
    if not heads.rope_keys:
        return tuning.num_warps * pairs * _ANGLE_BYTES
    row_bytes = pairs * (_HALF_ANGLE_BYTES if heads.half_angles else _ANGLE_BYTES)
    scratch = max(tuning.chunk_tokens // _GROUP_TOKENS * row_bytes, pairs * _ANGLE_BYTES)
    return pairs * _ANGLE_BYTES + _GROUP_TOKENS * (row_bytes | 64) + tuning.num_warps * scratch


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_limit(device: torch.device) -> int:
    """Shared memory a block of a CUDA device may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs leave the attribute out
    return int(properties.shared_memory_per_block_optin)


def memory_gbs(device: torch.device) -> float:
    """GB/s of the device's memory by its data sheet: two transfers a clock of each line."""
    if device.type != "cuda":
        return HOPPER_MEMORY_GBS
    names = driver.CUdevice_attribute
    rate, width = names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, names.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH
    found = [driver.cuDeviceGetAttribute(name, device.index or 0) for name in (rate, width)]
    for status, _ in found:
        check(status, f"attributes of {device}")
    (_, kilohertz), (_, bits) = found
    return float(2 * kilohertz * 1e3 * bits / 8 / 1e9)


def tuning_for(spec: AttentionSpec, capacity: Capacity, device: torch.device) -> DecodeTuning:
    """The parameters for a plan, from capacities alone. Raises ArgumentError for unknown names or values in what
    ``fi_tuning`` returns, and for more workers than a processor can hold: merging waits for workers that run."""
    limit = shared_limit(device)
    built_in = built_in_tuning(spec, capacity, limit)
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    if not given:
        return built_in
    unknown = set(given) - {item.name for item in fields(DecodeTuning)}
    if unknown:
        expected = f"names among {[item.name for item in fields(DecodeTuning)]}"
        raise ArgumentError("fi_tuning", expected, sorted(unknown))
    if "head_warps" not in given and {"num_warps", "row_warps"} & set(given):
        built_in = replace(built_in, head_warps=1)  # how many there can be follows from both
    tuning = replace(built_in, **given)
    if spec.num_kv_heads % tuning.head_warps or (spec.batch_invariant and tuning.head_warps > 1):
        expected = (
            "1 with batch_invariant" if spec.batch_invariant else f"1, or a divisor of {spec.num_kv_heads} KV heads"
        )
        raise ArgumentError("tuning.head_warps", expected, tuning.head_warps)
    block_bytes = shared_bytes(tuning, HeadForm.of(spec))
    fitting = min(
        (limit + _RESERVED_BYTES) // (block_bytes + _RESERVED_BYTES),
        _PROCESSOR_REGISTERS // (32 * tuning.num_warps * _MAX_REGISTERS),
    )
    if tuning.workers_per_processor > max(fitting, 1):
        raise ArgumentError("tuning.workers_per_processor", f"at most {max(fitting, 1)}", tuning.workers_per_processor)
    return tuning


def built_in_tuning(spec: AttentionSpec, capacity: Capacity, limit: int = HOPPER_SHARED_BYTES) -> DecodeTuning:
    """The smallest tile that holds a request's rows, of at most 16 (8 for wide heads) for each of at most 8 warps, which share
    chunks where rows are more than that: more accumulators would not fit the registers; chunks of 32 tokens (16 for wide
    heads); and as many stages as fit into ``limit`` bytes of shared memory. Short rows take 8 warps, whose work on a chunk
    would otherwise not keep up with loading it; rotating keys too, and chunks of 16 where 8 rings of 32 or the registers would
    not fit. Measured on an H100 for head dims of 128 (docs/kernels/decode.md)."""
    heads = HeadForm.of(spec)
    wide = max(heads.head_dim, heads.head_dim_vo) > _WIDE_HEAD_DIM
    tallest = _WARP_ROWS[0 if wide else -1]
    wanted = min(capacity.max_q_len * spec.group_size, tallest * _MANY_WARPS)
    rows = next(choice for choice in _ROW_CHOICES if choice >= wanted)
    row_warps = max(rows // tallest, 1)
    short_rows = heads.head_dim * heads.stored_bytes <= _SHORT_ROW_BYTES
    crowded = wide or (heads.rope_keys and (not short_rows or rows // row_warps > _WARP_ROWS[0]))
    num_warps = _FEW_WARPS if row_warps == 1 and not heads.rope_keys and not short_rows else _MANY_WARPS
    best = DecodeTuning(
        rows=rows,
        chunk_tokens=_CHUNK_CHOICES[0 if crowded else -1],
        num_warps=num_warps,
        num_stages=_MAX_STAGES * max(_FEW_WARPS * row_warps // num_warps, 1),
        workers_per_processor=1,
        item_cost=6,
        step_cost=1,
        row_warps=row_warps,
    )
    most_stages = best.num_stages
    while shared_bytes(best, heads) > limit:
        if best.num_stages > _MIN_STAGES:
            best = replace(best, num_stages=best.num_stages - 1)
        else:
            num_warps = best.num_warps // 2
            row_warps = min(best.row_warps, num_warps)
            rows = best.rows * row_warps // best.row_warps
            best = replace(best, num_stages=most_stages, num_warps=num_warps, row_warps=row_warps, rows=rows)
    if _has_head_warps(spec, capacity, best):
        best = replace(best, head_warps=best.num_warps, item_cost=_HEADS_ITEM_COST)
    return best


def _has_head_warps(spec: AttentionSpec, capacity: Capacity, tuning: DecodeTuning) -> bool:
    """Whether each warp has a KV head of its own: what lies together is then read together, and an item's end needs no meeting of
    warps. Worth it for large batches where pages are small and lie anywhere, where windows make items short, and where elements
    of FP8 are rotated; elsewhere shares are less even than the heads' neighbourhood gives (docs/kernels/decode.md)."""
    if tuning.row_warps > 1 or spec.num_kv_heads % tuning.num_warps or spec.batch_invariant:
        return False
    if capacity.max_batch * spec.num_kv_heads < _MANY_HEADS or spec.head_dim > _WIDE_HEAD_DIM:
        return False
    has_small_pages = spec.page_size is not None and spec.page_size < _GROUP_TOKENS  # which no box copies
    has_short_items = any(window is not None and window <= _SHORT_WINDOW for window in spec.windows)
    return has_small_pages or has_short_items or (spec.kv_is_fp8 and spec.rope is not None and spec.rope.keys)


def partition_params(
    spec: AttentionSpec, capacity: Capacity, tuning: DecodeTuning, window: int | None, processors: int
) -> PartitionParams:
    """The scheduler's parameters for one window of ``spec``."""
    num_workers = processors * tuning.workers_per_processor
    params = plan_params(spec, capacity, window, (tuning.kind(spec, capacity),), tuning.rows, num_workers)
    return replace(params, num_kv_heads=params.num_kv_heads // tuning.head_warps)
