"""The plan state of the decode kernel, without a GPU: tuning, layout, what an update and a call pass."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import fields, replace

import pytest
import torch
from fi_core.hookspecs import hookimpl
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs, PackedMask
from fi_core.registry import registry
from fi_core.rope import FusedRope, RopeConfig, RopeTable, YarnScaling
from fi_cuda.kernels.attention import layout, plan, state, tuning
from fi_cuda.kernels.attention.call import CallForm
from fi_cuda.kernels.attention.decode import DecodeSpec, decode_spec
from fi_cuda.kernels.attention.plan import DeviceWorkList, fill_on_host
from fi_cuda.kernels.attention.state import attention_decode
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES, DecodeTuning, partition_params

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
SPEC = AttentionSpec(8, 2, 64)
CAPACITY = Capacity(max_batch=5, max_q_tokens=10, max_q_len=2, max_kv_len=500)


@pytest.fixture
def launches(monkeypatch, recorder):
    """A machine of 7 processors whose kernels are recorded instead of launched."""
    for module in (plan, state):
        monkeypatch.setattr(module, "kernel_for", recorder.kernel_for)
    monkeypatch.setattr(layout, "num_processors", lambda device: 7)
    monkeypatch.setattr(tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    monkeypatch.setattr(state, "maps_of", lambda kv, num_tokens: None)
    return recorder


def cache(spec, pages=9, **scales):
    shape = (
        (pages, spec.page_size, spec.num_kv_heads)
        if spec.kv_layout == "NHD"
        else (pages, spec.num_kv_heads, spec.page_size)
    )
    k = torch.zeros(*shape, spec.head_dim, dtype=spec.kv_dtype)
    v = torch.zeros(*shape, spec.head_dim_vo, dtype=spec.kv_dtype)
    return KVCache(k, v, spec.kv_layout, spec.kv_format, **scales)


def dense_batch(q_lens, kv_lens, **others):
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    table = torch.zeros(len(q_lens), 40, dtype=torch.int32)
    return Batch(q_indptr, torch.tensor(kv_lens, dtype=torch.int32), table, **others)


class Override:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "attention_decode" else None


def test_tuning_reaches_kernel_and_partition(launches):
    manager = registry().manager
    sizes = {"rows": 16, "chunk_tokens": 32, "num_warps": 4, "num_stages": 2}
    plugin = Override({**sizes, "workers_per_processor": 2, "item_cost": 9, "step_cost": 2})
    manager.register(plugin)
    try:
        made = attention_decode.plan(SPEC, CAPACITY, "cpu")
    finally:
        manager.unregister(plugin)
    made.update(dense_batch([1], [300]))
    kv = cache(SPEC)
    q = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    made.run(q, kv, LayerArgs().resolve(SPEC), torch.empty_like(q), None)
    grid, _, kernel = launches.last["attention_decode"]
    assert grid == (14, 1) and (kernel.rows, kernel.chunk_tokens, kernel.stages) == (16, 32, 2)
    planner = next(spec for spec in launches.specs if spec.stem == "attention_plan")
    (kind,) = planner.kinds
    assert (planner.num_workers, kind.q_rows, kind.kv_tokens, kind.item_cost, kind.step_cost) == (14, 16, 16, 18, 2)


# Agreement with the kernel


KERNELS = {
    "bf16": decode_spec(SPEC, DecodeTuning(8, 16, 4, 6, 1, 4, 1), CallForm()),
    "boxes": decode_spec(SPEC, DecodeTuning(8, 16, 4, 6, 1, 4, 1), CallForm(boxes=True)),
    "narrow": decode_spec(AttentionSpec(8, 2, 80, 48), DecodeTuning(8, 16, 4, 6, 1, 4, 1), CallForm()),
    "fp8": decode_spec(
        AttentionSpec(8, 2, 128, 64, kv_format="fp8_e4m3"), DecodeTuning(16, 32, 8, 2, 1, 4, 1), CallForm()
    ),
    "tall": decode_spec(AttentionSpec(64, 2, 128), DecodeTuning(64, 32, 8, 3, 1, 4, 1, 4), CallForm()),
    "rotated": decode_spec(AttentionSpec(8, 2, 96, rope=FusedRope(64)), DecodeTuning(8, 32, 4, 3, 1, 4, 1), CallForm()),
    "rotated keys": decode_spec(
        AttentionSpec(64, 2, 96, rope=FusedRope(96, keys=True)), DecodeTuning(32, 16, 8, 3, 1, 4, 1, 2), CallForm()
    ),
    "rotated FP8 keys": decode_spec(
        AttentionSpec(8, 2, 128, kv_format="fp8_e5m2", rope=FusedRope(96, keys=True)),
        DecodeTuning(8, 16, 8, 3, 1, 4, 1),
        CallForm(),
    ),
    "interleaved FP8 keys": decode_spec(
        AttentionSpec(8, 2, 64, kv_format="fp8_e4m3", rope=FusedRope(48, "interleaved", keys=True)),
        DecodeTuning(8, 32, 4, 3, 1, 4, 1),
        CallForm(),
    ),
    "plan": plan.plan_spec(partition_params(SPEC, CAPACITY, DecodeTuning(8, 16, 4, 6, 1, 4, 1), None, 132), CAPACITY),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_agrees_on_fields_and_shared_memory(name, compile_with_offsets):
    made = KERNELS[name]
    equal = f"static_assert(fi::DecodeShared<Config>::kBytes == {made.shared_bytes});"
    compile_with_offsets(made, *([] if name == "plan" else [equal]))


def test_arrangement_of_the_workspace(launches):
    spec = replace(SPEC, windows=(None, 64, None), features=frozenset({"lse"}))
    found = layout.Layout.of(spec, CAPACITY, CPU)
    regions = [getattr(lists, item.name) for lists in found.lists.values() for item in fields(lists)]
    assert list(found.lists) == [None, 64] and found.host_bytes == found.scratch.begin
    regions += [found.scratch, found.partials, found.partial_rows]
    for before, after in itertools.pairwise(regions):
        assert before.end <= after.begin and after.begin % 256 == 0
    assert regions[-1].end <= found.num_bytes == attention_decode.workspace_bytes(spec, CAPACITY, "cpu")
    assert found.partials.shape == (14, 8, 64) and found.partial_rows.shape == (14, 8, 16, 2)
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    assert made.workspace[0].numel() == found.num_bytes
    for slots in (found.partials, found.partial_rows):
        assert (slots.of(made.workspace[0]).view(torch.int32) == -1).all()
    assert [spec.windowed for spec in launches.specs if spec.stem == "attention_plan"] == [False, True] and len(
        launches.specs
    ) == 2


# Calls


def lists_of(made, window=None) -> DeviceWorkList:
    return made._layout.lists[window].of(made.workspace[0])


def test_an_update_from_the_cpu_fills_every_list(launches):
    spec = replace(SPEC, windows=(None, 64))
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    assert "not yet updated" in "\n".join(made.describe())
    assert "boxes of 16 tokens" in "\n".join(made.describe())
    batch = dense_batch([1, 2, 0, 1], [400, 500, 3, 0])
    made.update(batch)
    assert "planner: host" in "\n".join(made.describe()) and "7 workers" in "\n".join(made.describe())
    for window in spec.windows:
        lists = lists_of(made, window)
        wanted = DeviceWorkList(*(torch.empty_like(tensor) for tensor in lists))
        fill_on_host(batch.q_indptr, batch.kv_lens, made._layout.params[window], wanted)
        num_items = int(wanted.worker_indptr[-1])
        assert num_items > 4
        assert torch.equal(lists.items[:num_items], wanted.items[:num_items])
        assert torch.equal(lists.starts, wanted.starts)


NUMBERS = {
    "q_stride_token": 3 * 8 * 64,
    "q_stride_head": 64,
    "k_stride_page": 16 * 2 * 64,
    "k_stride_token": 64,
    "k_stride_head": 16 * 64,
    "v_stride_page": 16 * 2 * 32,
    "v_stride_token": 32,
    "v_stride_head": 16 * 32,
    "out_stride_token": 8 * 32,
    "out_stride_head": 32,
    "lse_stride_token": 9,
    "table_stride": 40,
    "q_scale_stride": 1,
    "k_scale_stride": 1,
    "v_scale_stride": 0,
    "window": 64,
    "scale": 0.3,
    "soft_cap": 20.0,
    "v_scale": 0.25,
    "rope_factor": 1.5,
}


def test_a_call_passes_each_value_under_its_name(launches):
    spec = AttentionSpec(
        8, 2, 64, 32, kv_format="fp8_e4m3", kv_layout="HND", windows=(None, 64),
        features=frozenset({"lse", "soft_cap", "sinks", "alibi", "mask"}), batch_invariant=True, q_format="fp8_e5m2",
        rope=FusedRope(32, "interleaved", keys=True),
    )  # fmt: skip
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    rows = torch.zeros(3, dtype=torch.int32)
    mask = PackedMask(torch.zeros(9, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "new")
    batch = dense_batch([1, 2, 1], [400, 500, 3], table_row=rows, mask=mask)
    made.update(batch)
    scales = torch.tensor([0.5, 2.0])
    kv = cache(spec, k_scale=scales, v_scale=0.25)
    sinks, slopes = torch.zeros(8), torch.zeros(8)
    q_scales = torch.ones(8)
    rope = RopeTable.make(
        RopeConfig(32, pairs="interleaved", scaling=YarnScaling(2.0, 64, attention_factor=1.5)), "cpu"
    )
    layer = LayerArgs(0.3, 20.0, 64, sinks, slopes, q_scales, rope).resolve(spec)
    q = torch.zeros(4, 3 * 8, 64, dtype=torch.float8_e5m2)[:, :8]
    out, lse = torch.zeros(4, 8, 32, dtype=torch.bfloat16), torch.zeros(4, 9)[:, :8]
    made.run(q, kv, layer, out, lse)
    grid, values, kernel = launches.last["attention_decode"]
    assert grid == (7, 1)
    lists, found = lists_of(made, 64), made._layout
    buffer = made.workspace[0]
    workspace = {name: getattr(found, name).of(buffer) for name in ("partials", "partial_rows")}
    absent = dict.fromkeys(("kv_indptr", "v_scales"), 0)
    tensors = {
        **{"starts": lists.starts, "items": lists.items, "q": q, "k": kv.k, "v": kv.v, "out": out, "lse": lse},
        **{"table": batch.table, "table_row": rows, "mask_bits": mask.bits, "mask_indptr": mask.indptr},
        **{"sinks": sinks, "slopes": slopes, "q_scales": q_scales, "k_scales": scales, **workspace},
        "inv_freq": rope.inv_freq,
    }
    assert values == {**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **absent, **NUMBERS}
    assert kernel == DecodeSpec(
        dtype=torch.bfloat16, query=torch.float8_e5m2, stored=torch.float8_e4m3fn, head_dim=64, head_dim_vo=32,
        group_size=4, page_size=16, table=1, table_row=True, rows=8, chunk_tokens=32, num_warps=8, row_warps=1, head_warps=1,
        stages=6, causal=True, windowed=True, soft_cap=True, alibi=True, sinks=True, mask=2, rotary_dim=32, rope_pairs=2,
        rope_keys=True, q_scales=True, k_scales=True, v_scales=False, lse=True, batch_invariant=True,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["indptr", "ragged"])
def test_a_call_with_other_tables(form, launches):
    spec = replace(SPEC, table=form, page_size=None if form == "ragged" else 16)
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    indptr = torch.tensor([0, 20], dtype=torch.int32)
    lens = torch.tensor([20], dtype=torch.int32)
    q_indptr = torch.tensor([0, 1], dtype=torch.int32)
    table = torch.zeros(20, dtype=torch.int32)
    if form == "ragged":
        batch = Batch(q_indptr, lens, kv_indptr=indptr)
        kv = KVCache(*torch.zeros(2, 20, 2, 64, dtype=torch.bfloat16))
    else:
        batch = Batch(q_indptr, lens, table, table_indptr=indptr)
        kv = cache(spec)
    made.update(batch)
    q = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    made.run(q, kv, LayerArgs().resolve(spec), torch.empty_like(q), None)
    _, values, kernel = launches.last["attention_decode"]
    assert values["kv_indptr"] == indptr.data_ptr() and values["table_stride"] == values["lse"] == 0
    assert values["table"] == (0 if form == "ragged" else table.data_ptr())
    assert values["k_stride_page"] == (0 if form == "ragged" else 16 * 128)
    assert (kernel.table, kernel.page_size) == ((0, 0) if form == "ragged" else (2, 16))
    assert (values["scale"], values["soft_cap"], values["v_scale"], values["window"]) == (0.125, 1.0, 1.0, 0)


def test_what_a_call_remembers_follows_cache_layer_and_batch(launches):
    made = attention_decode.plan(SPEC, CAPACITY, "cpu")
    made.update(dense_batch([1], [300]))
    layer = LayerArgs().resolve(SPEC)
    q = torch.zeros(1, 8, 64, dtype=torch.bfloat16)

    def run(kv):
        made.run(q, kv, layer, torch.empty_like(q), None)
        return launches.last["attention_decode"]

    first, second = cache(SPEC), cache(SPEC)
    run(first)
    asked = len(launches.specs)
    assert run(first)[1]["k"] == first.k.data_ptr()
    assert len(launches.specs) == asked  # remembered
    assert run(second)[1]["k"] == second.k.data_ptr()
    rows = torch.zeros(1, dtype=torch.int32)
    made.update(dense_batch([1], [300], table_row=rows))
    _, values, kernel = run(first)
    assert kernel.table_row and values["table_row"] == rows.data_ptr()
    made.update(dense_batch([1], [300]))
    assert not run(first)[2].table_row


def test_planners_take_up_other_lengths(launches):
    (planner,) = attention_decode.plan(SPEC, CAPACITY, "cpu")._planners
    first, second = dense_batch([1], [300]), dense_batch([1, 1], [300, 20])
    for batch in (first, first, second, first):
        planner(batch.q_indptr, batch.kv_lens)
        values = launches.last["attention_plan"][1]
        found = tuple(values[name] for name in ("q_indptr", "kv_lens", "num_requests"))
        assert found == (batch.q_indptr.data_ptr(), batch.kv_lens.data_ptr(), len(batch.kv_lens))
    assert planner._launch.num_packed == 3


def test_parameters_are_packed_again_when_a_tensor_changes(launches):
    spec = replace(SPEC, features=frozenset({"lse"}))
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    layer, kv, first = LayerArgs().resolve(spec), cache(spec), dense_batch([1, 1], [300, 20])
    tensors = {
        "q": torch.zeros(2, 8, 64, dtype=torch.bfloat16),
        "out": torch.zeros(2, 8, 64, dtype=torch.bfloat16),
        "lse": torch.zeros(2, 8),
    }

    def run():
        made.run(tensors["q"], kv, layer, tensors["out"], tensors["lse"])
        (call,) = made._calls.values()
        return launches.last["attention_decode"][1], call.launch.num_packed

    made.update(first)
    run()
    values, num_packed = run()
    assert num_packed == 1 and {name: values[name] for name in tensors} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }
    for count, name in enumerate(tensors, 2):
        tensors[name] = tensors[name].clone()
        values, num_packed = run()
        assert (num_packed, values[name]) == (count, tensors[name].data_ptr())
    for count, (name, stride) in enumerate((("q", "q_stride_token"), ("out", "out_stride_token")), 5):
        tensors[name] = torch.zeros(2, 9, 64, dtype=torch.bfloat16)[:, :8]
        assert (run()[0][stride], run()[1]) == (9 * 64, count)
    tensors["lse"] = torch.zeros(2, 9)[:, :8]
    assert run()[0]["lse_stride_token"] == 9
    second = dense_batch([1, 1], [300, 20])
    made.update(second)
    values, num_packed = run()
    assert num_packed == 8 and values["table"] == second.table.data_ptr() != first.table.data_ptr()


def test_the_state_keeps_no_cache_alive(launches):
    made = attention_decode.plan(SPEC, CAPACITY, "cpu")
    made.update(dense_batch([1], [300]))
    layer = LayerArgs().resolve(SPEC)
    q = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    for _ in range(3):
        kv = cache(SPEC)
        reference = weakref.ref(kv)
        made.run(q, kv, layer, torch.empty_like(q), None)
        assert launches.last["attention_decode"][1]["k"] == kv.k.data_ptr()
        del kv
        assert reference() is None


@pytest.mark.parametrize(("page_size", "boxes"), [(16, True), (1, False)])
def test_tensor_maps_follow_the_numbers_where_pages_allow_them(page_size, boxes, launches, monkeypatch):
    monkeypatch.setattr(state, "maps_of", lambda kv, num_tokens: (("keys", kv, num_tokens), ("values", kv, num_tokens)))
    spec = replace(SPEC, page_size=page_size)
    made = attention_decode.plan(spec, CAPACITY, "cpu")
    made.update(dense_batch([1], [30]))
    kv = cache(spec)
    q = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    made.run(q, kv, LayerArgs().resolve(spec), torch.empty_like(q), None)
    _, values, kernel = launches.last["attention_decode"]
    assert kernel.tensor_maps == (("keys", "values") if boxes else ())
    if boxes:
        assert (values["keys"], values["values"]) == (("keys", kv, 16), ("values", kv, 16))
