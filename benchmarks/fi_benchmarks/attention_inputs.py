"""Attention problems: random caches whose pages lie in random order, our plans, and a float64 check of sampled rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import fi_core as fi
import torch
from fi_core.ops.attention import attention_cost
from fi_core.plan import attention_values
from fi_core.records import KV_FORMATS, AttentionSpec, Batch, KVCache, KVFormat, LayerArgs, QFormat
from fi_core.reference.attention import oracle
from fi_core.rope import FusedRope, RopeConfig, RopeTable
from fi_core.tolerances import attention_tolerance
from torch import Tensor

from .ceilings import READ_PAGES, has_bulk_copies
from .kernels import stream_pages
from .numerics import Accuracy, compare
from .problem import Call, Maker, Outputs, Problem, generator_on, normal

MAX_CHECKED = 256
"""Rows of q that are compared with the float64 result; the first and last of each request come first."""
MIXED_Q_LEN = 512
"""Query tokens a request of the plan that serves mixed batches."""


@dataclass(frozen=True)
class Shape:
    """Heads, dims and cache of a model; ``page_size`` None: ragged K and V. ``window``, ``soft_cap``, ``sinks`` and
    ``alibi`` as in fi.LayerArgs (sinks are random, slopes those of the paper); ``q_format`` and ``rope`` as in
    fi.AttentionSpec. ``in_order``: pages follow each other in memory, as allocators with room give them; else at random."""

    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int | None = 16
    kv_format: KVFormat = "bf16"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    q_format: QFormat = "same"
    rope: FusedRope | None = None
    in_order: bool = False

    @property
    def rotates_or_reads_fp8_queries(self) -> bool:
        """Whether the call has what the peers' plain calls have not."""
        return self.rope is not None or self.q_format != "same"

    @property
    def spec(self) -> AttentionSpec:
        features = {name for name in ("soft_cap", "sinks", "alibi") if getattr(self, name)}
        return AttentionSpec(
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            kv_format=self.kv_format,
            page_size=self.page_size,
            table="ragged" if self.page_size is None else "dense",
            causal=self.causal,
            windows=(self.window,),
            features=frozenset(features),
            q_format=self.q_format,
            rope=self.rope,
        )


