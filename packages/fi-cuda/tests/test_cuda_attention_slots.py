"""Pages of one token: which kernel a cache has, and which caches none, without a GPU."""

from __future__ import annotations

import pytest
import torch
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_cuda.kernels.attention import prefill_state, state
from fi_cuda.kernels.attention.call import CallForm
from fi_cuda.kernels.attention.prefill import BoxPrefillSpec, PrefillSpec, prefill_spec
from fi_cuda.kernels.attention.prefill_state import attention_prefill
from fi_cuda.kernels.attention.prefill_tuning import COPY_ORDERS, built_in_prefill_tuning

SLOTS = AttentionSpec(8, 2, 128, page_size=1)
CAPACITY = Capacity(max_batch=5, max_q_tokens=300, max_q_len=200, max_kv_len=500)


@pytest.fixture
def made(prefill_launches):
    """A plan of one request."""
    state_of_plan = attention_prefill.plan(SLOTS, CAPACITY, "cpu")
    q_indptr, kv_lens = torch.tensor([0, 100], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    state_of_plan.update(Batch(q_indptr, kv_lens, torch.zeros(1, 40, dtype=torch.int32)))
    return state_of_plan


def run(made, num_pages):
    q = torch.zeros(100, 8, 128, dtype=torch.bfloat16)
    kv = KVCache(*torch.zeros(2, num_pages, 1, 2, 128, dtype=torch.bfloat16))
    made.run(q, kv, LayerArgs().resolve(SLOTS), torch.empty_like(q), None)


@pytest.mark.parametrize("boxes", [False, True])
def test_the_kernel_agrees_on_fields_and_shared_memory(boxes, compile_with_offsets):
    kernel = prefill_spec(SLOTS, built_in_prefill_tuning(SLOTS), CallForm(boxes=boxes))
    fits = f"static_assert((sizeof(fi::PrefillShared<Config>) + 2047) / 1024 >= {kernel.shared_bytes // 1024});"
    resources = compile_with_offsets(kernel, fits).resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == 0


def test_pages_of_one_token_have_maps_for_runs(prefill_launches, made, monkeypatch):
    assert "rows by a warpgroup; 32 that follow each other in memory as a box" in "\n".join(made.describe())
    run(made, 9)
    _, values, kernel = prefill_launches.last["attention_prefill"]
    assert type(kernel) is BoxPrefillSpec and kernel.box_tokens == 32 and not kernel.has_boxes
    assert kernel.copy_order == COPY_ORDERS.index("in order") and values["keys"] == ("keys", 32, 128)
    monkeypatch.setattr(prefill_state, "column_maps_of", lambda kv, *box: None)
    run(made, 9)
    kernel = prefill_launches.last["attention_prefill"][2]
    assert type(kernel) is PrefillSpec and kernel.box_tokens == 0


def test_rows_too_far_apart_for_the_gather_are_named(made, monkeypatch):
    monkeypatch.setattr(state, "_MAX_ROW_STRIDE_BYTES", 512)
    with pytest.raises(ArgumentError, match=r"kv.*less than 4 GiB apart.*512"):
        run(made, 9)
    run(made, 1)  # of one page the stride means nothing
