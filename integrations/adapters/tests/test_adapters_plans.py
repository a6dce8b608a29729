"""An engine's layers and limits as specs, capacities and plans; what the plans compute, against a dense oracle."""

from types import SimpleNamespace

import fi_core as fi
import pytest
import torch
from fi_adapters.forms import LayerForm, Limits, is_captured, kv_format_of, refusal
from fi_adapters.plans import PlanPair, common_prefix, finds_prefixes, shares_prefixes, update
from fi_core.settings import settings

FORM = LayerForm(4, 2, 32, "fp32")
LIMITS = Limits(max_batch=4, max_tokens=64, max_kv_len=128, decode_len=3)
HOPPER = fi.Target("cuda", (9, 0))


@pytest.fixture
def environment(monkeypatch):
    """Sets FI_* variables; the settings are read again, and once more afterwards."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()

    yield change
    monkeypatch.undo()
    settings.cache_clear()


def test_cache_dtypes():
    names = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
    assert [kv_format_of(name, torch.bfloat16) for name in names] == [
        "bf16", "fp16", "bf16", "fp8_e4m3", "fp8_e4m3", "fp8_e5m2",
    ]  # fmt: skip
    with pytest.raises(fi.ArgumentError, match="int8_per_token_head"):
        kv_format_of("int8_per_token_head", torch.bfloat16)


def test_spec_keeps_each_window_once():
    form = LayerForm(4, 2, 32, "fp8_e4m3", head_dim_vo=48)
    spec = form.spec(torch.float16, 32, [None, 128, None, 128], batch_invariant=True)
    assert spec.windows == (None, 128) and spec.page_size == 32 and spec.kv_format == "fp8_e4m3"
    assert spec.causal and spec.batch_invariant and spec.table == "dense" and spec.head_dim_vo == 48


def test_capacities():
    assert LIMITS.capacity(decode=True) == fi.Capacity(4, 12, 3, 128, max_prefix_depth=1)
    assert LIMITS.capacity(decode=False) == fi.Capacity(4, 64, 64, 128, max_prefix_depth=1)
    long_steps = Limits(max_batch=2, max_tokens=4096, max_kv_len=100)
    assert long_steps.capacity(decode=False).max_q_len == 100
    assert LIMITS.capacity(True, 2).max_prefixes == 2 and LIMITS.capacity(True, 2).max_prefix_depth == 1
    assert LIMITS.capacity(True, 9, 2) == fi.Capacity(4, 12, 3, 128, 9, 2)


def test_the_reference_alone_is_refused_on_a_gpu_unless_asked_for(environment):
    spec = FORM.spec(torch.float32, 16)
    with fi.use(backend="reference"):
        assert refusal(spec, 1, fi.Target("cpu")) is None
        why_not = str(refusal(spec, 1, HOPPER))
        assert "reference.attention" in why_not and "FI_BACKEND=reference" in why_not
        environment(FI_BACKEND="reference")
        assert refusal(spec, 1, HOPPER) is None


def test_what_no_kernel_serves_is_refused_with_every_reason():
    spec = FORM.spec(torch.float64, 16)
    with fi.use(backend="triton"):
        assert "triton" in str(refusal(spec, 1, HOPPER))


def test_shadowed_and_reference_steps_are_not_captured(environment):
    assert is_captured("cuda") and not is_captured("cpu")
    environment(FI_SHADOW="0.5")
    assert not is_captured("cuda")
    environment(FI_SHADOW="0", FI_BACKEND="reference")
    assert not is_captured("cuda")


def batch_of(q_lens, kv_lens):
    indptr = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pages = torch.arange(1, 1 + 8 * len(q_lens), dtype=torch.int32).view(-1, 8)
    return fi.Batch(indptr, torch.tensor(kv_lens, dtype=torch.int32), table=pages)


def pair_of(form, *windows, **options):
    spec = form.spec(torch.float32, 16, windows or (None,), options.pop("batch_invariant", False))
    return PlanPair(spec, LIMITS, torch.device("cpu"), **options)


def test_steps_with_few_new_tokens_have_a_plan_of_their_own():
    pairs = {FORM: pair_of(FORM)}
    decode = update(pairs, batch_of([1, 3], [9, 20]), 3)[FORM]
    mixed = update(pairs, batch_of([1, 4], [9, 20]), 4)[FORM]
    assert decode is not mixed
    assert decode.capacity.max_q_len == 3 and mixed.capacity.max_q_len == 64
    assert decode.batch.size == mixed.batch.size == 2


@pytest.mark.parametrize("option", ["one_plan", "batch_invariant"])
def test_one_plan_for_every_step(option):
    pair = pair_of(FORM, **{option: True})
    assert pair.pick(1) is pair.pick(64)


def test_layers_with_other_windows_and_features_share_a_batch():
    sinks = LayerForm(4, 2, 32, "fp32", frozenset({"sinks"}))
    batch = batch_of([2, 1], [6, 30])
    found = update({FORM: pair_of(FORM, None, 5), sinks: pair_of(sinks)}, batch, 2)
    q, kv = torch.randn(3, 4, 32), fi.KVCache(torch.randn(17, 16, 2, 32), torch.randn(17, 16, 2, 32))
    for window in (None, 5):
        out = fi.attention(q, kv, found[FORM], fi.LayerArgs(window=window))
        torch.testing.assert_close(out, dense(q, kv, batch, window))
    without = torch.full((4,), -torch.inf)
    out = fi.attention(q, kv, found[sinks], fi.LayerArgs(sinks=without))
    torch.testing.assert_close(out, dense(q, kv, batch, None))


def test_a_plan_of_what_fi_lacks_raises_every_reason():
    with fi.use(backend="triton"), pytest.raises(fi.UnsupportedError, match="device"):
        pair_of(FORM)


def dense(q, kv, batch, window):
    """Softmax over each request's gathered keys, in float64."""
    rows, starts = [], batch.q_indptr.tolist()
    for request, kv_len in enumerate(batch.kv_lens.tolist()):
        keys, values = (cache[batch.table[request].long()].flatten(0, 1)[:kv_len].double() for cache in (kv.k, kv.v))
        keys, values = (each.repeat_interleave(2, dim=1) for each in (keys, values))
        q_len = starts[request + 1] - starts[request]
        for token in range(q_len):
            position = kv_len - q_len + token
            first = 0 if window is None else max(0, position - window + 1)
            logits = torch.einsum("hd,thd->ht", q[starts[request] + token].double(), keys[first : position + 1])
            weights = (logits / 32**0.5).softmax(dim=1)
            rows.append(torch.einsum("ht,thd->hd", weights, values[first : position + 1]))
    return torch.stack(rows).float()