@dataclass(frozen=True)
class AttentionInputs:
    """q [T, Hq, D] of requests with ``q_lens`` new tokens and ``kv_lens`` keys (new ones included). Paged: kv.k, kv.v
    [P, S, Hkv, D] and ``pages`` int32 [P], the page ids in the order of the requests; ragged: [tokens, Hkv, D]."""

    shape: Shape
    layer: LayerArgs
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q: Tensor
    kv: KVCache
    batch: Batch
    pages: Tensor | None

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each request."""
        assert self.shape.page_size is not None
        return tuple(-(-length // self.shape.page_size) for length in self.kv_lens)

    @property
    def is_decode(self) -> bool:
        return max(self.q_lens) == 1


def int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(lengths: Sequence[int]) -> list[int]:
    """0 and the running sums."""
    return list(accumulate(lengths, initial=0))


def make_inputs(device: torch.device, shape: Shape, q_lens: Sequence[int], kv_lens: Sequence[int]) -> AttentionInputs:
    """Random q, K and V, equal every time."""
    generator, dtype = generator_on(device), KV_FORMATS[shape.kv_format]
    q = normal((sum(q_lens), shape.num_qo_heads, shape.head_dim), shape.spec.q_dtype, generator)
    heads = (shape.num_kv_heads, shape.head_dim)
    indptr, lengths = int32(offsets(q_lens), device), int32(kv_lens, device)
    pages = None
    if shape.page_size is None:
        rows: tuple[int, ...] = (sum(kv_lens), *heads)
        batch = Batch(indptr, lengths, kv_indptr=int32(offsets(kv_lens), device))
    else:
        counts = [-(-length // shape.page_size) for length in kv_lens]
        rows = (sum(counts), shape.page_size, *heads)
        count = sum(counts)
        order = torch.arange(count) if shape.in_order else torch.randperm(count, device=device, generator=generator)
        pages = order.to(device, torch.int32)
        table = torch.zeros((len(counts), max(counts)), dtype=torch.int32, device=device)
        for row, part in zip(table, pages.split(counts), strict=True):
            row[: part.shape[0]] = part
        batch = Batch(indptr, lengths, table)
    scale = None if dtype.itemsize > 1 else 0.5
    k, v = (normal(rows, dtype, generator) for _ in range(2))
    kv = KVCache(k, v, format=shape.kv_format, k_scale=scale, v_scale=scale)
    drawn = torch.randn(shape.num_qo_heads, device=device, generator=generator).bfloat16().float()
    rope = shape.rope
    angles = None if rope is None else RopeTable.make(RopeConfig(rope.rotary_dim, pairs=rope.pairs), device)
    q_scale = None if shape.q_format == "same" else 0.5
    sinks = drawn if shape.sinks else None
    heads_before = torch.arange(shape.num_qo_heads, dtype=torch.float32, device=device)
    slopes = torch.exp2(-8 / shape.num_qo_heads * (heads_before + 1)) if shape.alibi else None
    layer = LayerArgs(soft_cap=shape.soft_cap, sinks=sinks, alibi_slopes=slopes, q_scale=q_scale, rope=angles)
    return AttentionInputs(shape, layer, tuple(q_lens), tuple(kv_lens), q, kv, batch, pages)


def checked_rows(q_lens: Sequence[int], limit: int = MAX_CHECKED) -> list[tuple[int, int]]:
    """(request, token of it): the last and first tokens of requests, then tokens spread evenly over all, at most
    ``limit``."""
    requests = [idx for idx, q_len in enumerate(q_lens) if q_len]
    kept = requests[:: max(1, -(-len(requests) // limit))]
    chosen = dict.fromkeys((idx, q_lens[idx] - 1) for idx in kept)
    chosen |= dict.fromkeys((idx, 0) for idx in kept)
    ends = offsets(q_lens)
    count = max(0, limit - len(chosen))
    for place in range(count):
        row = (2 * place + 1) * ends[-1] // (2 * count)
        request = bisect_right(ends, row) - 1
        chosen.setdefault((request, row - ends[request]))
    return sorted(list(chosen)[:limit])


def expected_rows(inputs: AttentionInputs, chosen: Sequence[tuple[int, int]]) -> Tensor:
    """float64 [rows, Hq, D] of the chosen rows: each is the last token of a shorter request of its own."""
    shape, device = inputs.shape, inputs.q.device
    starts = offsets(inputs.q_lens)
    rows = torch.tensor([starts[request] + token for request, token in chosen], device=device)
    seen = [
        inputs.kv_lens[request] - (inputs.q_lens[request] - token - 1 if shape.causal else 0)
        for request, token in chosen
    ]
    request = torch.tensor([request for request, _ in chosen], device=device)
    kv, page_size, table = inputs.kv, shape.page_size, inputs.batch.table
    if table is None:  # ragged: pages of one token
        kv, page_size = replace(kv, k=kv.k.unsqueeze(1), v=kv.v.unsqueeze(1)), 1
        first = int32(offsets(inputs.kv_lens)[:-1], device).unsqueeze(1)
        longest = max(inputs.kv_lens)
        table = (first + torch.arange(longest, dtype=torch.int32, device=device)).clamp(max=kv.k.shape[0] - 1)
    ones = int32(range(len(chosen) + 1), device)
    batch = Batch(ones, int32(seen, device), table, table_row=request.int())
    spec = replace(shape.spec, page_size=page_size, table="dense")
    q = inputs.q.view(torch.uint8)[rows].view(inputs.q.dtype) if shape.q_format != "same" else inputs.q[rows]
    out, _ = oracle(spec, batch, q, kv, inputs.layer.resolve(spec))
    return out


def row_check(inputs: AttentionInputs) -> Callable[[Outputs], Accuracy]:
    """A check of output "out" [T, Hq, D] at the sampled rows."""
    chosen, starts = checked_rows(inputs.q_lens), offsets(inputs.q_lens)
    rows = torch.tensor([starts[request] + token for request, token in chosen], device=inputs.q.device)
    expected = expected_rows(inputs, chosen)
    # Decode multiplies weights of 16 bits, whatever Q is.
    tolerance = attention_tolerance(torch.bfloat16, inputs.shape.spec.allows_fp8_weights and not inputs.is_decode)

    def check(outputs: Mapping[str, Tensor]) -> Accuracy:
        return compare(outputs["out"][rows], expected, tolerance)

    return check


def plan_for(inputs: AttentionInputs, max_q_len: int) -> fi.Plan:
    """A plan of just this batch's capacities, for requests of up to ``max_q_len`` new tokens."""
    tokens = max(sum(inputs.q_lens), max_q_len)
    return fi.plan(
        inputs.shape.spec,
        max_batch=len(inputs.q_lens),
        max_q_tokens=tokens,
        max_q_len=max_q_len,
        max_kv_len=max(inputs.kv_lens),
        device=inputs.q.device,
    )


def ours(inputs: AttentionInputs, max_q_len: int, updates: bool = False) -> Maker:
    """Our call; with ``updates`` every call plans anew first."""

    def make() -> Call:
        plan, out = plan_for(inputs, max_q_len), torch.empty_like(inputs.q, dtype=inputs.shape.spec.dtype)
        plan.update(inputs.batch)

        def call() -> Outputs:
            if updates:
                plan.update(inputs.batch)
            return {"out": fi.attention(inputs.q, inputs.kv, plan, layer=inputs.layer, out=out)}

        return call

    return make


