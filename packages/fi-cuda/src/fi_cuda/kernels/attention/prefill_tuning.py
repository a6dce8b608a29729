"""Tiles, rings and costs of the prefill kernel: built-in rules, which the hook ``fi_tuning`` may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from fi_core.contract import target_of
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec, Capacity
from fi_core.registry import registry
from fi_scheduler.partition import UNLIMITED_ROWS, PartitionParams, TileKind, plan_params

from .tuning import HOPPER_SHARED_BYTES, shared_limit

TUNED_OP = "attention_prefill"
"""What ``fi_tuning`` is asked for."""

WARPGROUP_ROWS, WARPGROUP_WARPS = 64, 4
MAX_GROUP = 64
"""Query heads of a KV head: a token's lie in one warpgroup's rows."""

BOX_ROW_BYTES = 128
MAX_PIECES = 16
COPY_ORDERS = ("in order", "keys ahead", "apart")
"""As ``CopyOrder`` of ``fi/attention/prefill_tiles.cuh``."""
_PATTERN_TOKENS = 8
_GATHERING_WARPS, _WARP_ROWS = 4, 32
_ITEM_BYTES = 64
_BARRIER_BYTES = 512 + 1024  # and what is looked up for rows
_ALIGNMENT = 1024
_NARROW_HEAD_DIM = 128
_SHORT_HEAD_DIM = 64
_WIDE_HEAD_DIM, _LONG_STEP = 192, 80
_MAX_TOKENS = 256
_DENSE_TILES, _MAX_DENSE_TILES = 32, 64
"""Full tiles of a request from which on one leaves what it gathered: with fewer, too few of them begin after its end."""
DENSE_BYTES = 2**27
"""Of a plan's dense copies at most; requests beyond them are gathered by every tile."""


