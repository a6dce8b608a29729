"""Dense copies of gathered keys and values, which one tile of a request leaves to its others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_kernels import emulate
from fi_core.conformance import compare
from fi_core.errors import ArgumentError
from fi_core.ops.cases.attention import case
from fi_core.records import AttentionSpec, Capacity
from fi_cuda.kernels.attention import prefill_state, prefill_tuning
from fi_cuda.kernels.attention.prefill_tuning import (
    DENSE_BYTES,
    HeadBytes,
    built_in_prefill_tuning,
    dense_step_bytes,
    dense_steps,
    prefill_tuning_for,
)
from test_cuda_attention_repeats import prefill_tuned
from test_cuda_emulated import kernel_modules

Q_LENS, KV_LENS = (300, 150, 5), (700, 150, 70)
SHAPES = {
    "rows": {"heads": (8, 2), "head_dim": 64, "table_row": True, "before": True},
    "indptr": {"heads": (7, 1), "head_dim": 128, "table": "indptr", "storage": "interleaved"},
    "not_causal": {"heads": (4, 1), "head_dim": 96, "causal": False, "kv_layout": "HND"},
    "in_runs": {"heads": (8, 2), "head_dim": 64, "run": 70},
    "pages_of_3": {"heads": (8, 2), "head_dim": 64, "page_size": 3},
}
SLOTS = AttentionSpec(32, 8, 128, page_size=1)
CAPACITY = Capacity(max_batch=4, max_q_tokens=8192, max_q_len=4096, max_kv_len=3000)


@pytest.fixture
def plans(monkeypatch):
    """The plans made while a test runs, whose requests of one tile and more leave copies."""
    monkeypatch.setattr(prefill_tuning, "_DENSE_TILES", 1)
    made = []
    plan = prefill_state.PrefillAttention.plan
    monkeypatch.setattr(prefill_state.PrefillAttention, "plan", lambda *given: made.append(plan(*given)) or made[-1])
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("shape", "seed"), [("rows", 0), ("rows", 1), ("indptr", 0), ("not_causal", 1), ("in_runs", 0), ("pages_of_3", 0)]
)
def test_tiles_read_what_another_left(shape, seed, plans, monkeypatch):
    emulate(monkeypatch, kernel_modules(), seed)
    options = {"page_size": 1, "dtype": torch.bfloat16, "features": {"lse"}, **SHAPES[shape]}
    trial = case(shape, Q_LENS, KV_LENS, **options).build(torch.device("cpu"), seed)
    found = trial.run(prefill_state.attention_prefill)
    for name, wanted in trial.expected().items():
        result = compare(found[name], wanted, trial.tolerance[name])
        assert result.passed, f"{name}: {result.message}"
    (plan,) = plans
    headers, records = plan._layout.dense_records.of(plan._buffer).split([2, len(Q_LENS) * plan._spec.num_kv_heads])
    assert plan._orders[None].header.tolist()[1:] == [1, 0, 0]
    # Of each warp: launches, and nothing used or ended between them. The first two requests left a copy of each head, but for
    # warps whose rows are a run in memory.
    assert headers.flatten().tolist() == [1, 0] * 4
    left, heads = (records >> 24) == 1, plan._spec.num_kv_heads
    assert not left[2 * heads :].any() and left[: 2 * heads].any()
    assert left[: 2 * heads].all() == (shape != "in_runs")


def test_room_for_copies_follows_from_the_capacity():
    tuning = built_in_prefill_tuning(SLOTS)
    assert dense_step_bytes(tuning, HeadBytes.of(SLOTS)) == 128 * 2 * 128 * 2
    # 8192 new tokens are five requests of 32 tiles of 48, of which there are four, of 24 steps and 8 heads.
    assert dense_steps(SLOTS, CAPACITY, tuning) == 4 * 8 * 24
    assert dense_steps(SLOTS, replace(CAPACITY, max_q_len=1535), tuning) == 0
    assert dense_steps(replace(SLOTS, windows=(100,)), CAPACITY, tuning) == 0
    assert dense_steps(SLOTS, replace(CAPACITY, max_kv_len=10**6), tuning) == DENSE_BYTES // 2**16
    for other in (replace(SLOTS, page_size=16), AttentionSpec(32, 8, 256, page_size=1)):
        assert dense_steps(other, CAPACITY, built_in_prefill_tuning(other)) == 0


def test_copies_are_of_what_is_gathered(monkeypatch):
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: 232448)
    device = torch.device("cpu")
    with prefill_tuned(dense_tiles=3):
        assert prefill_tuning_for(SLOTS, device).dense_tiles == 3
        with pytest.raises(ArgumentError, match="dense_tiles"):
            prefill_tuning_for(replace(SLOTS, page_size=16), device)
    with prefill_tuned(dense_tiles=-1), pytest.raises(ArgumentError, match="dense_tiles"):
        prefill_tuning_for(SLOTS, device)
    with prefill_tuned(consumers=2, overlap=True):
        assert prefill_tuning_for(SLOTS, device).dense_tiles == 0