def test_shared_prefixes():
    spec = FORM.spec(torch.float32, 16)
    assert common_prefix(3, 32, torch.device("cpu")).nodes.tolist() == [[0, 3, 0, 32]]
    with fi.use(backend="reference"):
        assert shares_prefixes(spec, LIMITS, fi.Target("cpu")) and not shares_prefixes(spec, LIMITS, HOPPER)
    invariant = FORM.spec(torch.float32, 16, batch_invariant=True)
    assert not shares_prefixes(invariant, LIMITS, fi.Target("cpu"))


def test_prefixes_are_found_where_nothing_waits_for_the_device():
    with fi.use(backend="reference"):
        assert finds_prefixes(fi.Target("cpu"), 2) and not finds_prefixes(HOPPER, 2)
    with fi.use(backend="cuda"):
        assert not finds_prefixes(fi.Target("cpu"), 2)


def test_a_plan_for_steps_whose_prefixes_were_looked_for():
    assert pair_of(FORM).shared is None
    pair = pair_of(FORM, shared=LIMITS.capacity(True, 3, 2))
    assert pair.shared.capacity.max_prefixes == 3 and pair.shared.capacity.max_prefix_depth == 2
    assert pair.pick(1) is pair.decode and pair.decode.capacity.max_prefixes == 0


def test_a_prefix_is_not_shared_by_a_backend_that_steps_without_one_would_not_use(monkeypatch):
    spec, kernels = FORM.spec(torch.float32, 16), {True: "slow", False: "fast"}

    class Registry:
        operations = {"attention": SimpleNamespace(request=lambda target, **values: values["levels"])}

        @staticmethod
        def select(levels):
            return SimpleNamespace(entry=SimpleNamespace(backend=kernels[levels]))

    monkeypatch.setattr("fi_adapters.plans.registry", Registry)
    assert not shares_prefixes(spec, LIMITS, fi.Target("cpu"))
    kernels[True] = "fast"
    assert shares_prefixes(spec, LIMITS, fi.Target("cpu")) and shares_prefixes(spec, LIMITS, fi.Target("cpu"), (True,))
