"""The records of attention name what they refuse; what a spec says of its queries is what attention does to them."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, AttentionSpec, Batch, FusedRope, KVCache, LayerArgs, RopeConfig, RopeTable

CAPACITY = {"max_batch": 4, "max_q_tokens": 16, "max_q_len": 8, "max_kv_len": 48, "device": "cpu"}


def spec_of(**options) -> AttentionSpec:
    return AttentionSpec(**{"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32, **options})


def batch_of() -> Batch:
    lengths = (torch.tensor(values, dtype=torch.int32) for values in ((0, 1, 5, 6), (30, 4, 17)))
    return Batch(*lengths, torch.arange(12, dtype=torch.int32).view(3, 4))


def cache_of(**changes) -> KVCache:
    torch.manual_seed(0)
    return KVCache(**{"k": torch.randn(12, 16, 2, 16), "v": torch.randn(12, 16, 2, 16), **changes})


def fp8_cache(scale: object) -> KVCache:
    stored = torch.zeros(12, 16, 2, 16, dtype=torch.uint8)
    return KVCache(stored, stored, format="fp8_e4m3", k_scale=scale)


def angles(rotary_dim: int, max_position: int | None = None) -> RopeTable:
    return RopeTable.make(RopeConfig(rotary_dim), "cpu", max_position)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("windows", lambda: spec_of(windows=(3.5,))),
        ("windows", lambda: spec_of(windows=(0,))),
        ("windows", lambda: spec_of(windows=5)),
        ("features", lambda: spec_of(features=[["lse"]])),
        ("causal", lambda: spec_of(causal="no")),
        ("batch_invariant", lambda: spec_of(batch_invariant=None)),
        ("dtype", lambda: spec_of(dtype="bf16")),
        ("kv_format", lambda: spec_of(kv_format=["bf16"])),
        ("kv.k", lambda: cache_of(k=[1.0])),
        ("layer.scale", lambda: LayerArgs(scale="1.0")),
        ("layer.scale", lambda: LayerArgs(scale=torch.ones(()))),
        ("layer.soft_cap", lambda: LayerArgs(soft_cap=True)),
        ("layer.window", lambda: LayerArgs(window=[3])),
        ("layer.window", lambda: LayerArgs(window=torch.tensor(3))),
        ("layer.sinks", lambda: LayerArgs(sinks=[0.0] * 4)),
        ("features", lambda: spec_of(features={"soft_caps"})),
        ("num_qo_heads", lambda: spec_of(num_qo_heads=3)),
        ("page_size", lambda: spec_of(page_size=257)),
        ("kv.k_scale", lambda: fp8_cache("0.5")),
        ("kv.k_scale", lambda: fp8_cache(0.0)),
        ("kv.k_scale", lambda: fp8_cache(float("inf"))),
        ("kv.v_scale", lambda: cache_of(v_scale=0.5)),
        ("layer.soft_cap", lambda: LayerArgs(soft_cap=float("inf")).resolve(spec_of(features={"soft_cap"}))),
        ("layer.soft_cap", lambda: LayerArgs(soft_cap=3.0).resolve(spec_of())),
        ("layer.scale", lambda: LayerArgs(scale=float("nan")).resolve(spec_of())),
        ("layer.window", lambda: LayerArgs(window=5).resolve(spec_of(windows=(None, 4)))),
        ("q_format", lambda: spec_of(q_format="bf16")),
        ("rope", lambda: spec_of(rope="half")),
        ("rope.rotary_dim", lambda: spec_of(rope=FusedRope(18))),
        ("rope.rotary_dim", lambda: FusedRope(7)),
        ("rope.pairs", lambda: FusedRope(8, "neox")),
        ("rope.keys", lambda: FusedRope(8, keys=1)),
        ("layer.rope", lambda: LayerArgs(rope=FusedRope(8))),
        ("layer.rope", lambda: LayerArgs(rope=angles(8)).resolve(spec_of())),
        ("layer.rope", lambda: LayerArgs().resolve(spec_of(rope=FusedRope(8)))),
        ("layer.rope.config.rotary_dim", lambda: LayerArgs(rope=angles(16)).resolve(spec_of(rope=FusedRope(8)))),
        (
            "layer.rope.config.pairs",
            lambda: LayerArgs(rope=angles(8)).resolve(spec_of(rope=FusedRope(8, "interleaved"))),
        ),
        ("layer.rope.cos_sin", lambda: LayerArgs(rope=angles(8, 50)).resolve(spec_of(rope=FusedRope(8)))),
        ("layer.q_scale", lambda: LayerArgs(q_scale=0.5).resolve(spec_of())),
        ("layer.q_scale", lambda: LayerArgs(q_scale=0.0).resolve(spec_of(q_format="fp8_e4m3"))),
        ("layer.q_scale", lambda: LayerArgs(q_scale=torch.ones(3)).resolve(spec_of(q_format="fp8_e4m3"))),
        ("layer.q_scale", lambda: LayerArgs(q_scale="1").resolve(spec_of(q_format="fp8_e4m3"))),
    ],
)
def test_records_name_what_they_refuse(argument, make):
    with pytest.raises(ArgumentError, match=f"^{argument}:"):
        make()


def test_queries_have_the_format_of_the_spec():
    plan = fi.plan(spec_of(q_format="fp8_e5m2"), **CAPACITY)
    plan.update(batch_of())
    with pytest.raises(ArgumentError, match=r"^q: .*float8_e5m2"):
        fi.attention(torch.zeros(6, 4, 16), cache_of(), plan)
    q = torch.randn(6, 4, 16).to(torch.float8_e5m2)
    out = fi.attention(q, cache_of(), plan, LayerArgs(q_scale=2.0))
    plain = fi.plan(spec_of(), **CAPACITY)
    plain.update(batch_of())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, fi.attention(q.float() * 2.0, cache_of(), plain))


def test_rotation_within_attention_equals_rotation_before():
    """Of queries over rotated keys, and of both over keys as they were."""
    batch, kv, q, table = batch_of(), cache_of(), torch.randn(6, 4, 16), angles(16)
    position = torch.tensor([29, 0, 1, 2, 3, 16])
    turned = fi.rope(q, None, position, table)[0]
    plain = fi.plan(spec_of(), **CAPACITY)
    plain.update(batch)
    for rope, queries in ((FusedRope(16), q), (None, turned)):
        plan = fi.plan(spec_of(rope=rope), **CAPACITY)
        plan.update(batch)
        layer = LayerArgs(rope=table) if rope else LayerArgs()
        out = fi.attention(queries, kv, plan, layer)
        torch.testing.assert_close(out, fi.attention(turned, kv, plain))


def test_positions_are_those_in_the_cache():
    """Sinks and a window of keys kept unrotated, what lay between evicted: as if the text had never had it."""
    table, rope = angles(16), FusedRope(16, keys=True)
    keys, values = torch.randn(2, 40, 1, 2, 16)
    kept = [0, 1, 2, 3, *range(28, 40)]
    pages = torch.tensor([kept], dtype=torch.int32)
    lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([len(kept)], dtype=torch.int32)
    plan = fi.plan(spec_of(page_size=1, rope=rope), **CAPACITY)
    plan.update(Batch(*lengths, pages))
    q = torch.randn(1, 4, 16)
    out = fi.attention(q, KVCache(keys, values), plan, LayerArgs(rope=table))
    turned = fi.rope(keys[kept, 0], None, torch.arange(len(kept)), table)[0]
    plain = fi.plan(spec_of(table="ragged", page_size=None), **CAPACITY)
    plain.update(Batch(*lengths, kv_indptr=torch.tensor([0, len(kept)], dtype=torch.int32)))
    rotated = fi.rope(q, None, torch.tensor([len(kept) - 1]), table)[0]
    torch.testing.assert_close(out, fi.attention(rotated, KVCache(turned, values[kept, 0]), plain))
