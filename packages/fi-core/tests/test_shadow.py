"""Shadow mode compares the fraction of calls it is told to, passes right results and reports wrong ones."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core import AttentionSpec, Batch, KVCache, RopeConfig, RopeTable, ShadowMismatchError, checks, shadow
from fi_core.contract import Tolerance
from fi_core.ops import append_kv as append_module
from fi_core.reference import plugin as reference_plugin
from fi_core.registry import registry, reset_registry
from fi_core.sampling import DrawKeys, FilterParams, PenaltyParams, TokenHistory
from fi_core.settings import settings


@pytest.fixture
def shadowing(monkeypatch):
    def fresh() -> None:
        settings.cache_clear()
        shadow.reset()
        # Kernels bound before keep their mode.
        reset_registry()

    def start(fraction: str) -> None:
        monkeypatch.setenv("FI_SHADOW", fraction)
        fresh()

    yield start
    monkeypatch.undo()
    fresh()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of() -> Batch:
    return Batch(ints(0, 1, 3), ints(8, 6), ints(3, 1, 0, 2).view(2, 2))


def cache_of(dtype: torch.dtype = torch.float32) -> KVCache:
    torch.manual_seed(0)
    return KVCache(torch.randn(4, 4, 2, 8).to(dtype), torch.randn(4, 4, 2, 8).to(dtype))


class Spoiled:
    """The right result, with one element changed."""

    def __init__(self, state, row: int, name: str) -> None:
        self.state, self.row, self.name = state, row, name

    def run(self, q, kv, layer, out, lse) -> None:
        self.state.run(q, kv, layer, out, lse)
        (out if self.name == "out" else lse)[self.row, 1] += 0.1


def plan_of():
    spec = AttentionSpec(2, 2, 8, dtype=torch.float32, page_size=4, features={"lse"})
    plan = fi.plan(spec, max_batch=4, max_q_tokens=4, max_q_len=3, max_kv_len=8, device="cpu")
    plan.update(batch_of())
    return plan


def test_right_results_pass_and_are_counted(shadowing):
    shadowing("1")
    plan, q, kv = plan_of(), torch.randn(4, 2, 8), cache_of()
    for _ in range(3):
        fi.attention(q, kv, plan, lse=torch.zeros(4, 2))
    assert shadow.statistics() == shadow.ShadowStatistics(calls=3, compared=3)


def test_a_fraction_of_the_calls_is_compared(shadowing):
    shadowing("0.25")
    plan, q, kv = plan_of(), torch.randn(4, 2, 8), cache_of()
    for _ in range(10):
        fi.attention(q, kv, plan)
    assert shadow.statistics() == shadow.ShadowStatistics(calls=10, compared=2)


@pytest.mark.parametrize(("name", "row", "request_idx"), [("out", 0, 0), ("out", 2, 1), ("lse", 1, 1)])
def test_wrong_results_name_operation_request_and_error(shadowing, name, row, request_idx):
    shadowing("1")
    plan = plan_of()
    plan.state = Spoiled(plan.state, row, name)
    with pytest.raises(ShadowMismatchError, match=rf"attention, request {request_idx}, {name}: .*rel_rmse"):
        fi.attention(torch.randn(4, 2, 8), cache_of(), plan, lse=torch.zeros(4, 2))
    assert shadow.statistics().mismatches == 1


def test_nan_from_the_inputs_is_not_a_mismatch(shadowing):
    shadowing("1")
    kv = cache_of()
    kv.v[3, 0, 0, 0] = float("nan")
    fi.attention(torch.randn(4, 2, 8), kv, plan_of())
    assert shadow.statistics().compared == 1


@pytest.mark.parametrize("with_rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_is_compared(shadowing, monkeypatch, with_rope, dtype):
    shadowing("1")
    k, v, q = (torch.randn(3, 2, 8).to(dtype) for _ in range(3))
    options = {"rope": RopeTable.make(RopeConfig(8), "cpu", 8), "q": q} if with_rope else {}
    fi.append_kv(k, v, cache_of(dtype), batch_of(), **options)
    assert shadow.statistics() == shadow.ShadowStatistics(calls=1, compared=1)
    right = append_module._run

    def spoil(k, v, kv, *rest):
        right(k, v, kv, *rest)
        kv.k[2, 0, 0] *= 1.5

    monkeypatch.setattr(append_module, "_run", spoil)
    with pytest.raises(ShadowMismatchError, match="append_kv, k: "):
        fi.append_kv(k, v, cache_of(dtype), batch_of(), **options)


def test_each_mode_is_on_by_itself(shadowing, monkeypatch):
    called = []
    monkeypatch.setattr(checks, "check_attention", lambda *arguments: called.append("attention"))
    monkeypatch.setattr(checks, "check_append", lambda *arguments: called.append("append_kv"))
    k = torch.randn(3, 2, 8)
    shadowing("1")
    fi.attention(torch.randn(4, 2, 8), cache_of(), plan_of())
    fi.append_kv(k, k, cache_of(), batch_of())
    assert called == [] and shadow.statistics().compared == 2
    monkeypatch.setenv("FI_CHECK", "1")
    shadowing("0")
    fi.attention(torch.randn(4, 2, 8), cache_of(), plan_of())
    fi.append_kv(k, k, cache_of(), batch_of())
    assert called == ["attention", "append_kv"] and shadow.statistics().calls == 0


def keys_of(num_rows: int) -> DrawKeys:
    count = torch.arange(num_rows)
    return DrawKeys(count + 5, count.int(), count * 3)


def functional_calls() -> dict:
    """A call of every operation whose kernel a Dispatcher finds, but append_kv and copy_pages."""
    torch.manual_seed(1)
    x, weight = torch.randn(3, 8).to(torch.bfloat16), torch.randn(8).to(torch.bfloat16)
    q, positions = torch.randn(3, 2, 8).to(torch.bfloat16), torch.tensor([0, 5, 9])
    logits, filters = torch.randn(3, 50), FilterParams(top_k=torch.full((3,), 7, dtype=torch.int32))
    probs = torch.softmax(torch.randn(2, 3, 50), -1)
    drafts, parents = torch.randint(0, 50, (2, 2)), torch.tensor([[-1, 0], [-1, -1]], dtype=torch.int32)
    batch = Batch(torch.arange(3).int(), torch.tensor([40, 40]).int(), torch.tensor([[1, 2, 3], [1, 2, 4]]).int())
    return {
        "find_shared_prefixes": lambda: fi.find_shared_prefixes(batch, 16, min_saved_tokens=1),
        "merge_states": lambda: fi.merge_states(torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2)),
        "rope": lambda: fi.rope(q, q.clone(), positions, RopeTable.make(RopeConfig(8), "cpu")),
        "rmsnorm": lambda: fi.rmsnorm(x[0], weight, out=x[0]),
        "add_rmsnorm": lambda: fi.add_rmsnorm(x, x.clone(), weight),
        "silu_mul": lambda: fi.silu_mul(x),
        "gelu_mul": lambda: fi.gelu_mul(x),
        "sample": lambda: fi.sample(logits, filters, keys_of(3)),
        "filter_logits": lambda: fi.filter_logits(logits, filters),
        "top_k": lambda: fi.top_k(logits, 4),
        "logprobs": lambda: fi.logprobs(logits.bfloat16(), torch.tensor([1, -1, 49]), 3),
        "penalize_logits": lambda: fi.penalize_logits(logits, PenaltyParams(repetition=torch.rand(3) + 1,
                                                      output_counts=torch.ones(3, 50, dtype=torch.int32)), out=logits),
        "record_tokens": lambda: fi.record_tokens(TokenHistory.empty(3, 50, 4), torch.tensor([1, 1, 7])),
        "verify_chain": lambda: fi.verify_chain(drafts, None, probs, keys_of(2)),
        "verify_tree": lambda: fi.verify_tree(drafts, parents, probs, keys_of(2)),
    }  # fmt: skip


OUTPUT_PLACE = {"sample": 4, "penalize_logits": 2}
"""Where the output is among a kernel's arguments; elsewhere last."""