@dataclass(frozen=True)
class PrefillTuning:
    """``consumers``: warpgroups of 64 packed query rows; ``tokens``: keys a step; ``edge_tokens``: unit of the keys of an
    item's first step; ``key_stages``, ``value_stages`` and ``query_stages`` of the rings; ``ping_pong``: warpgroups take turns in
    starting products; ``overlap``: a step's scores are started before the values of the step before, else ``parts`` of a step's
    weights are each computed beside the values of the part before; ``copy_order``: a step's values are copied after its keys ("in
    order"), after those of the next step ("keys ahead"), or by a warp of their own ("apart", boxes only: what else there is comes
    in order then); ``pieces``: of a tile that is left after whole rounds of tiles, at most; costs as in TileKind, in any common
    unit.

    ``landing_stages``: of the ring for K and V that are not multiplied as they are stored; FP8 queries need it, and 0 has FP8
    K and V beside other queries copied row by row.

    ``dense_tiles``: where K and V are gathered, a tile of each request with so many full ones leaves them as a dense copy, which
    others of its tiles read (0: none does)."""

    consumers: int
    tokens: int
    edge_tokens: int
    key_stages: int
    value_stages: int
    query_stages: int
    ping_pong: bool
    overlap: bool
    parts: int
    copy_order: str
    pieces: int
    item_cost: int
    step_cost: int
    landing_stages: int = 0
    dense_tiles: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("consumers", (1, 2, 3)),
            ("tokens", tuple(range(16, _MAX_TOKENS + 1, 16))),
            ("edge_tokens", tuple(range(16, self.tokens + 1, 16))),
            ("ping_pong", (False, True)),
            ("overlap", (False, True)),
            ("copy_order", COPY_ORDERS),
            ("pieces", tuple(range(1, MAX_PIECES + 1))),
            ("landing_stages", (0, 2, 3, 4)),  # one is filled while another is read
            ("dense_tiles", tuple(range(_MAX_DENSE_TILES + 1))),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"tuning.{name}", f"one of {allowed}", getattr(self, name))
        for name in ("key_stages", "value_stages", "query_stages", "parts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ArgumentError(f"tuning.{name}", "an int of at least 1", getattr(self, name))

    @property
    def slot_rows(self) -> int:
        return self.consumers * WARPGROUP_ROWS

    def leaves_dense_copies(self, group_size: int, max_q_len: int) -> bool:
        """Whether a request of at most ``max_q_len`` new tokens may have tiles enough."""
        tile_tokens = self.consumers * (WARPGROUP_ROWS // group_size)
        return 0 < self.dense_tiles <= max_q_len // tile_tokens

    def kind(self, group_size: int) -> TileKind:
        """The only kind of q tile: as many whole tokens as the warpgroups hold."""
        rows = self.consumers * (WARPGROUP_ROWS // group_size * group_size)
        return TileKind(rows, self.tokens, UNLIMITED_ROWS, self.item_cost, self.step_cost)


def box_tokens(page_size: int | None, tokens: int) -> int | None:
    """Tokens of a copy: a step's, or those of a page where it is smaller; None where pages and steps do not fit into each
    other, or a copy would not begin where the swizzle's pattern does."""
    size = tokens if page_size is None else page_size
    fits = size % tokens == 0 or tokens % size == 0
    box = min(size, tokens)
    return box if fits and box % _PATTERN_TOKENS == 0 else None


def run_tokens(spec: AttentionSpec, tuning: PrefillTuning) -> int | None:
    """Pages of one token that a producing warp copies together where they follow each other in memory: its rows of a step; None
    where they come one by one."""
    gathered = (
        spec.page_size == 1 and spec.kv_dtype == spec.q_dtype and not tuning.overlap and not tuning.landing_stages
    )
    return _WARP_ROWS if gathered and tuning.tokens == _GATHERING_WARPS * _WARP_ROWS else None


def first_key_unit(page_size: int | None, tokens: int) -> int:
    """What the position of a tile's first key is a multiple of: copies of pages must not cross their borders, others may begin
    anywhere. The less, the fewer keys before a window are multiplied."""
    return (None if page_size is None else box_tokens(page_size, tokens)) or 1


class HeadBytes(NamedTuple):
    """What of a spec decides how much shared memory a tuning takes: dims, and bytes of an element of Q."""

    head_dim: int
    head_dim_vo: int
    query: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> HeadBytes:
        return cls(spec.head_dim, spec.head_dim_vo or 0, spec.q_dtype.itemsize)


def prefill_shared_bytes(tuning: PrefillTuning, heads: HeadBytes) -> int:
    """Shared memory of a block: rings of queries, keys and values, items and barriers, and what aligning them may take."""
    dims = (heads.head_dim, heads.head_dim_vo)
    key_columns, value_columns = (-(-dim * heads.query // BOX_ROW_BYTES) for dim in dims)
    queries = tuning.query_stages * tuning.slot_rows * key_columns
    keys = tuning.key_stages * tuning.tokens * key_columns
    # FP8 values lie transposed: rows of 128 tokens, one a dim.
    transposed = -(-tuning.tokens // BOX_ROW_BYTES) * heads.head_dim_vo
    values = tuning.value_stages * (transposed if heads.query == 1 else tuning.tokens * value_columns)
    landing = tuning.landing_stages * tuning.tokens * -(-max(dims) // BOX_ROW_BYTES)
    items = 2 * tuning.query_stages * _ITEM_BYTES
    return (queries + keys + values + landing) * BOX_ROW_BYTES + items + _BARRIER_BYTES + _ALIGNMENT


def dense_step_bytes(tuning: PrefillTuning, heads: HeadBytes) -> int:
    """What a dense copy takes of a step's keys and values."""
    columns = (-(-dim * heads.query // BOX_ROW_BYTES) for dim in (heads.head_dim, heads.head_dim_vo))
    return tuning.tokens * BOX_ROW_BYTES * sum(columns)


def dense_steps(spec: AttentionSpec, capacity: Capacity, tuning: PrefillTuning) -> int:
    """Steps of all dense copies of a plan together."""
    if None not in spec.windows or not tuning.leaves_dense_copies(spec.group_size, capacity.max_q_len):
        return 0
    tile_tokens = tuning.consumers * (WARPGROUP_ROWS // spec.group_size)
    requests = min(capacity.max_batch, capacity.max_q_tokens // (tuning.dense_tiles * tile_tokens))
    most = requests * spec.num_kv_heads * -(-capacity.max_kv_len // tuning.tokens)
    return min(most, DENSE_BYTES // dense_step_bytes(tuning, HeadBytes.of(spec)))


def prefill_tuning_for(spec: AttentionSpec, device: torch.device, levels: bool = False) -> PrefillTuning:
    """The parameters for a plan; ``levels`` as in ``built_in_prefill_tuning``. Raises ArgumentError for unknown names or
    values in what ``fi_tuning`` returns, and for tiles that do not fit the pages or the shared memory."""
    limit = shared_limit(device)
    built_in = built_in_prefill_tuning(spec, limit, levels)
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    if not given:
        return built_in
    names = [item.name for item in fields(PrefillTuning)]
    unknown = set(given) - set(names)
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
    tuning = replace(built_in, **given)
    are_gathered = spec.kv_dtype == spec.q_dtype and not tuning.overlap and not tuning.landing_stages
    if tuning.dense_tiles and not (are_gathered and box_tokens(spec.page_size, tuning.tokens) is None):
        if "dense_tiles" in given:
            raise ArgumentError("tuning.dense_tiles", "0 where K and V are not gathered row by row", tuning.dense_tiles)
        tuning = replace(tuning, dense_tiles=0)
    size = prefill_shared_bytes(tuning, HeadBytes.of(spec))
    may_land = spec.kv_dtype != spec.q_dtype and box_tokens(spec.page_size, tuning.tokens) is not None
    if spec.q_is_fp8 > (tuning.landing_stages > 0) or (tuning.landing_stages > 0) > (spec.q_is_fp8 or may_land):
        expected = "2 or more with FP8 queries, 0 where K and V are multiplied as they are stored or come row by row"
        raise ArgumentError("tuning.landing_stages", expected, tuning.landing_stages)
    if levels and tuning.key_stages < 2:  # values of a first step are waited for before its keys are given back
        raise ArgumentError("tuning.key_stages", "2 or more where plans have levels", tuning.key_stages)
    if size > limit:
        raise ArgumentError("tuning.key_stages", f"rings that fit into {limit} bytes", size)
    return tuning


def built_in_prefill_tuning(
    spec: AttentionSpec, limit: int = HOPPER_SHARED_BYTES, levels: bool = False
) -> PrefillTuning:
    """Three warpgroups, each a step at a time, where the registers of a thread hold the scores of 128 keys beside its output;
    else two, whose steps overlap (docs/kernels/prefill.md). ``levels``: for the kernel of shared prefixes, whose producers need
    more than the 24 registers that the longest steps leave, and whose code, decode's included, is long enough without all widths
    of a first step."""
    head_dim_vo = spec.head_dim_vo or 0
    widest = max(spec.head_dim, head_dim_vo)
    tokens = 128 if head_dim_vo <= _NARROW_HEAD_DIM else 64
    as_stored = spec.kv_dtype == spec.q_dtype and not spec.q_is_fp8
    # Products with queries read those from shared memory once for a step's keys: the more keys, the less of its time.
    long_steps = (
        not levels and head_dim_vo > _WIDE_HEAD_DIM and as_stored and box_tokens(spec.page_size, _LONG_STEP) is not None
    )
    if long_steps:
        tokens = _LONG_STEP
    boxes = box_tokens(spec.page_size, tokens) is not None
    # Producers that make FP8 wider row by row need too many registers.
    three = widest <= _NARROW_HEAD_DIM and (boxes or as_stored)
    fp8 = three and spec.q_is_fp8
    tuning = PrefillTuning(
        consumers=3 if three else 2,
        tokens=tokens,
        # Where steps overlap, each width of the first has its copy of the next: two take 1.6 s to compile, four 2.1.
        edge_tokens=64 if tokens == 128 and (levels or widest > _NARROW_HEAD_DIM) else 48 if long_steps else 32,
        key_stages=4 if fp8 else 2 if three or long_steps else 3,
        value_stages=3 if fp8 else 2,
        query_stages=2,
        ping_pong=not three,
        overlap=not three,
        parts=_parts(spec, widest) if three else 1,
        copy_order="keys ahead" if not three or spec.page_size is None else "apart",
        pieces=MAX_PIECES,
        item_cost=2,
        step_cost=2,
        landing_stages=2 if spec.q_is_fp8 or (boxes and spec.kv_dtype != spec.q_dtype) else 0,
        dense_tiles=_DENSE_TILES if three and not boxes and as_stored else 0,
    )
    fewer = replace(tuning, query_stages=1, key_stages=2)
    row_by_row = replace(fewer, landing_stages=0)
    for smaller in (replace(tuning, query_stages=1), fewer, *(() if spec.q_is_fp8 else (row_by_row,))):
        if prefill_shared_bytes(tuning, HeadBytes.of(spec)) > limit:
            tuning = smaller
    if fp8 and widest <= _SHORT_HEAD_DIM:  # whose output leaves room for the scores of a second step
        tuning = replace(tuning, overlap=True, parts=1)
    return tuning


def _parts(spec: AttentionSpec, widest: int) -> int:
    """Of a step's weights: the more exponentials there are for its products, the smaller."""
    if widest <= _SHORT_HEAD_DIM:
        return 8
    return 4 if spec.q_is_fp8 else 2


def prefill_params(
    spec: AttentionSpec, capacity: Capacity, tuning: PrefillTuning, window: int | None, processors: int
) -> PartitionParams:
    """The scheduler's parameters for one window of ``spec``."""
    return plan_params(spec, capacity, window, (tuning.kind(spec.group_size),), tuning.slot_rows, processors)
