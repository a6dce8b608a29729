"""Shadow mode compares the fraction of calls it is told to, passes right results and reports wrong ones."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core import AttentionSpec, Batch, KVCache, RopeConfig, RopeTable, ShadowMismatchError, checks, shadow
from fi_core.ops import append_kv as append_module
from fi_core.settings import settings


@pytest.fixture
def shadowing(monkeypatch):
    def start(fraction: str) -> None:
        monkeypatch.setenv("FI_SHADOW", fraction)
        settings.cache_clear()
        shadow.reset()

    yield start
    monkeypatch.undo()
    settings.cache_clear()
    shadow.reset()


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