def output_of(op: str, arguments: tuple) -> torch.Tensor:
    if op == "record_tokens":
        return arguments[0].num_output
    return arguments[-1].indices if op == "logprobs" else arguments[OUTPUT_PLACE.get(op, -1)]


def spoil_last_output(op: str):
    """The reference of ``op`` with its last output changed."""
    right = reference_plugin.load(op)

    def spoiled(*arguments) -> None:
        right(*arguments)
        last = output_of(op, arguments)
        last.copy_(last + 1)

    return spoiled


def test_every_operation_that_computes_is_compared():
    named = set(shadow._LIMITS) | set(shadow._DRAWN) | {"attention", "append_kv", "copy_pages"}
    assert named == set(registry().operations)
    assert set(functional_calls()) == set(shadow._LIMITS) | set(shadow._DRAWN)


@pytest.mark.parametrize("op", sorted(set(shadow._LIMITS) | set(shadow._DRAWN)))
@pytest.mark.parametrize("inference", [False, True])
def test_functional_operations_are_compared(shadowing, monkeypatch, op, inference):
    shadowing("1")
    with torch.inference_mode(inference):
        call = functional_calls()[op]
        with fi.use(backend="reference"):
            call()
            call()
            assert shadow.statistics() == shadow.ShadowStatistics(calls=2, compared=2)
            reset_registry()
            entry = next(item for item in registry().kernels(op) if item.backend == "reference")
            monkeypatch.setitem(registry()._loaded, f"{op}:{entry.full_name}", spoil_last_output(op))
            with pytest.raises(ShadowMismatchError, match=op):
                call()
    assert shadow.statistics().mismatches == 1


