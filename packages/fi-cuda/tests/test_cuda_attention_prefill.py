"""The prefill kernel's spec, tuning and plan state, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fi_core.contract import Target
from fi_core.errors import ArgumentError
from fi_core.hookspecs import hookimpl
from fi_core.ops import OPERATIONS
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs, PackedMask
from fi_core.registry import registry
from fi_core.rope import FusedRope, RopeConfig, RopeTable
from fi_cuda.entries import ATTENTION_ENTRIES
from fi_cuda.kernels.attention import prefill_state, prefill_tuning
from fi_cuda.kernels.attention.call import CallForm
from fi_cuda.kernels.attention.plan import DeviceWorkList, fill_on_host
from fi_cuda.kernels.attention.prefill import BoxPrefillSpec, PrefillSpec, prefill_spec
from fi_cuda.kernels.attention.prefill_state import attention_prefill
from fi_cuda.kernels.attention.prefill_tuning import (
    HeadBytes,
    PrefillTuning,
    box_tokens,
    built_in_prefill_tuning,
    prefill_shared_bytes,
    prefill_tuning_for,
)
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
SPEC = AttentionSpec(8, 2, 64)
CAPACITY = Capacity(max_batch=5, max_q_tokens=300, max_q_len=200, max_kv_len=500)
TUNING = PrefillTuning(2, 64, 64, 2, 2, 1, True, True, 1, "apart", 1, 1, 2)


class Override:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "attention_prefill" else None


def overridden(given, spec=SPEC, levels=False):
    plugin = Override(given)
    manager = registry().manager
    manager.register(plugin)
    try:
        return prefill_tuning_for(spec, CPU, levels)
    finally:
        manager.unregister(plugin)


# Tuning


@pytest.mark.parametrize(
    ("head_dim", "head_dim_vo"), [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
@pytest.mark.parametrize("page_size", [None, 1, 16, 256])
@pytest.mark.parametrize("formats", [{}, {"kv_format": "fp8_e4m3"}, {"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3"}])
def test_built_in_tiles_fit_the_shared_memory(head_dim, head_dim_vo, page_size, formats):
    table = "dense" if page_size else "ragged"
    spec = AttentionSpec(32, 8, head_dim, head_dim_vo, page_size=page_size, table=table, **formats)
    tuning = built_in_prefill_tuning(spec)
    assert prefill_shared_bytes(tuning, HeadBytes.of(spec)) <= HOPPER_SHARED_BYTES and tuning.key_stages >= 2
    by_boxes = spec.kv_is_fp8 and page_size != 1 and (head_dim, head_dim_vo) != (192, 128)  # for which there is no room
    assert tuning.landing_stages == (2 if spec.q_is_fp8 or by_boxes else 0)
    assert box_tokens(page_size, tuning.tokens) == {None: tuning.tokens, 1: None, 16: 16, 256: tuning.tokens}[page_size]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 8}, "rows"),
        ({"consumers": 5}, "consumers"),
        ({"tokens": 100}, "tokens"),
        ({"tokens": 96, "edge_tokens": 40}, "edge_tokens"),
        ({"value_stages": 0}, "value_stages"),
        ({"key_stages": 20}, "key_stages"),
        ({"landing_stages": 1}, "landing_stages"),
        ({"landing_stages": 2}, "landing_stages"),  # K and V are multiplied as they are stored
    ],
)
def test_wrong_tunings_are_named(given, message, monkeypatch):
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    with pytest.raises(ArgumentError, match=message):
        overridden(given)


def test_plans_with_levels_need_a_second_stage_of_keys(monkeypatch):
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    assert overridden({"key_stages": 1}).key_stages == 1
    with pytest.raises(ArgumentError, match="tuning.key_stages: expected 2 or more where plans have levels"):
        overridden({"key_stages": 1}, levels=True)


@pytest.mark.parametrize(("page_size", "tokens"), [(None, 80), (8, 80), (16, 80), (64, 64), (1, 64)])
def test_wide_heads_have_steps_that_their_pages_fit(page_size, tokens):
    spec = replace(SPEC, head_dim=256, head_dim_vo=256, page_size=page_size, table="dense" if page_size else "ragged")
    tuning = built_in_prefill_tuning(spec)
    assert (tuning.tokens, tuning.key_stages) == (tokens, 2 if tokens == 80 else 3)
    assert built_in_prefill_tuning(replace(spec, kv_format="fp8_e4m3")).tokens == 64


def test_fp8_may_land_and_fp8_queries_have_to(monkeypatch):
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    stored = replace(SPEC, kv_format="fp8_e4m3")
    assert overridden({"landing_stages": 3}, stored).landing_stages == 3
    for given, spec in (
        ({"landing_stages": 2}, replace(stored, page_size=1)),
        ({"landing_stages": 0}, replace(stored, q_format="fp8_e4m3")),
    ):
        with pytest.raises(ArgumentError, match="landing_stages"):
            overridden(given, spec)


def test_a_tile_has_whole_tokens():
    kinds = {group: TUNING.kind(group) for group in (1, 3, 4, 7, 64)}
    assert {group: kind.q_rows for group, kind in kinds.items()} == {1: 128, 3: 126, 4: 128, 7: 126, 64: 128}
    assert all(kind.q_rows % group == 0 for group, kind in kinds.items())


# Selection

ROTATED = {"rope": "q", "rope_pairs": "half", "rotary_dim": 64}


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({"max_q_len": 17}, True),
        ({"max_q_len": 1}, False),
        ({"max_q_len": 16, "group_size": 4}, False),
        ({"max_q_len": 16, "group_size": 8}, False),
        ({"max_q_len": 17, "group_size": 64}, True),
        ({"max_q_len": 17, "group_size": 65}, False),
        ({"max_q_len": 4096, "page_size": 1}, True),
        ({"max_q_len": 4096, "page_size": None, "table": "ragged", "causal": False, "windowed": True}, True),
        ({"max_q_len": 4096, "dtype": torch.float16, "kv_format": "fp8_e5m2"}, True),
        ({"max_q_len": 4096, "dtype": torch.float16}, False),
        ({"max_q_len": 4096, "head_dim": 272}, False),
        ({"max_q_len": 4096, "features": frozenset({"soft_cap", "sinks", "alibi", "mask", "lse"})}, True),
    ],
)
def test_what_is_served(changes, served):
    attention = next(operation for operation in OPERATIONS if operation.name == "attention")
    entry = next(entry for entry in ATTENTION_ENTRIES if entry.name == "attention_prefill")
    values = {**attention.typical, **changes}
    assert (not entry.reject(attention.request(Target("cuda", (9, 0)), **values))) == served
    assert entry.reject(attention.request(Target("cuda", (10, 0)), **values))
    assert entry.reject(attention.request(Target("cpu"), **values))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "attention_prefill"),
        ({"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "page_size": 1}, "attention_prefill_fp8"),
        ({"kv_format": "fp8_e5m2", "q_format": "fp8_e4m3"}, None),
        ({"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "head_dim": 80}, None),
        ({"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", **ROTATED}, None),
        (ROTATED, "attention_prefill_rotated"),
        ({**ROTATED, "kv_format": "fp8_e4m3"}, "attention_prefill_rotated"),
        ({**ROTATED, "rope": "qk"}, None),
    ],
)
def test_each_request_has_one_kernel_of_long_queries(changes, name):
    attention = next(operation for operation in OPERATIONS if operation.name == "attention")
    request = attention.request(Target("cuda", (9, 0)), **{**attention.typical, "max_q_len": 500, **changes})
    serving = [entry for entry in ATTENTION_ENTRIES if not entry.reject(request)]
    assert [entry.name for entry in serving] == ([] if name is None else [name])


# Agreement with the kernel

EVERY = CallForm(windowed=True, lse=True, k_scales=True, v_scales=True, table_row=True, mask_columns="new", boxes=True)
ALL_FP8 = replace(SPEC, kv_format="fp8_e4m3", q_format="fp8_e4m3")
KERNELS = {
    "boxes": prefill_spec(SPEC, TUNING, CallForm(boxes=True)),
    "rows": prefill_spec(replace(SPEC, page_size=1), TUNING, CallForm()),
    "fp8": prefill_spec(replace(SPEC, kv_format="fp8_e4m3"), TUNING, CallForm(k_scales=True)),
    "features": prefill_spec(
        AttentionSpec(14, 2, 96, 80, features=frozenset({"soft_cap", "sinks", "alibi", "mask"})), TUNING, EVERY
    ),
    "fp8 landed": prefill_spec(
        replace(SPEC, kv_format="fp8_e5m2"), replace(TUNING, landing_stages=2), CallForm(boxes=True)
    ),
    "fp8 products": prefill_spec(ALL_FP8, built_in_prefill_tuning(ALL_FP8), CallForm(boxes=True, q_scales=True)),
    "fp8 products by rows": prefill_spec(
        replace(ALL_FP8, page_size=1), built_in_prefill_tuning(replace(ALL_FP8, page_size=1)), CallForm()
    ),
    "rotated": prefill_spec(replace(SPEC, rope=FusedRope(64)), TUNING, CallForm(boxes=True)),
    "signed": prefill_spec(SPEC, TUNING, CallForm(signed_scale=True, mask_columns="kv", boxes=True)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_agrees_on_fields_and_shared_memory(name, compile_with_offsets):
    made = KERNELS[name]
    fits = f"static_assert((sizeof(fi::PrefillShared<Config>) + 2047) / 1024 >= {made.shared_bytes // 1024});"
    resources = compile_with_offsets(made, fits).resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == 0


# Calls


def dense_batch(q_lens, kv_lens, **others):
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    table = torch.zeros(len(q_lens), 40, dtype=torch.int32)
    return Batch(q_indptr, torch.tensor(kv_lens, dtype=torch.int32), table, **others)


def test_an_update_from_the_cpu_fills_the_list(prefill_launches):
    made = attention_prefill.plan(SPEC, CAPACITY, "cpu")
    assert "boxes of 16 tokens" in "\n".join(made.describe())
    batch = dense_batch([100, 20, 0, 1], [400, 20, 3, 0])
    made.update(batch)
    found = made._layout
    lists = found.lists[None].of(made.workspace[0])
    wanted = DeviceWorkList(*(torch.empty_like(tensor) for tensor in lists))
    fill_on_host(batch.q_indptr, batch.kv_lens, found.params[None], wanted)
    num_items = int(wanted.worker_indptr[-1])
    assert num_items >= 2 * 5 and torch.equal(lists.items[:num_items], wanted.items[:num_items])
    assert found.partials.shape == (21, 192, 64)
    assert found.num_bytes == attention_prefill.workspace_bytes(SPEC, CAPACITY, "cpu") == made.workspace[0].numel()
    assert (found.arrivals.of(made.workspace[0]) == 0).all()
    assert made._orders[None].header.tolist() == [5, 1, 0, 0]  # shares would take as long, and their pieces are merged


def test_many_tiles_are_ordered_by_their_steps(prefill_launches):
    capacity = Capacity(max_batch=9, max_q_tokens=5000, max_q_len=3000, max_kv_len=4000)
    spec = replace(SPEC, windows=(None, 1500))
    made = attention_prefill.plan(spec, capacity, "cpu")
    q_lens = (3000, 1, 0, 700, 40)
    batch = dense_batch(q_lens, [3100, 3500, 3, 650, 40])
    made.update(batch)
    tiles = {(request, tile) for request, tokens in enumerate(q_lens) for tile in range(-(-tokens // 48))}
    for window, (items, header, _) in made._orders.items():
        rows = items[: len(tiles)].tolist()
        assert header.tolist() == [len(tiles), 1, 0, 0]
        assert {(row[0], row[2]) for row in rows} == tiles
        # Tiles of a warpgroup's 16 tokens or fewer may stand earlier than their steps say.
        tokens = made._tuning.tokens
        spec = made._order_specs[window]
        left = [(row[9] - 48 * row[2], -(-(row[5] - row[4]) // tokens)) for row in rows]
        steps = [spec.full_steps(steps, num_tokens) for num_tokens, steps in left if num_tokens > 16]
        assert steps == sorted(steps, reverse=True)
        q_indptr = batch.q_indptr.tolist()
        for request, _, tile, _, begin, stop, slot, _, q_begin, q_len, kv_len, merge, *rest in rows:
            assert (q_begin, q_begin + q_len) == (q_indptr[request], q_indptr[request + 1])
            assert kv_len == batch.kv_lens[request] and (slot, merge, any(rest)) == (-1, -1, False)
            assert stop == max(kv_len - q_len + min((tile + 1) * 48, q_len), 0)
            first = 0 if window is None else max(kv_len - q_len + tile * 48 - window + 1, 0)
            assert begin == min(first, stop) // 16 * 16  # a page, which a copy lies in


def test_short_queries_are_spread_over_longer_tiles(prefill_launches):
    capacity = Capacity(max_batch=200, max_q_tokens=5000, max_q_len=4096, max_kv_len=4096)
    made = attention_prefill.plan(SPEC, capacity, "cpu")
    made.update(dense_batch([4096] + [1] * 127, [4096] + [2048] * 127))
    items, header, _ = made._orders[None]
    rows = items[: header[0]].tolist()
    places = [place for place, row in enumerate(rows) if row[9] == 1]
    natural = next(place for place, row in enumerate(rows) if row[9] > 1 and row[5] <= 2048)
    assert len(places) == 127 and max(places) < natural + 127
    assert 10 < sum(place < natural // 4 for place in places) < 60  # some in every part


def test_split_points_of_a_batch_invariant_plan_depend_on_no_order(prefill_launches):
    made = attention_prefill.plan(replace(SPEC, batch_invariant=True), CAPACITY, "cpu")
    made.update(dense_batch([100, 200], [400, 400]))
    assert not made._orders[None].header.any()


def test_a_call_passes_each_value_under_its_name(prefill_launches):
    spec = AttentionSpec(
        8, 2, 64, 32, kv_format="fp8_e4m3", kv_layout="HND", windows=(None, 64),
        features=frozenset({"lse", "soft_cap", "sinks", "alibi", "mask"}),
    )  # fmt: skip
    made = attention_prefill.plan(spec, CAPACITY, "cpu")
    rows = torch.zeros(3, dtype=torch.int32)
    mask = PackedMask(torch.zeros(999, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "new")
    batch = dense_batch([1, 20, 1], [400, 500, 3], table_row=rows, mask=mask)
    made.update(batch)
    scales = torch.tensor([0.5, 2.0])
    k = torch.zeros(9, 2, 16, 64, dtype=torch.float8_e4m3fn)
    kv = KVCache(k, torch.zeros(9, 2, 16, 32, dtype=k.dtype), "HND", "fp8_e4m3", k_scale=scales, v_scale=0.25)
    sinks, slopes = torch.zeros(8), torch.zeros(8)
    layer = LayerArgs(scale=0.3, soft_cap=20.0, window=64, sinks=sinks, alibi_slopes=slopes).resolve(spec)
    q = torch.zeros(22, 3 * 8, 64, dtype=torch.bfloat16)[:, :8]
    out, lse = torch.zeros(22, 8, 32, dtype=torch.bfloat16), torch.zeros(22, 9)[:, :8]
    made.run(q, kv, layer, out, lse)
    grid, values, kernel = prefill_launches.last["attention_prefill"]
    found, buffer = made._layout, made.workspace[0]
    lists = found.lists[64].of(buffer)
    tensors = {
        **{"starts": lists.starts, "items": lists.items, "k": kv.k, "v": kv.v, "out": out, "lse": lse},
        **{"order_items": made._orders[64].items, "order": made._orders[64].header},
        **{name: getattr(found, name).of(buffer) for name in ("arrivals", "partials", "partial_rows")},
        **{name: getattr(found, name).of(buffer) for name in ("dense", "dense_records")},
        **{"table": batch.table, "table_row": rows, "mask_bits": mask.bits, "mask_indptr": mask.indptr},
        **{"sinks": sinks, "slopes": slopes, "k_scales": scales},
    }
    numbers = {
        **{"k_stride_page": 2048, "k_stride_token": 64, "k_stride_head": 1024},
        **{"v_stride_page": 1024, "v_stride_token": 32, "v_stride_head": 512},
        **{"out_stride_token": 256, "out_stride_head": 32, "lse_stride_token": 9, "table_stride": 40},
        **{"k_scale_stride": 1, "v_scale_stride": 0, "num_kv_heads": 2, "dense_steps": 0},
        **{"window": 64, "scale": 0.3, "soft_cap": 20.0, "v_scale": 0.25, "kv_indptr": 0, "v_scales": 0},
        **{"inv_freq": 0, "q_scales": 0, "q_scale_stride": 0, "rope_factor": 1.0},
        "queries": (q.data_ptr(), (16, 4, 64)),
        "keys": ("keys", 16, 128),
        "values": ("values", 16, 128),
    }
    assert grid == (7, 1) and values == {**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **numbers}
    assert type(kernel) is BoxPrefillSpec and kernel.stored == torch.float8_e4m3fn and kernel.windowed and kernel.lse
    assert "changed in shared memory" in "\n".join(made.describe())
    assert (kernel.mask, kernel.table, kernel.table_row, kernel.k_scales, kernel.v_scales) == (2, 1, True, True, False)


def test_boxes_and_negative_scales_choose_their_kernels(prefill_launches, monkeypatch):
    made = attention_prefill.plan(SPEC, CAPACITY, "cpu")
    made.update(dense_batch([100], [400]))
    q = torch.zeros(100, 8, 64, dtype=torch.bfloat16)
    kv = KVCache(*torch.zeros(2, 9, 16, 2, 64, dtype=torch.bfloat16))
    for scale, signed in ((0.1, False), (-0.1, True), (0.0, True)):
        made.run(q, kv, LayerArgs(scale=scale).resolve(SPEC), torch.empty_like(q), None)
        _, values, kernel = prefill_launches.last["attention_prefill"]
        assert type(kernel) is BoxPrefillSpec and kernel.signed_scale == signed
        assert values["scale"] == scale
        assert values["keys"] == ("keys", 16, 128) and values["values"] == ("values", 16, 128)
    empty = KVCache(*torch.zeros(2, 0, 16, 2, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(prefill_state, "column_maps_of", lambda kv, *box: None)
    made.run(q, empty, LayerArgs().resolve(SPEC), torch.empty_like(q), None)
    assert type(prefill_launches.last["attention_prefill"][2]) is PrefillSpec
    prefill_launches.last.clear()
    made.run(q[:0], kv, LayerArgs().resolve(SPEC), torch.empty_like(q[:0]), None)
    assert not prefill_launches.last  # nothing to do


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "window", "causal"), [(8, None, True), (8, 300, True), (2, None, False)])
def test_the_gpu_orders_tiles_as_the_host_does(heads, window, causal):
    generator = torch.Generator().manual_seed(heads)
    spec = AttentionSpec(heads * 4, heads, 128, causal=causal, windows=(window,))
    capacity = Capacity(max_batch=700, max_q_tokens=60000, max_q_len=4000, max_kv_len=70000)
    made = attention_prefill.plan(spec, capacity, "cuda")
    used = []
    for size in (1, 3, 64, 600):
        q_lens = torch.randint(0, min(60000 // size, 4000), (size,), generator=generator)
        kv_lens = (q_lens + torch.randint(-20, 1000, (size,), generator=generator)).clamp(min=0).int()
        q_indptr = torch.cat([torch.zeros(1), q_lens.cumsum(0)]).int()
        table = torch.zeros(size, 5000, dtype=torch.int32)
        found = []
        for device in ("cpu", "cuda"):
            order = made._orders[window]
            order.header.fill_(-7)
            order.items.fill_(-7)
            made.update(Batch(*(tensor.to(device) for tensor in (q_indptr, kv_lens, table))))
            header = order.header.tolist()
            found.append((header, order.items[: header[0] if header[1] else 0].tolist()))
        assert found[0] == found[1]
        used.append(found[0][0][1])
    assert 1 in used


def test_a_call_passes_scales_of_queries_and_frequencies(prefill_launches):
    made = attention_prefill.plan(ALL_FP8, CAPACITY, "cpu")
    made.update(dense_batch([1, 20], [400, 500]))
    k = torch.zeros(9, 16, 2, 64, dtype=torch.float8_e4m3fn)
    scales = torch.ones(8)
    q = torch.zeros(21, 8, 64, dtype=torch.float8_e4m3fn)
    out = torch.zeros(21, 8, 64, dtype=torch.bfloat16)
    made.run(q, KVCache(k, k, k_scale=2.0), LayerArgs(scale=0.3, q_scale=scales).resolve(ALL_FP8), out, None)
    _, values, kernel = prefill_launches.last["attention_prefill"]
    assert (values["q_scales"], values["q_scale_stride"], values["scale"]) == (scales.data_ptr(), 1, 0.6)
    assert values["queries"] == (q.data_ptr(), (16, 4, 128)) and values["keys"] == ("keys", 16, 128)
    assert type(kernel) is BoxPrefillSpec and kernel.query == torch.float8_e4m3fn and kernel.q_scales

    spec = replace(SPEC, rope=FusedRope(32, "interleaved"))
    made = attention_prefill.plan(spec, CAPACITY, "cpu")
    made.update(dense_batch([1, 20], [400, 500]))
    table = RopeTable.make(RopeConfig(32, pairs="interleaved"), "cpu")
    k, q = k.bfloat16(), q.bfloat16()
    made.run(q, KVCache(k, k), LayerArgs(rope=table).resolve(spec), out, None)
    _, values, kernel = prefill_launches.last["attention_prefill"]
    assert (values["inv_freq"], values["rope_factor"]) == (table.inv_freq.data_ptr(), 1.0)
    assert (kernel.rotary_dim, kernel.rope_pairs) == (32, 2)
