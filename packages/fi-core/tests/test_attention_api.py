"""plan, update and attention: what is accepted works, what is not says which argument and why."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, AttentionSpec, Batch, CapacityError, IndexCheckError, KVCache, LayerArgs
from fi_core.ops.attention import attention_cost, visible_pairs
from fi_core.plan import plan_of, workspace_bytes
from fi_core.reference.attention import oracle

CAPACITY = {"max_batch": 4, "max_q_tokens": 16, "max_q_len": 8, "max_kv_len": 48, "device": "cpu"}


def spec_of(**options) -> AttentionSpec:
    return AttentionSpec(**{"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32, **options})


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of(**changes) -> Batch:
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    return dataclasses.replace(Batch(ints(0, 1, 5, 6), ints(30, 4, 17), table), **changes)


def cache_of(**changes) -> KVCache:
    torch.manual_seed(0)
    return KVCache(**{"k": torch.randn(12, 16, 2, 16), "v": torch.randn(12, 16, 2, 16), **changes})


def ready(**options):
    plan = fi.plan(spec_of(**options), **CAPACITY)
    plan.update(batch_of())
    return plan


def test_attention_equals_the_oracle_and_leaves_the_rest():
    plan = ready(features={"lse", "sinks"}, windows=(None, 7))
    q, kv = torch.randn(9, 4, 16), cache_of()
    layer = LayerArgs(scale=0.2, window=7, sinks=torch.randn(4))
    out, lse = torch.full((9, 4, 16), 5.0), torch.full((9, 4), 6.0)
    assert fi.attention(q, kv, plan, layer, out=out, lse=lse) is out
    wanted, log_sum = oracle(plan.spec, plan.batch, q, kv, layer.resolve(plan.spec))
    torch.testing.assert_close(out[:6].double(), wanted[:6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:6].double(), log_sum[:6], rtol=1e-5, atol=1e-5)
    assert (out[6:] == 5.0).all() and (lse[6:] == 6.0).all()
    new = fi.attention(q, kv, plan, layer)
    assert torch.equal(new[:6], out[:6]) and new.shape == (9, 4, 16)


def test_base_2_logarithms_of_a_sum():
    lse = torch.tensor([[math.log(8.0), 0.0, -math.inf]])
    assert fi.lse_base2(lse).tolist() == [[pytest.approx(3.0), 0.0, -math.inf]]
    assert fi.lse_base2(lse).dtype == torch.float32


def test_layers_are_told_apart_by_value_and_tensors_by_identity():
    plan = ready(features={"sinks"})
    q, kv = torch.randn(6, 4, 16), cache_of()
    seen = [
        fi.attention(q, kv, plan, LayerArgs(scale=scale, sinks=torch.full((4,), sink)))
        for scale, sink in ((0.1, 0.0), (0.1, 3.0), (0.2, 0.0), (0.1, 0.0))
    ]
    assert torch.equal(seen[0], seen[3])
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])


def test_changed_lengths_take_effect_with_update():
    plan = ready()
    q, kv = torch.randn(6, 4, 16), cache_of()
    before = fi.attention(q, kv, plan)
    batch = batch_of(kv_lens=ints(12, 4, 17))
    plan.update(batch)
    after = fi.attention(q, kv, plan)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-5, atol=1e-5)


def test_batch_invariant_results_do_not_depend_on_other_requests():
    plan = fi.plan(spec_of(batch_invariant=True), **CAPACITY)
    q, kv = torch.randn(3, 4, 16), cache_of()
    results = []
    for lens in ((17, 30, 40), (17, 5, 1), (17, 0, 48)):
        plan.update(batch_of(q_indptr=ints(0, 1, 2, 3), kv_lens=ints(*lens)))
        results.append(fi.attention(q, kv, plan)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_update_is_an_error():
    plan = fi.plan(spec_of(), **CAPACITY)
    with pytest.raises(ArgumentError, match="no update yet"):
        fi.attention(torch.randn(6, 4, 16), cache_of(), plan)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("q", {"q": torch.zeros(6, 4, 8)}),
        ("q", {"q": torch.zeros(6, 3, 16)}),
        ("q", {"q": torch.zeros(6, 64)}),
        ("q", {"q": torch.zeros(5, 4, 16)}),
        ("q", {"q": torch.zeros(6, 4, 16, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(6, 4, 16, device="meta")}),
        ("out", {"out": torch.zeros(6, 4, 8)}),
        ("out", {"out": torch.zeros(5, 4, 16)}),
        ("out", {"out": torch.zeros(6, 4, 16, dtype=torch.float16)}),
        ("lse", {"lse": torch.zeros(6, 4)}),
        ("kv.page_size", {"kv": cache_of(k=torch.zeros(12, 8, 2, 16), v=torch.zeros(12, 8, 2, 16))}),
        ("kv.page_size", {"kv": cache_of(k=torch.zeros(12, 2, 16), v=torch.zeros(12, 2, 16))}),
        ("kv.k", {"kv": cache_of(k=torch.zeros(12, 16, 4, 16), v=torch.zeros(12, 16, 4, 16))}),
        ("kv.v", {"kv": cache_of(v=torch.zeros(12, 16, 2, 8))}),
        ("kv.v", {"kv": cache_of(v=torch.zeros(11, 16, 2, 16))}),
        ("kv.layout", {"kv": cache_of(layout="HND")}),
        ("kv.format", {"kv": cache_of(k=torch.zeros(12, 16, 2, 16).half(), v=torch.zeros(12, 16, 2, 16).half())}),
        ("layer.window", {"layer": LayerArgs(window=3)}),
        ("layer.soft_cap", {"layer": LayerArgs(soft_cap=3.0)}),
        ("layer.sinks", {"layer": LayerArgs(sinks=torch.zeros(4))}),
        ("layer.scale", {"layer": LayerArgs(scale=math.inf)}),
        ("out", {"out": torch.zeros(1, 4, 16).expand(6, 4, 16)}),
    ],
)
def test_wrong_arguments_are_named(argument, changes):
    plan = ready()
    call = {"q": torch.randn(6, 4, 16), "kv": cache_of(), "plan": plan, **changes}
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            fi.attention(**call)
        assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("q", {"q": torch.zeros(6, 4, 32)[..., ::2]}),
        ("q", {"q": torch.zeros(6, 4, 17)[..., :16]}),
        ("q", {"q": torch.zeros(6 * 4 * 16 + 1)[1:].view(6, 4, 16)}),
        ("out", {"out": torch.zeros(6, 4, 17)[..., :16]}),
        ("lse", {"lse": torch.zeros(4, 6).t()}),
        ("kv.k", {"kv": cache_of(k=torch.zeros(12, 16, 2, 17)[..., :16])}),
    ],
)
def test_layouts_that_no_kernel_serves_are_unsupported(argument, changes):
    call = {"q": torch.randn(6, 4, 16), "kv": cache_of(), "plan": ready(features={"lse"}), **changes}
    with pytest.raises(fi.UnsupportedError) as caught:
        fi.attention(**call)
    assert caught.value.argument == argument
    with pytest.raises(fi.UnsupportedError, match=r"^kv\.v: expected a contiguous last dim"):
        cache_of(v=torch.zeros(12, 16, 2, 32)[..., ::2])


def test_out_may_not_be_q():
    q = torch.randn(6, 4, 16)
    with pytest.raises(ArgumentError, match=r"^out: expected memory apart from q's"):
        fi.attention(q, cache_of(), ready(), out=q)
    empty = fi.plan(spec_of(), **CAPACITY)
    empty.update(Batch(ints(0), ints(), torch.zeros(0, 4, dtype=torch.int32)))
    assert fi.attention(q[:0], cache_of(), empty, out=q[:0]).shape == (0, 4, 16)


@pytest.mark.parametrize("lse", [torch.zeros(5, 4), torch.zeros(6, 3), torch.zeros(1, 4).expand(6, 4)])
def test_wrong_lse_is_named(lse):
    with pytest.raises(ArgumentError, match="^lse"):
        fi.attention(torch.randn(6, 4, 16), cache_of(), ready(features={"lse"}), lse=lse)


def test_lse_of_one_head_may_have_any_stride():
    plan = fi.plan(spec_of(num_qo_heads=1, num_kv_heads=1, features={"lse"}), **CAPACITY)
    plan.update(batch_of())
    kv = KVCache(torch.randn(12, 16, 1, 16), torch.randn(12, 16, 1, 16))
    q, column, row = torch.randn(6, 1, 16), torch.full((6, 1), math.nan), torch.full((1, 6), math.nan)
    fi.attention(q, kv, plan, lse=column)
    fi.attention(q, kv, plan, lse=row.t())
    assert torch.equal(column, row.t())


@pytest.mark.parametrize("page", [12, -1])
def test_pages_out_of_range_are_named_on_a_cpu(page):
    plan = fi.plan(spec_of(), **CAPACITY)
    batch = batch_of()
    batch.table[1, 0] = page
    plan.update(batch)
    with pytest.raises(IndexCheckError, match=rf"batch\.table\[1, 0\]: {page} is outside its limit 11"):
        fi.attention(torch.zeros(6, 4, 16), cache_of(), plan)


def test_other_indices_out_of_range_are_named_on_a_cpu():
    def error_of(batch: Batch, kv: KVCache, **options) -> str:
        plan = fi.plan(spec_of(**options), **CAPACITY)
        plan.update(batch)
        with pytest.raises(IndexCheckError) as caught:
            fi.attention(torch.zeros(6, 4, 16), kv, plan)
        return str(caught.value)

    assert error_of(batch_of(table_row=ints(0, -1, 2)), cache_of()).startswith("batch.table_row[1]: -1")
    assert error_of(batch_of(table_row=ints(0, 1, 3)), cache_of()).startswith("batch.table_row[2]: 3")
    nothing = torch.zeros(0, 16, 2, 16)
    assert error_of(batch_of(), KVCache(nothing, nothing)).startswith("batch.table[0, 0]: 0")
    bits = torch.zeros(50, dtype=torch.uint8)
    for starts, place in (((0, 4, 48, 51), "[2]: 48"), ((-1, 4, 8, 46), "[0]: -1")):
        mask = fi.PackedMask(bits, torch.tensor(starts))
        assert error_of(batch_of(mask=mask), cache_of(), features={"mask"}).startswith(f"batch.mask.indptr{place}")


@pytest.mark.parametrize("device", ["potato", "cuda:99", None])
def test_devices_that_are_not_there_are_named(device):
    for call in (fi.plan, workspace_bytes):
        with pytest.raises(ArgumentError, match=f"^device: .*{device}"):
            call(spec_of(), **{**CAPACITY, "device": device})


def test_wrong_scale_is_named():
    spec = spec_of(kv_format="fp8_e4m3")
    plan = fi.plan(spec, **CAPACITY)
    plan.update(batch_of())
    stored = torch.zeros(12, 16, 2, 16, dtype=torch.uint8)
    for scale in (torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(ArgumentError, match=r"kv\.v_scale"):
            fi.attention(torch.randn(6, 4, 16), KVCache(stored, stored, format="fp8_e4m3", v_scale=scale), plan)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("batch.q_indptr", {"q_indptr": ints(0, 1, 5)}),
        ("batch.q_indptr", {"q_indptr": ints(1, 2, 5, 6)}),
        ("batch.q_indptr", {"q_indptr": ints(0, 5, 1, 6)}),
        ("batch.q_indptr", {"q_indptr": torch.tensor([0, 1, 5, 6])}),
        ("batch.q_indptr", {"q_indptr": torch.zeros(8, dtype=torch.int32)[::2]}),
        ("batch.kv_lens", {"kv_lens": ints(30, -1, 17)}),
        ("batch.kv_lens", {"kv_lens": [30, 4, 17]}),
        ("batch.kv_lens", {"kv_lens": torch.tensor([30, 4, 17])}),
        ("batch.kv_lens", {"kv_lens": ints(30, 4, 17).view(3, 1)}),
        ("batch.table", {"table": torch.zeros(2, 4, dtype=torch.int32)}),
        ("batch.table", {"table": torch.zeros(3, 4, dtype=torch.int64)}),
        ("batch.table", {"table": None, "kv_indptr": ints(0, 30, 34, 51)}),
        ("batch.table", {"table": ints(0, 1, 2, 3), "table_indptr": ints(0, 2, 3, 4)}),
        ("batch.table_row", {"table_row": ints(0, 1)}),
        ("batch.table", {"table": torch.zeros(0, 4, dtype=torch.int32), "table_row": ints(0, 0, 0)}),
        ("batch.table_row", {"table": ints(0, 1), "table_indptr": ints(0, 2, 3, 5), "table_row": ints(0, 1, 2)}),
        ("batch.kv_indptr", {"kv_indptr": ints(0, 30, 34, 51)}),
        ("batch.slot_mapping", {"slot_mapping": ints(0, 1, 2, 3, 4, 5)}),
        ("batch.table", {"table": torch.zeros(3, 4, dtype=torch.int32, device="meta")}),
        ("batch.mask", {"mask": fi.PackedMask(torch.zeros(9, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))}),
        ("batch.mask.indptr", {"mask": fi.PackedMask(torch.zeros(9, dtype=torch.uint8), ints(0, 0, 0, 0))}),
        ("batch", {"table": None}),
    ],
)
def test_wrong_batches_are_named(argument, changes):
    with pytest.raises(ArgumentError) as caught:
        fi.plan(spec_of(), **CAPACITY).update(batch_of(**changes))
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "max_batch",
            {
                "kv_lens": ints(1, 1, 1, 1, 1),
                "q_indptr": ints(0, 1, 2, 3, 4, 5),
                "table": torch.zeros(5, 4, dtype=torch.int32),
            },
        ),
        ("max_q_len", {"q_indptr": ints(0, 1, 10, 11)}),
        ("max_q_tokens", {"q_indptr": ints(0, 8, 16, 17)}),
        ("max_kv_len", {"kv_lens": ints(30, 4, 49)}),
        ("table holds", {"kv_lens": ints(30, 4, 65)}),
    ],
)
def test_capacities_are_named(name, changes):
    with pytest.raises(CapacityError, match=name):
        fi.plan(spec_of(), **CAPACITY).update(batch_of(**changes))


def test_lengths_are_compared_with_what_each_form_holds():
    paged = fi.plan(spec_of(table="indptr"), **CAPACITY)
    with pytest.raises(CapacityError, match="at most 16 tokens, what request 1"):
        paged.update(batch_of(table=ints(0, 1, 2, 3), table_indptr=ints(0, 2, 3, 4), kv_lens=ints(32, 17, 1)))
    with pytest.raises(ArgumentError, match="the table's entries"):
        paged.update(batch_of(table=ints(0, 1), table_indptr=ints(0, 2, 3, 4)))
    ragged = fi.plan(spec_of(table="ragged", page_size=None), **CAPACITY)
    with pytest.raises(CapacityError, match="request 2"):
        ragged.update(batch_of(table=None, kv_indptr=ints(0, 30, 34, 50)))


def test_a_failed_update_keeps_the_last_batch():
    plan = ready()
    q, kv = torch.randn(6, 4, 16), cache_of()
    before = fi.attention(q, kv, plan)
    with pytest.raises(CapacityError):
        plan.update(batch_of(kv_lens=ints(30, 4, 49)))
    assert torch.equal(fi.attention(q, kv, plan), before)


def test_plan_explains_itself_and_knows_its_workspace_beforehand():
    plan = fi.plan(spec_of(), **CAPACITY, backend="reference")
    assert "reference.attention" in plan.explain() and "max_batch=4" in plan.explain()
    assert plan.workspace_bytes == workspace_bytes(spec_of(), **CAPACITY)
    with pytest.raises(fi.UnknownBackendError):
        fi.plan(spec_of(), **CAPACITY, backend="no such back end")
    with pytest.raises(ArgumentError, match="max_q_len"):
        fi.plan(spec_of(), **{**CAPACITY, "max_q_len": 17})


def test_plans_and_caches_are_not_kept_alive():
    plan = ready()
    kv = cache_of()
    fi.attention(torch.randn(6, 4, 16), kv, plan)
    handle, dead_plan, dead_kv = plan.handle, weakref.ref(plan), weakref.ref(kv)
    assert plan_of(handle) is plan
    del plan, kv
    gc.collect()
    assert dead_plan() is None and dead_kv() is None
    with pytest.raises(ArgumentError, match="living plan"):
        plan_of(handle)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_visible_pairs_counts_what_the_masks_leave(causal, window):
    for q_len in range(8):
        for kv_len in range(8):
            pairs = [
                (i, j)
                for i in range(q_len)
                for j in range(kv_len)
                if (not causal or j <= kv_len - q_len + i) and (window is None or kv_len - q_len + i - j < window)
            ]
            assert visible_pairs(q_len, kv_len, causal, window) == len(pairs)


def test_cost_counts_each_visible_key_once():
    spec = AttentionSpec(32, 8, 128)
    cost = attention_cost(spec, [1, 1], [1000, 24], None)
    assert cost.num_bytes == 1024 * 8 * 256 * 2 + 2 * 32 * 256 * 2
    assert cost.num_flops == 2 * 256 * 1024 * 32
    windowed = attention_cost(spec, [4], [1000], 10)
    assert windowed.num_bytes == 13 * 8 * 256 * 2 + 4 * 32 * 256 * 2
    assert windowed.num_flops == 2 * 256 * 40 * 32