def test_one_drawn_row_that_differs_is_counted_and_a_second_is_an_error(shadowing):
    shadowing("1")
    right = reference_plugin.load("sample")

    def once_in_a_while(logits, filters, keys, rows, tokens) -> None:
        right(logits, filters, keys, rows, tokens)
        tokens[0] += int(logits[0, 0] > 0)

    kernel = shadow.shadowed("sample", once_in_a_while)
    logits, tokens = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    arguments = (FilterParams(), keys_of(1), None, tokens)
    for first in (0.0, 1.0, 0.0):
        logits[0, 0] = first
        kernel(logits, *arguments)
    assert shadow.statistics().mismatches == 0
    logits[0, 0] = 1.0
    with pytest.raises(ShadowMismatchError, match="sample, row 0: 2 of the 4 rows compared so far"):
        kernel(logits, *arguments)


def test_outliers_may_be_one_step_of_their_dtype_off(shadowing):
    shadowing("1")
    right = reference_plugin.load("rmsnorm")

    def nudged(x, weight, eps, weight_bias, scale, out) -> None:
        right(x, weight, eps, weight_bias, scale, out)
        out[0, 0] *= factor

    kernel = shadow.shadowed("rmsnorm", nudged)
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    x[0, 0] = 20000.0
    out = torch.empty_like(x)
    factor = 1.0 + 2.0**-7
    kernel(x, torch.full((4096,), 20.0, dtype=torch.bfloat16), 1e-6, 0.0, None, out)
    factor = 1.0 + 2.0**-5
    with pytest.raises(ShadowMismatchError, match="rmsnorm"):
        kernel(x, torch.full((4096,), 20.0, dtype=torch.bfloat16), 1e-6, 0.0, None, out)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_norms_with_fp8_output_are_compared(shadowing, monkeypatch, dtype):
    shadowing("1")
    x, out = torch.randn(8, 256).bfloat16(), torch.zeros(8, 256, dtype=dtype)
    weight, scale = torch.randn(256).bfloat16(), torch.tensor([0.01])
    with fi.use(backend="reference"):
        fi.rmsnorm(x, weight, scale=scale, out=out)
        fi.add_rmsnorm(x, x.clone(), weight, scale=0.01, out=out)
    assert shadow.statistics() == shadow.ShadowStatistics(calls=2, compared=2)
    right = reference_plugin.load("rmsnorm")

    def without_scale(x, weight, eps, weight_bias, scale, out) -> None:
        right(x, weight, eps, weight_bias, scale * 2, out)

    with pytest.raises(ShadowMismatchError, match="rmsnorm"):
        shadow.shadowed("rmsnorm", without_scale)(x, weight, 1e-6, 0.0, scale, out)


def test_one_bad_element_is_judged_among_all_the_others():
    expected = torch.ones(4096, dtype=torch.float64)
    actual = expected.float()
    actual[7] += 1e-4
    shadow._compare("a value", actual, expected, Tolerance(1e-5, 1e-3))
    actual[7] += 1e-2
    with pytest.raises(ShadowMismatchError, match="a value: first bad at"):
        shadow._compare("a value", actual, expected, Tolerance(1e-5, 1e-3))