def as_ragged(inputs: AttentionInputs) -> AttentionInputs:
    """The same tokens of a paged cache as ragged K and V."""
    assert inputs.pages is not None

    def gathered(tensor: Tensor) -> Tensor:
        parts = zip(inputs.pages.split(inputs.num_pages), inputs.kv_lens, strict=True)
        return torch.cat([tensor[ids].flatten(0, 1)[:length] for ids, length in parts])

    kv = replace(inputs.kv, k=gathered(inputs.kv.k), v=gathered(inputs.kv.v))
    lengths, indptr = inputs.batch.kv_lens, int32(offsets(inputs.kv_lens), inputs.q.device)
    batch = Batch(inputs.batch.q_indptr, lengths, kv_indptr=indptr)
    return replace(inputs, shape=replace(inputs.shape, page_size=None), kv=kv, batch=batch, pages=None)


def as_tiles(inputs: AttentionInputs, tokens: int, block: int = 0) -> AttentionInputs:
    """What a window sees, without it: every ``tokens`` new tokens of whole prompts are a request of their own, whose cache is the
    pages that one of them sees. With ``block``, every token sees all of a cache of as many whole blocks of so many keys as
    the tile's pages fill, as far as there are keys before its end. Pages are shared by requests, as neighbouring tiles
    share keys."""
    size, window, device = inputs.shape.page_size, inputs.shape.window, inputs.q.device
    assert size is not None and window is not None and inputs.pages is not None and inputs.q_lens == inputs.kv_lens
    q_lens, kv_lens, rows = [], [], []
    for length, part in zip(inputs.kv_lens, inputs.pages.split(inputs.num_pages), strict=True):
        for start in range(0, length, tokens):
            first, end = max(0, start - window + 1) // size, min(start + tokens, length)
            if block:
                first = max(0, end - -(-(end - first * size) // block) * block) // size
            q_lens.append(end - start)
            kv_lens.append(end - first * size)
            rows.append(part[first : -(-end // size)])
    table = torch.zeros((len(rows), max(row.shape[0] for row in rows)), dtype=torch.int32, device=device)
    for line, row in zip(table, rows, strict=True):
        line[: row.shape[0]] = row
    return replace(
        inputs,
        shape=replace(inputs.shape, window=None, causal=inputs.shape.causal and not block),
        q_lens=tuple(q_lens),
        kv_lens=tuple(kv_lens),
        batch=Batch(int32(offsets(q_lens), device), int32(kv_lens, device), table),
        pages=torch.cat(rows),
    )


def visible_pages(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(page ids, valid bytes) int32 [N] of the pages that some row of the batch sees, in the order of the requests."""
    shape, device = inputs.shape, inputs.q.device
    assert shape.page_size is not None and inputs.pages is not None
    token_bytes = shape.num_kv_heads * shape.head_dim * inputs.kv.k.element_size()
    kept, valid = [], []
    for q_len, kv_len, part in zip(inputs.q_lens, inputs.kv_lens, inputs.pages.split(inputs.num_pages), strict=True):
        start = 0 if shape.window is None else max(0, kv_len - q_len - shape.window + 1)
        first = start // shape.page_size
        tokens = [min(shape.page_size, kv_len - idx * shape.page_size) for idx in range(first, part.shape[0])]
        kept.append(part[first:])
        valid += [count * token_bytes for count in tokens]
    return torch.cat(kept), int32(valid, device)


def floor(inputs: AttentionInputs) -> dict[str, Maker]:
    """The page-table read of the batch's visible keys and values; nothing where the cache is ragged or not on Hopper."""
    if inputs.shape.page_size is None or not has_bulk_copies(inputs.q.device):
        return {}
    pages, valid = visible_pages(inputs)
    k, v = inputs.kv.k, inputs.kv.v
    page_bytes = k[0].numel() * k.element_size()

    def call() -> Outputs:
        stream_pages(k, v, page_bytes, pages, valid)
        return {}

    return {READ_PAGES: lambda: call}


def attention_problem(
    device: torch.device,
    shape: Shape,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    variants: bool = False,
    beside_ragged: bool = False,
    tile: int | None = None,
    block: int = 0,
) -> Problem:
    """The problem of a batch; ``variants`` adds the call with its update and the one under a plan for mixed batches,
    ``beside_ragged`` the one with the pages' tokens as ragged K and V. ``tile``: of ``as_tiles`` instead, with so many tokens and
    with ``block``."""
    inputs = make_inputs(device, shape, q_lens, kv_lens)
    if tile is not None:
        inputs = as_tiles(inputs, tile, block)
        shape, q_lens, kv_lens = inputs.shape, inputs.q_lens, inputs.kv_lens
    longest = max(q_lens)
    made = {"": ours(inputs, longest)}
    if variants:
        made |= {"+update": ours(inputs, longest, updates=True), "+mixed-plan": ours(inputs, MIXED_Q_LEN)}
    if beside_ragged:
        made["+ragged"] = ours(as_ragged(inputs), longest)
    return Problem(
        request=attention_values(shape.spec, longest),
        inputs=inputs,
        ours=made,
        check=row_check(inputs),
        cost=attention_cost(shape.spec, q_lens, kv_lens, shape.window),
        ceilings=floor(inputs),
    )
