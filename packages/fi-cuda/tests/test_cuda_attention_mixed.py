"""Plans that serve some steps with the decode kernel and all others with the prefill kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_kernels import emulate
from fi_core.contract import Target
from fi_core.plan import attention_values
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_core.reference.attention import oracle
from fi_core.registry import registry
from fi_core.rope import FusedRope
from fi_cuda.kernels.attention import layout, mixed_state, order, plan, prefill_state, prefill_tuning, state, tuning
from fi_cuda.kernels.attention.mixed_state import (
    MixedState,
    attention_mixed,
    attention_short,
    has_long_path,
    has_short_path,
    short_capacity,
)
from fi_cuda.kernels.attention.prefill_state import PrefillState
from fi_cuda.kernels.attention.state import DecodeState
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
    batch = batch_of([1, 1, 1], [30, 40, 50])
    made.update(batch)
    q = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
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


# Plans of short queries with many rows


VERIFY = AttentionSpec(64, 8, 64)  # 8 rows a token
VERIFY_CAPACITY = Capacity(max_batch=40, max_q_tokens=640, max_q_len=16, max_kv_len=500)


@pytest.fixture
def on_hopper(monkeypatch):
    """Requests of the CPU are answered as a Hopper GPU's."""

    def request(spec, max_q_len, device):
        return registry().operations["attention"].request(Target("cuda", (9, 0)), **attention_values(spec, max_q_len))

    monkeypatch.setattr(mixed_state, "attention_request", request)


@pytest.mark.parametrize(
    ("heads", "q_len", "changes", "expected"),
    [
        ((64, 8), 16, {}, True),
        ((64, 8), 4, {}, False),  # 32 rows
        ((64, 8), 5, {}, True),
        ((64, 2), 1, {}, False),
        ((64, 1), 1, {}, True),  # 64 rows
        ((64, 8), 8, {"kv_format": "fp8_e4m3"}, False),
        ((64, 8), 9, {"kv_format": "fp8_e4m3"}, True),
        ((128, 1), 16, {}, False),  # too many heads for a warpgroup
        ((64, 8), 16, {"batch_invariant": True}, False),
        ((64, 8), 16, {"rope": FusedRope(64)}, True),
        ((64, 8), 16, {"rope": FusedRope(64, keys=True)}, False),
        ((64, 8), 16, {"kv_format": "fp8_e5m2"}, True),
        ((64, 8), 16, {"kv_format": "fp8_e5m2", "q_format": "fp8_e5m2"}, False),
    ],
)
def test_which_plans_of_short_queries_have_a_prefill_kernel(heads, q_len, changes, expected, on_hopper):
    spec = replace(AttentionSpec(*heads, 64), **changes)
    assert has_long_path(spec, replace(VERIFY_CAPACITY, max_q_len=q_len), torch.device("cpu")) == expected


@pytest.mark.parametrize(("heads", "max_q_len", "most"), [((8, 2), 200, 2), ((8, 1), 200, 1), ((64, 8), 16, 4)])
def test_rows_too_few_for_the_prefill_kernel_start_the_decode_kernel_alone(heads, max_q_len, most, launches, on_hopper):
    spec = AttentionSpec(*heads, 64)
    kernels = attention_mixed if max_q_len > 16 else attention_short
    made = kernels.plan(spec, Capacity(40, 40 * max_q_len, max_q_len, 500), "cpu")
    kv = KVCache(*torch.zeros(2, 9, 16, heads[1], 64, dtype=torch.bfloat16))
    for tokens in (1, most, most + 1):
        launches.last.clear()
        made.update(batch_of([tokens, 0], [tokens + 30, 40]))
        q = torch.zeros(tokens, heads[0], 64, dtype=torch.bfloat16)
        made.run(q, kv, LayerArgs().resolve(spec), torch.empty_like(q), None)
        started = {stem for stem in launches.last if stem in ("attention_decode", "attention_prefill")}
        assert started == ({"attention_decode"} if tokens <= most else {"attention_decode", "attention_prefill"})


def test_other_gpus_have_the_decode_kernel_alone(launches):
    assert type(attention_short.plan(VERIFY, VERIFY_CAPACITY, "cpu")) is DecodeState
    num_bytes = attention_short.workspace_bytes(VERIFY, VERIFY_CAPACITY, "cpu")
    assert num_bytes == state.attention_decode.workspace_bytes(VERIFY, VERIFY_CAPACITY, "cpu")


