"""Attention with shared prefixes as a plan's kernel, without a GPU: selection, agreement with the kernel, memory and calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fi_core.contract import Target
from fi_core.errors import ArgumentError, CapacityError
from fi_core.hookspecs import hookimpl
from fi_core.ops import OPERATIONS
from fi_core.ops.cases.prefixes import Forest
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_core.registry import registry
from fi_core.rope import FusedRope, RopeConfig, RopeTable, YarnScaling
from fi_cuda.entries import ATTENTION_ENTRIES
from fi_cuda.kernels.attention import (
    layout,
    order,
    plan,
    prefill_state,
    prefill_tuning,
    prefix_plan,
    prefix_state,
    state,
    tuning,
)
from fi_cuda.kernels.attention.call import CallForm
from fi_cuda.kernels.attention.decode import decode_spec
from fi_cuda.kernels.attention.prefix import (
    BoxesPrefixSpec,
    BoxPrefixSpec,
    built_in_prefix_tuning,
    prefix_spec,
    prefix_tuning_for,
)
from fi_cuda.kernels.attention.prefix_plan import PrefixLayout, prefix_plan_spec
from fi_cuda.kernels.attention.prefix_state import attention_apart, attention_prefix
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES

pytestmark = pytest.mark.timeout(120)

SPEC = AttentionSpec(8, 2, 64)


def batch_of(q_lens, kv_lens, forest: Forest) -> Batch:
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    table = torch.zeros(len(q_lens), 4, dtype=torch.int32)
    return Batch(q_indptr, torch.tensor(kv_lens, dtype=torch.int32), table, levels=forest.levels(torch.device("cpu")))


# Selection


ROPE = {"rope": "q", "rope_pairs": "half", "rotary_dim": 64}
ALL_FP8 = {"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3"}


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, "attention_prefix"),
        ({"max_q_len": 8192, "group_size": 64, "page_size": 1, "table": "indptr"}, "attention_prefix"),
        (
            {"features": frozenset({"soft_cap", "sinks", "lse"}), "causal": False, "kv_format": "fp8_e4m3"},
            "attention_prefix",
        ),
        ({"features": frozenset({"alibi", "mask"}), "windowed": True}, "attention_prefix"),
        ({"max_q_len": 512, **ALL_FP8}, "attention_prefix_fp8"),
        ({"max_q_len": 1, **ALL_FP8}, "attention_prefix_fp8"),
        ({"max_q_len": 1, "q_format": "fp8_e4m3"}, "attention_prefix_apart"),
        ({"max_q_len": 4, **ROPE}, "attention_prefix_rotated"),
        ({"max_q_len": 4, **ROPE, "rotary_dim": 16}, None),
        ({"max_q_len": 40, **ROPE, "rotary_dim": 16}, "attention_prefix_rotated"),
        ({"max_q_len": 4, **ROPE, "rope": "qk"}, "attention_prefix_apart"),
        ({"max_q_len": 512, **ROPE}, "attention_prefix_rotated"),
        ({"max_q_len": 512, "q_format": "fp8_e4m3"}, None),
        ({"max_q_len": 512, **ROPE, "rope": "qk"}, None),
        ({"batch_invariant": True}, None),
        ({"table": "ragged", "page_size": None}, None),
        ({"group_size": 65}, None),
        ({"levels": False, "max_q_len": 1}, "attention_decode"),
    ],
)
def test_what_is_served(changes, served):
    attention = next(operation for operation in OPERATIONS if operation.name == "attention")
    request = attention.request(Target("cuda", (9, 0)), **{**attention.typical, "levels": True, **changes})
    assert [entry.name for entry in ATTENTION_ENTRIES if not entry.reject(request)] == [served] * (served is not None)


# Agreement with the kernel

TUNING = built_in_prefix_tuning(SPEC)
FP8 = AttentionSpec(32, 8, 128, kv_format="fp8_e4m3")
FEW = Capacity(9, 9, 1, 99, 9)


def decode_plan_of(spec, capacity):
    made = tuning.built_in_tuning(spec, capacity)
    return plan.plan_spec(tuning.partition_params(spec, capacity, made, None, 132), capacity)


def with_decode(spec, form, max_q_len=1):
    made = tuning.built_in_tuning(spec, replace(FEW, max_q_tokens=9 * max_q_len, max_q_len=max_q_len))
    return prefix_spec(spec, built_in_prefix_tuning(spec), form, decode_spec(spec, made, form))


KERNELS = {
    "boxes": prefix_spec(SPEC, TUNING, CallForm(boxes=True, lse=True)),
    "rows": prefix_spec(replace(SPEC, page_size=5), built_in_prefix_tuning(replace(SPEC, page_size=5)), CallForm()),
    "features": prefix_spec(
        AttentionSpec(14, 2, 96, features=frozenset({"soft_cap", "sinks"})),
        replace(TUNING, tiles=replace(TUNING.tiles, consumers=2)),
        CallForm(boxes=True, table_row=True),
    ),
    "fp8": prefix_spec(FP8, built_in_prefix_tuning(FP8), CallForm(boxes=True, k_scales=True)),
    "decode": with_decode(AttentionSpec(32, 8, 128), CallForm(boxes=True)),
    "decode of more rows": with_decode(AttentionSpec(32, 8, 128), CallForm(boxes=True), 16),
    "decode, d256": with_decode(AttentionSpec(16, 8, 256), CallForm(boxes=True)),
    "decode, d64 by rows": with_decode(replace(SPEC, page_size=1), CallForm()),
    "plan": prefix_plan_spec(SPEC, FEW, TUNING, 132),
    "plan and decode's": prefix_plan_spec(SPEC, FEW, TUNING, 132, decode_plan_of(SPEC, FEW)),
    "plan of many": prefix_plan_spec(SPEC, Capacity(5000, 5000, 1, 99, 9), TUNING, 132),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_agrees_on_fields_and_shared_memory(name, compile_with_offsets):
    made = KERNELS[name]
    fits = "static_assert(sizeof(fi::NodeWork) == 64 && sizeof(fi::PlaceWork) == 48 && sizeof(fi::PartSegment) == 16);"
    if not name.startswith("plan"):
        needed = max(made.shared_bytes if made.shared_bytes > made.decode_bytes else 0, 1024)
        fits = f"static_assert((sizeof(fi::PrefillShared<Config>) + 2047) / 1024 >= {needed // 1024});"
    resources = compile_with_offsets(made, fits).resources
    # A producer that gathers rows keeps in memory what an item needs, and decode's code its list's ends where heads are of 256.
    # These specs are not shipped.
    allowed = {"rows": 12, "decode, d256": 36}
    assert max(resources.spill_store_bytes, resources.spill_load_bytes) <= allowed.get(name, 0)


# Tuning


class Override:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "attention_prefix" else None


def overridden(given, spec=SPEC):
    plugin = Override(given)
    registry().manager.register(plugin)
    try:
        return prefix_tuning_for(spec, torch.device("cpu"))
    finally:
        registry().manager.unregister(plugin)


def test_tunings_are_overridden_and_wrong_ones_named(monkeypatch):
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    assert overridden(None) == TUNING
    given = {"item_cost": 9, "choose": False}
    assert overridden(given) == replace(TUNING, **given)
    for given, match in (
        *(({"rows": 8}, "rows"), ({"step_cost": 0}, "step_cost")),
        ({"choose": 1}, "choose"),
    ):
        with pytest.raises(ArgumentError, match=match):
            overridden(given)


# Calls


@pytest.fixture
def launches(monkeypatch, recorder):
    """A machine of 7 processors whose kernels are recorded instead of launched."""
    for module in (order, plan, prefill_state, prefix_plan, prefix_state, state):
        monkeypatch.setattr(module, "kernel_for", recorder.kernel_for)
    for module in (layout, prefix_state):
        monkeypatch.setattr(module, "num_processors", lambda device: 7)
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    monkeypatch.setattr(tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    monkeypatch.setattr(prefix_state, "column_maps_of", lambda kv, *box: (("keys", *box), ("values", *box)))
    monkeypatch.setattr(state, "maps_of", lambda kv, *box: (("keys", *box), ("values", *box)))
    monkeypatch.setattr(prefix_state, "tensor_map_of", lambda tensor, box: (tensor.data_ptr(), box.shape))
    return recorder


CAPACITY = Capacity(max_batch=5, max_q_tokens=20, max_q_len=4, max_kv_len=500, max_prefixes=3, max_prefix_depth=2)


def test_an_update_passes_each_value_under_its_name(launches):
    made = attention_prefix.plan(SPEC, CAPACITY, "cpu")
    forest = Forest(((0, 3, 0, 64), (1, 3, 64, 70)), (2, 0, 1))
    batch = batch_of([1, 4, 1], [100, 90, 80], forest)
    made.update(batch)
    grid, values, _ = launches.last["attention_prefix_plan"]
    found, buffer = made._layout, made.workspace[0]
    regions = ("rows", "header", "tokens", "positions", "segments", "tables")
    decode = made._planner.decode
    tensors = {
        **{"q_indptr": batch.q_indptr, "kv_lens": batch.kv_lens},
        **{"nodes": batch.levels.nodes, "order": batch.levels.order},
        **{name: getattr(found, name).of(buffer) for name in regions},
        **{"scratch": decode.scratch, **decode.lists._asdict()},
    }
    numbers = {
        "max_segments": 3,
        "max_q_tokens": 20,
        "max_q_len": 4,
        "max_kv_len": 500,
        "num_requests": 3,
        "num_nodes": 2,
        "max_tiles": decode.max_tiles,
        "window": 0,
    }
    limits = ("max_rows", "max_parts", "max_node_rows", "max_node_tokens", "max_sharing_tokens")
    numbers |= {name: getattr(found, name) for name in limits}
    assert grid == (decode.spec.num_blocks + 1, 1) and set(launches.last) == {"attention_prefix_plan"}
    assert values == {**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **numbers}
    assert made.workspace[0].numel() + made.workspace[1].numel() == attention_prefix.workspace_bytes(
        SPEC, CAPACITY, "cpu"
    )
    assert not found.header.of(buffer).any() and not found.barrier.of(buffer).any()


def test_a_call_passes_each_value_under_its_name(launches):
    spec = AttentionSpec(
        8, 2, 64, kv_format="fp8_e4m3", kv_layout="HND", features=frozenset({"lse", "soft_cap", "sinks"})
    )
    made = attention_prefix.plan(spec, CAPACITY, "cpu")
    rows = torch.zeros(3, dtype=torch.int32)
    batch = replace(batch_of([1, 4, 1], [100, 90, 80], Forest(((0, 3, 0, 64),))), table_row=rows)
    made.update(batch)
    k = torch.zeros(9, 2, 16, 64, dtype=torch.float8_e4m3fn)
    kv = KVCache(k, torch.zeros_like(k), "HND", "fp8_e4m3", k_scale=torch.tensor([0.5, 2.0]), v_scale=0.25)
    layer = LayerArgs(scale=0.3, soft_cap=20.0, sinks=torch.zeros(8)).resolve(spec)
    q = torch.zeros(6, 3 * 8, 64, dtype=torch.bfloat16)[:, :8]
    out, lse = torch.zeros(6, 8, 64, dtype=torch.bfloat16), torch.zeros(6, 9)[:, :8]
    made.run(q, kv, layer, out, lse)
    grid, values, kernel = launches.last["attention_prefix"]
    found, buffer = made._layout, made.workspace[0]
    regions = ("rows", "tokens", "positions", "segments", "header", "barrier", "parts", "part_logs")
    decode, slots = made._decode._lists[None], made._decode._layout
    tensors = {
        **{"starts": decode.starts, "items": decode.items},
        **{name: getattr(slots, name).of(made.workspace[1]) for name in ("partials", "partial_rows")},
        **{"q": q, "k": kv.k, "v": kv.v, "out": out, "lse": lse, "table": batch.table, "table_row": rows},
        **{"sinks": layer.sinks, "k_scales": kv.k_scale},
        **{name: getattr(found, name).of(buffer) for name in regions},
    }
    numbers = {
        **{"k_stride_page": 2048, "k_stride_token": 64, "k_stride_head": 1024},
        **{"v_stride_page": 2048, "v_stride_token": 64, "v_stride_head": 1024},
        **{"out_stride_token": 512, "out_stride_head": 64, "lse_stride_token": 9, "table_stride": 4},
        **{"k_scale_stride": 1, "v_scale_stride": 0, "num_kv_heads": 2, "window": 0, "max_segments": 3},
        **{"scale": 0.3, "soft_cap": 20.0, "v_scale": 0.25, "rope_factor": 1.0},
        **{"q_stride_token": 1536, "q_stride_head": 64, "q_scale_stride": 0},
        **dict.fromkeys(("kv_indptr", "mask_bits", "mask_indptr", "slopes", "v_scales", "inv_freq", "q_scales"), 0),
        "queries": (q.data_ptr(), (1, 4, 64)),
        **{"keys": ("keys", 16, 128), "values": ("values", 16, 128)},
        **{"decode_keys": ("keys", 16), "decode_values": ("values", 16)},
    }
    assert grid == (7, 1) and values == {**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **numbers}
    assert type(kernel) is BoxesPrefixSpec and kernel.levels and kernel.lse and kernel.k_scales and kernel.cooperative
    assert kernel.decode_num_warps == made._decode._tuning.num_warps


def test_queries_are_rotated_by_the_layers_table(launches):
    spec = replace(SPEC, rope=FusedRope(64))
    made = attention_prefix.plan(spec, CAPACITY, "cpu")
    made.update(batch_of([1] * 3, [100] * 3, Forest(((0, 3, 0, 64),))))
    table = RopeTable.make(RopeConfig(64, scaling=YarnScaling(4.0, 32)), "cpu")
    q, kv = torch.zeros(3, 8, 64, dtype=torch.bfloat16), KVCache(*torch.zeros(2, 9, 16, 2, 64, dtype=torch.bfloat16))
    made.run(q, kv, LayerArgs(rope=table).resolve(spec), torch.empty_like(q), None)
    _, values, kernel = launches.last["attention_prefix"]
    assert (values["inv_freq"], values["rope_factor"]) == (table.inv_freq.data_ptr(), table.config.attention_factor)
    assert values["rope_factor"] > 1.0 and (kernel.rotary_dim, kernel.rope_pairs) == (64, 1)


def test_a_batch_without_levels_is_served_as_by_a_plan_without(launches):
    made = attention_prefix.plan(SPEC, CAPACITY, "cpu")
    q, kv = torch.zeros(3, 8, 64, dtype=torch.bfloat16), KVCache(*torch.zeros(2, 9, 16, 2, 64, dtype=torch.bfloat16))
    layer = LayerArgs().resolve(SPEC)
    with_levels = batch_of([1] * 3, [100] * 3, Forest(((0, 3, 0, 64),)))
    both, alone = {"attention_prefix"}, {"attention_decode"}
    for batch, stems in ((with_levels, both), (replace(with_levels, levels=None), alone), (with_levels, both)):
        made.update(batch)
        launches.last.clear()
        made.run(q, kv, layer, torch.empty_like(q), None)
        assert set(launches.last) == stems
    launches.last.clear()
    made.run(q[:0], kv, layer, torch.empty_like(q[:0]), None)
    assert not launches.last  # nothing to do
    windowed = attention_prefix.plan(replace(SPEC, windows=(None, 32)), CAPACITY, "cpu")
    for window, stems in ((None, both), (32, alone)):
        windowed.update(with_levels)
        launches.last.clear()
        windowed.run(q, kv, LayerArgs(window=window).resolve(windowed._spec), torch.empty_like(q), None)
        assert set(launches.last) == stems
    assert any("with levels" in line for line in made.describe())


def test_without_a_choice_levels_are_used_as_they_are_given(launches, monkeypatch):
    monkeypatch.setattr(
        prefix_state, "prefix_tuning_for", lambda spec, device: replace(built_in_prefix_tuning(spec), choose=False)
    )
    made = attention_prefix.plan(SPEC, CAPACITY, "cpu")
    q, kv = torch.zeros(3, 8, 64, dtype=torch.bfloat16), KVCache(*torch.zeros(2, 9, 16, 2, 64, dtype=torch.bfloat16))
    made.update(batch_of([1] * 3, [100] * 3, Forest(((0, 3, 0, 64),))))
    made.run(q, kv, LayerArgs().resolve(SPEC), torch.empty_like(q), None)
    assert set(launches.last) == {"attention_prefix_plan", "attention_prefix"}
    assert launches.last["attention_prefix_plan"][0] == (1, 1)
    kernel = launches.last["attention_prefix"][2]
    assert type(kernel) is BoxPrefixSpec and kernel.decode_num_warps == 0


def test_plans_for_long_queries_have_room_for_few_that_share():
    few = Capacity(256, 8192, 8192, 9000, 64, 4)
    spec = AttentionSpec(32, 8, 128)
    made = PrefixLayout.of(spec, few, built_in_prefix_tuning(spec), 132)
    assert made.max_sharing_tokens == 4096 and made.num_bytes < 240 << 20
    assert prefix_plan_spec(spec, few, built_in_prefix_tuning(spec), 132).bounded
    assert not prefix_plan_spec(spec, FEW, built_in_prefix_tuning(spec), 132).bounded


def test_batches_without_levels_have_the_kernels_of_plans_without_them(launches):
    mixed = attention_prefix.plan(SPEC, replace(CAPACITY, max_q_tokens=200, max_q_len=40), "cpu")
    assert any("without levels" in line and "the decode kernel" in line for line in mixed.describe())


def test_levels_that_no_kernel_serves_are_told_and_not_used(launches):
    spec = replace(SPEC, rope=FusedRope(SPEC.head_dim))
    made = attention_apart.plan(spec, CAPACITY, "cpu")
    assert made.describe()[0].startswith("levels are not used")
    assert attention_apart.workspace_bytes(spec, CAPACITY, "cpu") == sum(tensor.nbytes for tensor in made.workspace)


def test_capacities_that_planning_cannot_count_are_named(launches):
    for changes, name in (
        ({"max_prefixes": 5000}, "max_prefixes"),
        ({"max_q_tokens": 2**27, "max_q_len": 2**20, "max_batch": 2**27}, "max_q_tokens"),
    ):
        with pytest.raises(CapacityError, match=name):
            attention_prefix.plan(SPEC, replace(CAPACITY, **changes), "cpu")
