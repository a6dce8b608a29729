"""Plans that serve steps of short queries with the decode kernel and all others with the prefill kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_core.rope import FusedRope
from fi_cuda.kernels.attention import layout, order, plan, prefill_state, prefill_tuning, state, tuning
from fi_cuda.kernels.attention.mixed_state import MixedState, attention_mixed, has_short_path, short_capacity
from fi_cuda.kernels.attention.prefill_state import PrefillState
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES

pytestmark = pytest.mark.timeout(120)

SPEC = AttentionSpec(8, 2, 64)
CAPACITY = Capacity(max_batch=5, max_q_tokens=300, max_q_len=200, max_kv_len=500)
EMPTY_AND_USED = [0, 1, 0, 0]  # the head of a list of tiles


@pytest.fixture
def launches(monkeypatch, recorder):
    """A machine of 7 processors whose kernels are recorded instead of launched."""
    for module in (order, plan, prefill_state, state):
        monkeypatch.setattr(module, "kernel_for", recorder.kernel_for)
    monkeypatch.setattr(layout, "num_processors", lambda device: 7)
    for module in (tuning, prefill_tuning):
        monkeypatch.setattr(module, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    monkeypatch.setattr(state, "maps_of", lambda kv, num_tokens: None)
    monkeypatch.setattr(prefill_state, "column_maps_of", lambda kv, *box: None)
    monkeypatch.setattr(prefill_state, "tensor_map_of", lambda tensor, box: None)
    return recorder


def batch_of(q_lens, kv_lens):
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    return Batch(q_indptr, torch.tensor(kv_lens).int(), torch.zeros(len(q_lens), 40, dtype=torch.int32))


@pytest.mark.parametrize(
    ("heads", "most", "q_len", "q_tokens"),
    [((8, 8), 200, 8, 40), ((8, 2), 200, 2, 10), ((8, 1), 200, 1, 5), ((64, 1), 200, 1, 5), ((4, 4), 3, 3, 9)],
)
def test_short_queries_fill_the_tile_of_one_token(heads, most, q_len, q_tokens):
    capacity = Capacity(5, max(most, 9), most, 500)
    found = short_capacity(AttentionSpec(*heads, 64), capacity)
    assert found == Capacity(5, min(q_tokens, capacity.max_q_tokens), q_len, 500)


BATCHES = {
    "one token each": ([1, 1, 1], [400, 20, 1], True),
    "as many as are short": ([2, 0, 1], [400, 20, 0], True),
    "nothing": ([], [], True),
    "padding": ([0, 0], [0, 7], True),
    "one more": ([1, 3, 1], [400, 20, 1], False),
    "a prefill beside decodes": ([1, 1, 200], [400, 20, 200], False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_one_of_the_kernels_gets_all_work_from_the_host(name, launches):
    q_lens, kv_lens, is_short = BATCHES[name]
    spec = replace(SPEC, windows=(None, 64))
    made = attention_mixed.plan(spec, CAPACITY, "cpu")
    made.update(batch_of(q_lens, kv_lens))
    num_queries = sum(length > 0 for length in q_lens)
    for window in spec.windows:
        ends = made._short._lists[window].worker_indptr
        header = made._long._orders[window].header.tolist()
        assert (ends[-1].item() >= 2 * num_queries) if is_short else not ends.any()
        assert (header == EMPTY_AND_USED) == is_short


def test_a_call_starts_both_kernels_on_the_same_tensors(launches):
    made = attention_mixed.plan(SPEC, CAPACITY, "cpu")
    assert isinstance(made, MixedState)
    batch = batch_of([1, 1], [30, 40])
    made.update(batch)
    q = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    kv = KVCache(*torch.zeros(2, 9, 16, 2, 64, dtype=torch.bfloat16))
    out = torch.empty_like(q)
    made.run(q, kv, LayerArgs().resolve(SPEC), out, None)
    for stem in ("attention_decode", "attention_prefill"):
        values = launches.last[stem][1]
        assert values["out"] == out.data_ptr() and values["table"] == batch.table.data_ptr()
        assert (values["k"], values["v"]) == (kv.k.data_ptr(), kv.v.data_ptr())
    text = "\n".join(made.describe())
    assert "at most 2 new tokens" in text and "boxes of 16 tokens" in text
    num_bytes = sum(tensor.numel() for tensor in made.workspace)
    assert num_bytes == attention_mixed.workspace_bytes(SPEC, CAPACITY, "cpu")


@pytest.mark.parametrize("changes", [{"batch_invariant": True}, {"rope": FusedRope(48)}])
def test_where_one_kernel_serves_every_batch(changes, launches):
    spec = replace(SPEC, **changes)
    assert has_short_path(replace(SPEC, rope=FusedRope(64))) and has_short_path(
        replace(SPEC, rope=FusedRope(48, "interleaved"))
    )
    made = attention_mixed.plan(spec, CAPACITY, "cpu")
    assert type(made) is PrefillState
    assert made.workspace[0].numel() == attention_mixed.workspace_bytes(spec, CAPACITY, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCHES)
def test_one_of_the_kernels_gets_all_work_from_the_device(name):
    q_lens, kv_lens, is_short = BATCHES[name]
    made = attention_mixed.plan(SPEC, CAPACITY, "cuda")
    batch = batch_of(q_lens, kv_lens)
    for other, _, _ in BATCHES.values():  # what is left from before must not show
        before = batch_of(other, [300] * len(other))
        for given in (before, batch):
            made.update(Batch(given.q_indptr.cuda(), given.kv_lens.cuda(), given.table.cuda()))
        ends, header = made._short._lists[None].worker_indptr, made._long._orders[None].header
        found = ends.cpu(), header.tolist()
        made.update(batch)
        assert torch.equal(found[0], ends.cpu()) and found[1] == header.tolist()
        assert (found[1] == EMPTY_AND_USED) == is_short
