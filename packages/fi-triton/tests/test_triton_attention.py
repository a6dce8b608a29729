"""The Triton attention family against an independent dense float64 formula, on poisoned memory and hostile batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from fi_core.errors import ArgumentError
from fi_core.hookspecs import hookimpl
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs, PackedMask
from fi_core.registry import registry
from fi_triton.attention.state import TritonAttention
from fi_triton.attention.tuning import built_in_tuning

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 6e-3}
SENTINEL = 7.25
PADDING_ROWS = 2


@dataclass
class World:
    """A batch, its cache with every slot that no request owns poisoned, and each request's own dense keys and values."""

    spec: AttentionSpec
    q: torch.Tensor
    kv: KVCache
    batch: Batch
    dense: list[tuple[torch.Tensor, torch.Tensor]]
    visible: list[torch.Tensor | None]
    capacity: Capacity


def _scaled(values: torch.Tensor, scale: float | torch.Tensor | None) -> torch.Tensor:
    factor = 1.0 if scale is None else scale if isinstance(scale, float) else scale.cpu().double().view(-1, 1)
    return values.double() * factor


def _scales(spec: AttentionSpec, kind: str | None, generator: torch.Generator) -> tuple:
    if kind == "head":
        return tuple(torch.rand(spec.num_kv_heads, generator=generator) + 0.5 for _ in range(2))
    return {"scalar": (torch.tensor(0.7), torch.tensor(1.3)), "float": (0.7, 1.3), None: (None, None)}[kind]


