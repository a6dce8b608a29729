"""torch.compile sees the operations as single nodes and gets eager's results."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core import (
    AttentionSpec,
    Batch,
    DrawKeys,
    FilterParams,
    KVCache,
    LayerArgs,
    PenaltyParams,
    RopeConfig,
    RopeTable,
    TokenHistory,
    YarnScaling,
    library,
)
from fi_core.registry import registry
from torch._subclasses.fake_tensor import FakeTensorMode


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of() -> Batch:
    return Batch(ints(0, 1, 3), ints(8, 6), ints(3, 1, 0, 2).view(2, 2))


def cache_of(fp8: bool = False) -> KVCache:
    torch.manual_seed(0)
    whole = torch.randn(4, 2, 4, 2, 16)
    if not fp8:
        return KVCache(whole[:, 0], whole[:, 1])
    stored = whole.to(torch.float8_e4m3fn).view(torch.uint8)
    return KVCache(stored[:, 0], stored[:, 1], format="fp8_e4m3", k_scale=torch.tensor([0.5, 2.0]), v_scale=0.25)


def plan_of(**options):
    spec = AttentionSpec(4, 2, 16, dtype=torch.float32, page_size=4, **options)
    plan = fi.plan(spec, max_batch=4, max_q_tokens=4, max_q_len=3, max_kv_len=8, device="cpu")
    plan.update(batch_of())
    return plan


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("fp8", [False, True])
def test_attention_compiles(fp8):
    kv = cache_of(fp8)
    plan = plan_of(kv_format="fp8_e4m3" if fp8 else None, features={"lse", "sinks", "soft_cap"}, windows=(None, 3))
    layer = LayerArgs(scale=0.3, soft_cap=4.0, window=3, sinks=torch.randn(4))

    def step(q, lse):
        out = fi.attention(q * 2, kv, plan, layer, lse=lse)
        return out[:3] + 1

    q, lse, eager_lse = torch.randn(4, 4, 16), torch.zeros(4, 4), torch.zeros(4, 4)
    torch.testing.assert_close(compiled(step)(q, lse), step(q, eager_lse))
    torch.testing.assert_close(lse, eager_lse)
    assert eager_lse[:3].ne(0).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_attention_with_scaled_queries_and_rope_compiles(per_head):
    kv = cache_of()
    plan = plan_of(q_format="fp8_e4m3", rope=fi.FusedRope(16, keys=True))
    scaling = YarnScaling(2.0, 32, attention_factor=1.25)
    table = RopeTable.make(RopeConfig(16, scaling=scaling), "cpu")
    q_scale = torch.rand(4) + 0.5 if per_head else 0.75
    layer = LayerArgs(q_scale=q_scale, rope=table)
    q = torch.randn(3, 4, 16).to(torch.float8_e4m3fn)
    expected = fi.attention(q, kv, plan, layer)
    torch.testing.assert_close(compiled(lambda q: fi.attention(q, kv, plan, layer))(q), expected)
    without = fi.attention(q, kv, plan, LayerArgs(q_scale=q_scale, rope=RopeTable.make(RopeConfig(16), "cpu")))
    assert not torch.allclose(without, expected)


def test_a_compiled_step_follows_updates_of_its_plan():
    kv, plan = cache_of(), plan_of()
    step = compiled(lambda q: fi.attention(q, kv, plan))
    q = torch.randn(3, 4, 16)
    first = step(q)
    plan.update(Batch(ints(0, 1, 3), ints(5, 6), batch_of().table))
    second = step(q)
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(second, fi.attention(q, kv, plan))


@pytest.mark.parametrize("with_rope", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_append_then_attend_compiles(with_rope, fp8):
    plan = plan_of(kv_format="fp8_e4m3" if fp8 else None)
    table = RopeTable.make(RopeConfig(16), "cpu", 8) if with_rope else None
    batch = batch_of()

    def step(q, k, v, kv):
        q = q * 1.0
        fi.append_kv(k, v, kv, batch, rope=table, q=q if with_rope else None)
        return fi.attention(q, kv, plan), q

    q, k, v = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    expected_kv, kv = cache_of(fp8), cache_of(fp8)
    expected, found = step(q, k, v, expected_kv), compiled(step)(q, k, v, kv)
    torch.testing.assert_close(found, expected)
    assert torch.equal(kv.k, expected_kv.k) and torch.equal(kv.v, expected_kv.v)
    assert not torch.equal(kv.k, cache_of(fp8).k)


def test_merge_states_compiles_and_passes_opcheck():
    o, lse = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    torch.testing.assert_close(compiled(lambda a, b: fi.merge_states(a, b))(o, lse), fi.merge_states(o, lse))
    outputs = (torch.empty(2, 4, 8), torch.empty(2, 4))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fi.merge_states.default, (o, lse, *outputs), test_utils=tests)


def test_attention_and_append_pass_opcheck():
    tests = ("test_schema", "test_faketensor")
    kv, plan = cache_of(), plan_of()
    details = library.cache_details(kv)
    workspace = list(plan.state.workspace)
    arguments = (torch.randn(3, 4, 16), kv.k, kv.v, *details, plan.handle, workspace)
    arguments += (None, None, -1, None, None, None, None, None, 1.0)
    torch.library.opcheck(torch.ops.fi.attention.default, (*arguments, torch.empty(3, 4, 16), None), test_utils=tests)
    batch = batch_of()
    lengths = [batch.q_indptr, batch.kv_lens, batch.table, None, None, None, None]
    k = torch.randn(3, 2, 16)
    arguments = (
        k,
        k.clone(),
        kv.k.contiguous(),
        kv.v.contiguous(),
        *details,
        lengths,
        "none",
        0,
        1.0,
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.fi.append_kv.default, arguments, test_utils=tests)


def sampling_calls() -> dict:
    """Every sampling operation as a function of logits [3, 40]."""
    numbers = torch.arange(3)
    keys = DrawKeys(numbers + 7, numbers.int(), numbers * 2)
    filters = FilterParams(temperature=torch.full((3,), 0.7), top_k=ints(5, 0, 9), top_p=torch.full((3,), 0.9))
    counts = torch.ones(3, 40, dtype=torch.int32)
    penalties = PenaltyParams(
        allowed=torch.full((3, 2), -2, dtype=torch.int32),
        bias_indptr=ints(0, 1, 1, 2),
        bias_tokens=ints(3, -1),
        bias_values=torch.ones(2),
        repetition=torch.full((3,), 1.3),
        presence=torch.full((3,), 0.5),
        output_counts=counts,
        rows=ints(2, 1, 0),
    )
    drafts, parents = torch.tensor([[1, 2], [3, 4], [5, -1]]), ints(-1, 0, -1, -1, 1, 0).view(3, 2)

    history = TokenHistory.empty(3, 40, 6)
    sparse = PenaltyParams(repetition=torch.full((3,), 1.3), presence=torch.full((3,), 0.5), history=history)

    def recorded(logits):
        held = TokenHistory(*(tensor.clone() for tensor in history.tensors))
        fi.record_tokens(held, logits.argmax(dim=1))
        return held.entries

    def probs(logits):
        return torch.softmax(torch.stack([logits, logits * 2, -logits], 1), -1)

    return {
        "sample": lambda logits: fi.sample(logits, filters, keys, rows=ints(2, 2, 0).to(logits.device)),
        "sample with penalties": lambda logits: fi.sample(
            logits, filters, keys, penalties=sparse, slots=torch.tensor([2, -1, 0])
        ),
        "record_tokens": lambda logits: recorded(logits),
        "filter_logits": lambda logits: fi.filter_logits(logits, filters, "logits"),
        "top_k": lambda logits: fi.top_k(logits, 4),
        "logprobs": lambda logits: fi.logprobs(logits, drafts[:, 0].contiguous(), 2).values,
        "penalize_logits": lambda logits: fi.penalize_logits(logits, penalties),
        "verify_chain": lambda logits: fi.verify_chain(drafts, None, probs(logits), keys),
        "verify_chain with draft_probs": lambda logits: fi.verify_chain(
            drafts, probs(logits)[:, 1:].contiguous(), probs(logits), keys
        ),
        "verify_tree": lambda logits: fi.verify_tree(drafts, parents, probs(logits), keys),
    }


@pytest.mark.parametrize("name", sorted(sampling_calls()))
def test_sampling_compiles(name):
    torch.manual_seed(3)
    call, logits = sampling_calls()[name], torch.randn(3, 40) * 3
    expected, found = call(logits), compiled(call)(logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_operation_is_registered_with_an_empty_fake_kernel():
    names = set(registry().operations)
    with FakeTensorMode():
        x, out = torch.empty(2, 8), torch.empty(2, 4)
        torch.ops.fi.silu_mul(x, out)
    assert {name for name in names if hasattr(torch.ops.fi, name)} == names
    for name in names:
        schema = getattr(torch.ops.fi, name).default._schema
        assert not schema.returns
        assert any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)


def test_register_refuses_operators_that_return():
    with pytest.raises(ValueError, match="returns nothing"):
        library.register("bad(Tensor x) -> Tensor", lambda x: x)
