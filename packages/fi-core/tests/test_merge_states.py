"""merge_states against sums in Python floats, against attention over the parts, and its argument errors."""

from __future__ import annotations

import math

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, AttentionSpec, Batch, KVCache
from fi_core.ops.cases.merge_states import cases
from fi_core.ops.merge_states import merge_states_cost


def plain(o: torch.Tensor, lse: torch.Tensor) -> tuple[list[float], float]:
    weights = [math.exp(x) for x in lse.tolist()]
    total = sum(weights)
    if total == 0:
        return [0.0] * o.shape[-1], -math.inf
    rows = [row.tolist() for row, weight in zip(o, weights, strict=True) if weight > 0]
    kept = [weight for weight in weights if weight > 0]
    return [sum(w * row[i] for w, row in zip(kept, rows, strict=True)) / total for i in range(o.shape[-1])], math.log(
        total
    )


@pytest.mark.parametrize("num_states", [1, 2, 7])
def test_merge_equals_plain_sums_and_ignores_empty_states(num_states):
    torch.manual_seed(num_states)
    o, lse = torch.randn(num_states, 3, 2, 8), torch.randn(num_states, 3, 2) * 4
    o[0, 1], lse[0, 1] = math.nan, -math.inf
    o[:, 2], lse[:, 2] = math.nan, -math.inf
    out, log_sum = fi.merge_states(o, lse)
    for token in range(3):
        for head in range(2):
            values, total = plain(o[:, token, head].double(), lse[:, token, head].double())
            torch.testing.assert_close(out[token, head].double(), torch.tensor(values).double(), rtol=1e-5, atol=1e-6)
            assert float(log_sum[token, head]) == total or math.isclose(
                float(log_sum[token, head]), total, rel_tol=1e-5
            )


def test_no_state_sees_no_key():
    out, lse = fi.merge_states(torch.zeros(0, 2, 3, 8), torch.zeros(0, 2, 3))
    assert out.eq(0).all() and out.shape == (2, 3, 8) and lse.eq(-math.inf).all() and lse.shape == (2, 3)


def test_merged_parts_equal_attention_over_all_keys():
    torch.manual_seed(0)
    spec = AttentionSpec(4, 2, 16, dtype=torch.float32, table="ragged", page_size=None, causal=False, features={"lse"})
    plan = fi.plan(spec, max_batch=1, max_q_tokens=3, max_q_len=3, max_kv_len=20, device="cpu")
    q, k, v = torch.randn(3, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)

    def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        indptr = torch.tensor([0, stop - start], dtype=torch.int32)
        plan.update(Batch(torch.tensor([0, 3], dtype=torch.int32), indptr[1:], kv_indptr=indptr))
        lse = torch.empty(3, 4)
        return fi.attention(q, KVCache(k[start:stop], v[start:stop]), plan, lse=lse), lse

    parts = [part(0, 7), part(7, 7), part(7, 20)]
    out, lse = fi.merge_states(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))
    whole, whole_lse = part(0, 20)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "o", "lse"),
    [
        ("o", torch.zeros(2, 3, 8), torch.zeros(2, 3)),
        ("o.dtype", torch.zeros(2, 3, 1, 8, dtype=torch.int32), torch.zeros(2, 3, 1)),
        ("o", torch.zeros(2, 3, 2, 9)[..., :8], torch.zeros(2, 3, 2)),
        ("lse", torch.zeros(2, 3, 1, 8), torch.zeros(2, 3)),
        ("lse", torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, dtype=torch.float64)),
        ("lse", torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8)[..., ::2]),
    ],
)
def test_wrong_arguments_are_named(argument, o, lse):
    with pytest.raises(ArgumentError) as caught:
        fi.merge_states(o, lse)
    assert caught.value.argument == argument


def test_cost_and_cases():
    assert merge_states_cost(4, 10, 8, 64, 2).num_bytes == 5 * 80 * (128 + 4)
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