def _mask(spec, form, q_lens, kv_lens, generator) -> tuple[PackedMask | None, list[torch.Tensor | None]]:
    """Random bits in the packed layout, and the same as bool [q_len, kv_len] for each request."""
    if form is None:
        return None, [None] * len(q_lens)
    weights = 2 ** torch.arange(8)
    packed, indptr, visible = [], [0], []
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        columns = kv_len if form == "kv" else q_len
        bits = torch.rand(q_len, columns, generator=generator) < 0.6
        padded = torch.nn.functional.pad(bits, (0, -columns % 8)).view(q_len, -(-columns // 8), 8)
        packed.append((padded * weights).sum(-1).to(torch.uint8).flatten())
        indptr.append(indptr[-1] + packed[-1].numel())
        full = torch.ones(q_len, kv_len, dtype=torch.bool)
        shown = min(columns, kv_len)
        if shown:
            full[:, kv_len - shown :] = bits[:, columns - shown :]
        visible.append(full)
    return PackedMask(torch.cat(packed), torch.tensor(indptr), form), visible


def _addressing(spec, kv_lens, table_row, generator) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
    """Batch fields, the (shuffled) row of every token of each request in a flat cache, and the cache's pages or rows."""
    if spec.page_size is None:
        starts, row = [], 3
        for kv_len in kv_lens:
            starts.append(row)
            row += kv_len + 3
        rows = [start + torch.arange(kv_len) for start, kv_len in zip(starts, kv_lens, strict=True)]
        return {"kv_indptr": torch.tensor([*starts, row], dtype=torch.int32)}, rows, row + 3
    counts = [-(-kv_len // spec.page_size) for kv_len in kv_lens]
    num_pages = sum(counts) + 4
    # Page 0, which a lookup that is left out falls back to, is nobody's and poisoned like all others.
    pages = (torch.randperm(num_pages - 1, generator=generator) + 1)[: sum(counts)].split(counts) if counts else []
    rows = [
        own[torch.arange(kv_len) // spec.page_size] * spec.page_size + torch.arange(kv_len) % spec.page_size
        for own, kv_len in zip(pages, kv_lens, strict=True)
    ]
    if spec.table == "indptr":
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        table = torch.cat([*pages, torch.tensor([10**6])]).int()
        return {"table": table, "table_indptr": indptr}, rows, num_pages
    order = list(range(len(kv_lens)))[::-1] if table_row else list(range(len(kv_lens)))
    table = torch.full((len(kv_lens) + 1, max(counts, default=0) + 1), -(10**6), dtype=torch.int32)
    for request, own in zip(order, pages, strict=True):
        table[request, : len(own)] = own.int()
    fields = {"table": table}
    if table_row:
        fields["table_row"] = torch.tensor(order, dtype=torch.int32)
    return fields, rows, num_pages


@dataclass(frozen=True)
class Options:
    """How a world is made: kind of FP8 scales, form of the mask, use of table_row, FP8 typed uint8, capacity, seed."""

    scales: str | None = None
    mask: str | None = None
    table_row: bool = False
    as_bytes: bool = False
    max_q_len: int | None = None
    seed: int = 0


def build(spec: AttentionSpec, q_lens: list[int], kv_lens: list[int], device: str, **given) -> World:
    """A random world for these lengths on ``device``; ``given`` are fields of Options."""
    options = Options(**given)
    generator = torch.Generator().manual_seed(options.seed)
    num_tokens = sum(q_lens)
    q = torch.randn(num_tokens + PADDING_ROWS, spec.num_qo_heads, spec.head_dim, generator=generator).to(spec.dtype)
    q[num_tokens:] = math.nan
    fields, rows, num_blocks = _addressing(spec, kv_lens, options.table_row, generator)
    k_scale, v_scale = _scales(spec, options.scales, generator)
    caches, dense = [], []
    for dim in (spec.head_dim, spec.head_dim_vo or 0):
        flat = torch.full((num_blocks * (spec.page_size or 1), spec.num_kv_heads, dim), math.nan).to(spec.kv_dtype)
        values = [torch.randn(len(own), spec.num_kv_heads, dim, generator=generator).to(spec.kv_dtype) for own in rows]
        for own, value in zip(rows, values, strict=True):
            flat.view(torch.uint8)[own] = value.view(torch.uint8)
        shape = flat.shape if spec.page_size is None else (num_blocks, spec.page_size, *flat.shape[1:])
        cache = flat.view(shape)
        if spec.kv_layout == "HND":
            cache = cache.transpose(-2, -3).contiguous()
        caches.append((cache.view(torch.uint8) if options.as_bytes else cache).to(device))
        dense.append(values)
    packed, visible = _mask(spec, options.mask, q_lens, kv_lens, generator)
    moved = {name: value.to(device) for name, value in fields.items()}
    if packed is not None:
        moved["mask"] = PackedMask(packed.bits.to(device), packed.indptr.to(device), packed.columns)
    scales_there = [scale.to(device) if isinstance(scale, torch.Tensor) else scale for scale in (k_scale, v_scale)]
    batch = Batch(
        torch.tensor([0, *q_lens]).cumsum(0).int().to(device),
        torch.tensor(kv_lens, dtype=torch.int32).to(device),
        **moved,
    )
    longest = options.max_q_len or max([*q_lens, 1])
    capacity = Capacity(len(q_lens) + 1, max(num_tokens, longest), longest, max([*kv_lens, 1]))
    pairs = [(_scaled(k, k_scale), _scaled(v, v_scale)) for k, v in zip(*dense, strict=True)]
    cache = KVCache(caches[0], caches[1], spec.kv_layout, spec.kv_format, *scales_there)
    return World(spec, q.to(device), cache, batch, pairs, visible, capacity)


def layer_for(spec: AttentionSpec, device: str, window: int | None) -> LayerArgs:
    generator = torch.Generator().manual_seed(1)
    sinks = torch.randn(spec.num_qo_heads, generator=generator).to(device) if "sinks" in spec.features else None
    slopes = (torch.rand(spec.num_qo_heads, generator=generator) / 10).to(device) if "alibi" in spec.features else None
    soft_cap = 3.0 if "soft_cap" in spec.features else None
    return LayerArgs(window=window, sinks=sinks, alibi_slopes=slopes, soft_cap=soft_cap)


def expected(world: World, layer: LayerArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64: the softmax written out for one query row after the other."""
    spec, row = world.spec, 0
    resolved = layer.resolve(spec)
    q = world.q.cpu().double()
    q_lens = world.batch.q_indptr.cpu().diff().tolist()
    outs = torch.zeros(sum(q_lens), spec.num_qo_heads, spec.head_dim_vo or 0, dtype=torch.float64)
    lses = torch.full((sum(q_lens), spec.num_qo_heads), -math.inf, dtype=torch.float64)
    for (k, v), q_len, shown in zip(world.dense, q_lens, world.visible, strict=True):
        kv_len = k.shape[0]
        keys, values = (item.repeat_interleave(spec.group_size, dim=1).transpose(0, 1) for item in (k, v))
        for token in range(q_len):
            query = kv_len - q_len + token
            key = torch.arange(kv_len)
            sees = torch.ones(kv_len, dtype=torch.bool) if shown is None else shown[token].clone()
            if spec.causal:
                sees &= key <= query
            if resolved.window is not None:
                sees &= query - key < resolved.window
            logits = torch.einsum("hd,hkd->hk", q[row], keys) * resolved.scale
            if resolved.soft_cap is not None:
                logits = resolved.soft_cap * torch.tanh(logits / resolved.soft_cap)
            if resolved.alibi_slopes is not None:
                logits = logits + resolved.alibi_slopes.cpu().double()[:, None] * (key - query)
            logits = logits.masked_fill(~sees, -math.inf)
            if resolved.sinks is not None:
                logits = torch.cat([logits, resolved.sinks.cpu().double()[:, None]], dim=1)
            if logits.shape[1] and logits.max() > -math.inf:
                lses[row] = torch.logsumexp(logits, dim=1)
                outs[row] = torch.einsum("hk,hkd->hd", (logits - lses[row][:, None]).exp()[:, :kv_len], values)
            row += 1
    return outs, lses


class Tuned:
    """A plugin that answers the tuning hook."""

    def __init__(self, **values: int) -> None:
        self.values = values

    @hookimpl
    def fi_tuning(self, op: str) -> dict[str, int] | None:
        return self.values if op == "attention" else None


@pytest.fixture
def tuned(request):
    """The test's parameters of the family: few workers and small steps, so that little work is cut in many places."""
    plugin = Tuned(**getattr(request, "param", {"step": 32, "workers_per_processor": 3}))
    registry().register_plugin(plugin, "test-tuning")
    yield plugin
    registry().manager.unregister(plugin)


def run(world: World, layer: LayerArgs, device: str, update_from: str | None = None):
    """Plan on poisoned workspace, run into poisoned outputs, compare; returns (state, out, lse)."""
    spec, kernel = world.spec, TritonAttention()
    state = kernel.plan(spec, world.capacity, device)
    assert sum(item.nbytes for item in state.workspace) == kernel.workspace_bytes(spec, world.capacity, device)
    for item in state.workspace:
        item.fill_(255)
    batch = world.batch
    if update_from is not None:
        names = ("q_indptr", "kv_lens", "table", "table_row", "table_indptr", "kv_indptr")
        batch = replace(batch, **{n: getattr(batch, n).to(update_from) for n in names if getattr(batch, n) is not None})
    state.update(batch)
    shape = (world.q.shape[0], spec.num_qo_heads)
    out = torch.full((*shape, spec.head_dim_vo or 0), SENTINEL, dtype=spec.dtype, device=device)
    lse = torch.full(shape, SENTINEL, device=device)
    state.run(world.q, world.kv, layer.resolve(spec), out, lse)
    check(world, layer, out, lse)
    return state, out, lse


def check(world: World, layer: LayerArgs, out: torch.Tensor, lse: torch.Tensor) -> None:
    want_out, want_lse = expected(world, layer)
    used = want_out.shape[0]
    out, lse = out.cpu().double(), lse.cpu().double()
    assert (out[used:] == SENTINEL).all() and (lse[used:] == SENTINEL).all()
    assert torch.equal(lse[:used] == -math.inf, want_lse == -math.inf)
    seen = want_lse > -math.inf
    torch.testing.assert_close(lse[:used][seen], want_lse[seen], rtol=1e-5, atol=1e-5)
    error = (out[:used] - want_out).norm() / want_out.norm().clamp(min=1e-9)
    assert error <= TOLERANCE[world.spec.dtype], f"relative error {error:.2e}"
    assert (out[:used][~seen] == 0).all()


S = AttentionSpec
CASES = {
    "decode": (S(4, 2, 16, dtype=FP32), [1, 1, 1], [5, 70, 300], {}),
    "mixed": (S(4, 2, 16, dtype=FP32), [1, 40, 0, 1], [5, 70, 30, 0], {}),
    "more queries than keys": (S(4, 2, 16, dtype=FP32), [40, 3], [9, 0], {}),
    "padding rows only": (S(4, 2, 16, dtype=FP32), [1, 1], [0, 0], {}),
    "odd page, odd dims, no causality": (
        S(4, 2, 24, 40, dtype=FP32, page_size=5, table="indptr", causal=False), [3, 40, 7], [5, 200, 30], {},
    ),
    "ragged HND": (S(4, 2, 16, dtype=FP32, page_size=None, table="ragged", kv_layout="HND"), [3, 40, 9], [5, 200, 4], {}),
    "slot table, row per request, sinks, soft cap": (
        S(6, 2, 16, dtype=FP32, page_size=1, features={"sinks", "soft_cap"}), [1, 50, 1], [0, 200, 300], {"table_row": True},
    ),
    "page 256 HND": (S(3, 1, 16, dtype=FP32, page_size=256, kv_layout="HND"), [2, 1], [300, 600], {}),
    "mask over all keys, alibi": (
        S(4, 2, 16, dtype=FP32, features={"alibi", "mask"}), [5, 50, 1], [20, 130, 3], {"mask": "kv"},
    ),
    "tree mask": (S(4, 2, 16, dtype=FP32, features={"mask"}, causal=False), [5, 50, 1], [20, 130, 3], {"mask": "new"}),
    "tree mask beyond the keys": (S(4, 2, 16, dtype=FP32, features={"mask"}), [12, 40], [4, 30], {"mask": "new"}),
    "wide group": (S(40, 1, 16, dtype=FP32), [1, 2, 3], [90, 60, 33], {"max_q_len": 3}),
    "bf16": (S(4, 2, 64, dtype=BF16), [1, 70], [100, 300], {}),
    "fp16 d80": (S(4, 2, 80, dtype=FP16), [1, 70], [100, 300], {}),
    "e4m3, scale per head": (S(4, 2, 64, dtype=BF16, kv_format="fp8_e4m3"), [1, 20], [100, 150], {"scales": "head"}),
    "e4m3 bytes, scalar scale": (
        S(4, 2, 64, dtype=BF16, kv_format="fp8_e4m3"), [1, 20], [100, 150], {"scales": "scalar", "as_bytes": True},
    ),
    "e5m2, float scale": (S(4, 2, 64, dtype=FP32, kv_format="fp8_e5m2"), [1, 20], [100, 150], {"scales": "float"}),
    "e5m2, no scale": (S(4, 2, 64, dtype=FP16, kv_format="fp8_e5m2"), [1], [100], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_formula(name, device, tuned):
    spec, q_lens, kv_lens, options = CASES[name]
    world = build(spec, q_lens, kv_lens, device, **options)
    run(world, layer_for(spec, device, spec.windows[0]), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 50, None])
def test_windows_of_one_plan(window, causal, device, tuned):
    features = {"sinks", "mask"} if causal else set()
    spec = S(4, 2, 16, dtype=FP32, page_size=3, windows=(None, 1, 7, 50, 7), features=features, causal=causal)
    world = build(spec, [3, 40, 1], [60, 130, 200], device, mask="new" if causal else None)
    if window is not None:  # pages that no query sees any more may have been given away
        for request, first_position in enumerate([57, 90, 199]):
            world.batch.table[request, : max(first_position - window + 1, 0) // 3] = -(10**6)
    state, _, _ = run(world, layer_for(spec, device, window), device)
    assert "4 work lists" in "\n".join(state.describe())


@pytest.mark.parametrize("tuned", [{"step": 16, "workers_per_processor": 20}], indirect=True)
def test_more_workers_than_steps(device, tuned):
    """Every step is an item of its own and many workers are empty: all results come out of merges."""
    spec = S(4, 2, 16, dtype=FP32, features={"sinks"})
    run(build(spec, [1, 2], [400, 100], device), layer_for(spec, device, None), device)


def test_second_update_replaces_the_first(device, tuned):
    spec = S(4, 2, 16, dtype=FP32)
    first = build(spec, [1, 1, 1], [300, 70, 5], device, max_q_len=40)
    second = build(spec, [40], [90], device, max_q_len=40, seed=1)
    capacity = Capacity(4, 40, 40, 300)
    state = TritonAttention().plan(spec, capacity, device)
    layer = layer_for(spec, device, None)
    for world in (first, second, first):
        state.update(world.batch)
        out = torch.full((world.q.shape[0], 4, 16), SENTINEL, device=device)
        lse = torch.full(out.shape[:2], SENTINEL, device=device)
        state.run(world.q, world.kv, layer.resolve(spec), out, lse)
        check(world, layer, out, lse)


@pytest.mark.parametrize("tuned", [{"step": 64, "big_step": 128, "workers_per_processor": 3}], indirect=True)
def test_batch_invariant_results_do_not_depend_on_the_batch(device, tuned):
    spec = S(4, 2, 16, dtype=FP32, features={"sinks"}, batch_invariant=True)
    layer = layer_for(spec, device, None)
    world = build(spec, [5, 50, 1], [20, 130, 2500], device)
    world.capacity = Capacity(8, 100, 50, 2600)
    state, out, lse = run(world, layer, device)
    alone = replace(
        world.batch,
        q_indptr=torch.tensor([0, 1], dtype=torch.int32, device=device),
        kv_lens=world.batch.kv_lens[2:],
        table=world.batch.table[2:],
    )
    state.update(alone)
    again, lse_again = torch.empty_like(out[:1]), torch.empty_like(lse[:1])
    state.run(world.q[55:56], world.kv, layer.resolve(spec), again, lse_again)
    assert torch.equal(again, out[55:56]) and torch.equal(lse_again, lse[55:56])


def test_empty_batch_writes_nothing(device, tuned):
    spec = S(4, 2, 16, dtype=FP32)
    run(build(spec, [], [], device), layer_for(spec, device, None), device)


def test_cache_views_with_a_shared_buffer_and_padded_strides(device, tuned):
    """K and V interleaved in one tensor, q and out rows that are part of wider rows."""
    spec = S(4, 2, 16, dtype=FP32)
    world = build(spec, [1, 20], [90, 40], device)
    both = torch.stack([world.kv.k, world.kv.v], dim=1)
    world.kv = KVCache(both[:, 0], both[:, 1])
    wide = torch.full((world.q.shape[0], 4, 32), math.nan, device=device)
    wide[:, :, :16] = world.q
    world.q = wide[:, :, :16]
    state = TritonAttention().plan(spec, world.capacity, device)
    state.update(world.batch)
    outs = torch.full((world.q.shape[0], 4, 32), SENTINEL, device=device)
    lse = torch.full((world.q.shape[0], 8), SENTINEL, device=device)
    layer = layer_for(spec, device, None)
    state.run(world.q, world.kv, layer.resolve(spec), outs[:, :, :16], lse[:, :4])
    check(world, layer, outs[:, :, :16], lse[:, :4])
    assert (outs[:, :, 16:] == SENTINEL).all() and (lse[:, 4:] == SENTINEL).all()


def test_lengths_on_the_host_give_the_same_bits(device, tuned):
    spec = S(4, 2, 16, dtype=FP32, page_size=3)
    world = build(spec, [1, 20, 0], [90, 40, 7], device)
    layer = layer_for(spec, device, None)
    _, out, lse = run(world, layer, device)
    _, host_out, host_lse = run(world, layer, device, update_from="cpu")
    assert torch.equal(out, host_out) and torch.equal(lse, host_lse)


@pytest.mark.parametrize("tuned", [{"num_cheeses": 3}], indirect=True)
def test_unknown_tuning_names_are_refused(device, tuned):
    with pytest.raises(ArgumentError, match="num_cheeses"):
        TritonAttention().workspace_bytes(S(4, 2, 64), Capacity(1, 1, 1, 16), device)


def test_batch_invariant_workspace_stays_within_its_budget(device):
    spec = S(32, 8, 128, batch_invariant=True)
    small = TritonAttention().workspace_bytes(spec, Capacity(8, 8, 1, 131072), device)
    large = TritonAttention().workspace_bytes(spec, Capacity(256, 8192, 2048, 131072), device)
    assert small < large < 1 << 30


@pytest.mark.parametrize("tuned", [{"step": 48}], indirect=True)
def test_tile_sizes_must_be_powers_of_two(device, tuned):
    with pytest.raises(ArgumentError, match=r"tuning\.step: expected a power of two from 16 on, got 48"):
        TritonAttention().workspace_bytes(S(4, 2, 64), Capacity(1, 1, 1, 16), device)


def test_stages_fit_a_processor_with_less_shared_memory():
    spec, capacity = AttentionSpec(32, 8, 128), Capacity(8, 8192, 4096, 8192)
    hopper, smaller = built_in_tuning(spec, capacity), built_in_tuning(spec, capacity, 99 << 10)
    assert (hopper.num_stages, smaller.num_stages) == (3, 2)
    tile_bytes = smaller.big_rows * 128 * 2 + smaller.num_stages * smaller.big_step * 512
    assert tile_bytes <= 99 << 10
