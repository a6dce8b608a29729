"""Dense copies of gathered keys and values, which one tile of a request leaves to its others."""

from __future__ import annotations

import pytest
import torch
from emulated_kernels import emulate
from fi_core.conformance import compare
from fi_core.ops.cases.attention import case
from fi_cuda.kernels.attention import prefill_state, prefill_tuning
from test_cuda_emulated import kernel_modules

Q_LENS, KV_LENS = (300, 150, 5), (700, 150, 70)
SHAPES = {
    "rows": {"heads": (8, 2), "head_dim": 64, "table_row": True},
    "indptr": {"heads": (7, 1), "head_dim": 128, "table": "indptr", "storage": "interleaved"},
    "not_causal": {"heads": (4, 1), "head_dim": 96, "causal": False, "kv_layout": "HND"},
    "pages_of_3": {"heads": (8, 2), "head_dim": 64, "page_size": 3},
    "in_runs": {"heads": (8, 2), "head_dim": 64, "run": 70},
}


@pytest.fixture
def plans(monkeypatch):
    """The plans made while a test runs, whose requests of one tile and more leave copies."""
    monkeypatch.setattr(prefill_tuning, "_DENSE_TILES", 1)
    made = []
    plan = prefill_state.PrefillAttention.plan
    monkeypatch.setattr(prefill_state.PrefillAttention, "plan", lambda *given: made.append(plan(*given)) or made[-1])
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_read_what_another_left(shape, seed, plans, monkeypatch):
    emulate(monkeypatch, kernel_modules(), seed)
    options = {"page_size": 1, "dtype": torch.bfloat16, "features": {"lse"}, **SHAPES[shape]}
    trial = case(shape, Q_LENS, KV_LENS, **options).build(torch.device("cpu"), seed)
    found = trial.run(prefill_state.attention_prefill)
    for name, wanted in trial.expected().items():
        result = compare(found[name], wanted, trial.tolerance[name])
        assert result.passed, f"{name}: {result.message}"
    (plan,) = plans
    layout = plan._layout
    records, heads = layout.dense_records.of(plan._buffer), plan._spec.num_kv_heads
    launches = 2 if options.get("second_update") else 1
    assert plan._orders[None].header.tolist()[1:] == [1, 0, 0]
    print(records[:2].tolist(), records[2:] >> 24)
    assert records[:2].flatten().tolist() == [launches, 0] * 4
    assert (records[2:] >> 24 == launches).sum() == 4 * 2 * heads