STEPS = {  # 8 tiles a request of all heads
    "one tall request": ([16], True),
    "two": ([16] * 2, False),
    "two of just more rows than are tall": ([9] * 2, False),
    "two of as many rows as are not": ([8] * 2, True),
    "three with many rows": ([5] * 3, True),
    "four with many rows": ([5] * 4, False),
    "a tall request and one with many rows": ([16, 5], True),
    "a tall request and two with many rows": ([16, 5, 5], False),
    "four with many rows, and many with few": ([4] * 20 + [8] * 4 + [1] * 5, False),
    "many with few rows": ([4] * 38, True),
    "nothing": ([], True),
}


@pytest.mark.parametrize(
    ("heads", "sizes", "expected"),
    [
        ((64, 8), (3, 8), False),
        ((64, 8), (4, 8), True),
        ((64, 8), (1, 16), True),  # two tiles a head, were they small
        ((64, 1), (5, 2), False),
        ((64, 1), (6, 2), True),
    ],
)
def test_plans_of_too_few_tiles_have_no_prefill_kernel(heads, sizes, expected, on_hopper):
    max_batch, q_len = sizes
    capacity = replace(VERIFY_CAPACITY, max_batch=max_batch, max_q_len=q_len)
    assert has_long_path(AttentionSpec(*heads, 64), capacity, torch.device("cpu")) == expected


@pytest.mark.parametrize("name", STEPS)
def test_the_number_of_tall_tiles_decides_on_the_host(name, launches, on_hopper):
    q_lens, is_short = STEPS[name]
    made = attention_short.plan(VERIFY, VERIFY_CAPACITY, "cpu")
    assert made.workspace[0].numel() + made.workspace[1].numel() == attention_short.workspace_bytes(
        VERIFY, VERIFY_CAPACITY, "cpu"
    )
    assert "at most 31 tiles in requests of more than 4 new tokens (11 of more than 8): the decode" in "\n".join(
        made.describe()
    )
    made.update(batch_of(q_lens, [200] * len(q_lens)))
    assert made._short._lists[None].worker_indptr.any() == (is_short and len(q_lens) > 0)
    assert (made._long._orders[None].header.tolist() == EMPTY_AND_USED) == is_short


def test_fp8_has_one_limit_and_says_so(launches, on_hopper):
    spec = replace(VERIFY, kv_format="fp8_e4m3")
    text = "\n".join(attention_short.plan(spec, VERIFY_CAPACITY, "cpu").describe())
    assert "steps of at most 11 tiles in requests of more than 8 new tokens: the decode kernel" in text


def check_planners(device):
    """Both kernels' planners on a device decide as the host does, whatever they had planned before."""
    made = attention_short.plan(VERIFY, VERIFY_CAPACITY, device)
    for name in STEPS:
        q_lens, is_short = STEPS[name]
        batch = batch_of(q_lens, [200] * len(q_lens))
        for planner in made._short._planners + made._long._planners:
            planner(batch.q_indptr.to(device), batch.kv_lens.to(device))
        ends, header = made._short._lists[None].worker_indptr, made._long._orders[None].header
        found = ends.cpu(), header.tolist()
        made.update(batch)
        assert torch.equal(found[0], ends.cpu()) and found[1] == header.tolist()
        assert (found[1] == EMPTY_AND_USED) == is_short
        assert bool(found[0].any()) == (is_short and len(q_lens) > 0)


def test_the_number_of_tall_tiles_decides_in_emulated_planners(monkeypatch, on_hopper):
    emulate(monkeypatch, [order, layout, plan, prefill_state, prefill_tuning, state, tuning])
    check_planners("cpu")


@pytest.mark.gpu
def test_the_number_of_tall_tiles_decides_on_the_device():
    check_planners("cuda")


def test_an_emulated_step_of_either_kind_is_right(monkeypatch, on_hopper):
    emulate(monkeypatch, [order, layout, plan, prefill_state, prefill_tuning, state, tuning])
    monkeypatch.setattr(mixed_state, "_FEW", 11)
    spec = AttentionSpec(16, 1, 64, features=frozenset({"lse"}))
    made = attention_short.plan(spec, Capacity(3, 48, 16, 200), "cpu")
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(40, 16, 1, 64, generator=generator).bfloat16() for _ in range(2))
    table = torch.randperm(40, generator=generator).int()[:36].view(3, 12)
    kv, layer = KVCache(k, v), LayerArgs().resolve(spec)
    for q_lens in ([5, 1, 4], [5, 16, 1]):  # one request of more than 64 rows, and two
        q = torch.randn(sum(q_lens), 16, 64, generator=generator).bfloat16()
        batch = Batch(torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor([180, 77, 20]).int(), table)
        made.update(batch)
        out, lse = torch.full_like(q, torch.nan), torch.full((sum(q_lens), 16), torch.nan)
        made.run(q, kv, layer, out, lse)
        wanted, wanted_lse = oracle(spec, batch, q, kv, layer)
        torch.testing.assert_close(out.double(), wanted.double(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=1e-3, atol=1e-3)
