"""append_kv against a definition in Python ints and floats, and its argument errors."""

from __future__ import annotations

import math

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, Batch, IndexCheckError, KVCache, RopeConfig, RopeTable
from fi_core.ops.append_kv import append_kv_cost
from fi_core.ops.cases.append_kv import cases
from fi_core.reference.append_kv import quantise


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


Q_INDPTR, KV_LENS = ints(0, 1, 4, 4, 9), ints(6, 3, 5, 2)
TABLE = ints(5, 1, 0, 7, 2, 3, 4, 6).view(4, 2)


def batch_of(**changes) -> Batch:
    return Batch(**{"q_indptr": Q_INDPTR, "kv_lens": KV_LENS, "table": TABLE, **changes})


def expected_slots(page_size: int = 4) -> dict[int, tuple[int, int]]:
    """Row of k -> (page, offset), worked out by hand from the table; tokens before position 0 have none."""
    found = {}
    for request in range(4):
        start, stop = int(Q_INDPTR[request]), int(Q_INDPTR[request + 1])
        for row in range(start, stop):
            position = int(KV_LENS[request]) - (stop - row)
            if position >= 0:
                found[row] = (int(TABLE[request, position // page_size]), position % page_size)
    return found


def rotated(vector: torch.Tensor, position: int, config: RopeConfig) -> torch.Tensor:
    result = vector.double().clone()
    half = config.rotary_dim // 2
    for pair in range(half):
        i, j = (pair, pair + half) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
        angle = position * config.base ** (-2 * pair / config.rotary_dim)
        a, b = float(vector[i]), float(vector[j])
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[j] = b * math.cos(angle) + a * math.sin(angle)
    return result


def test_tokens_reach_their_pages_and_nothing_else_changes():
    kv = KVCache(torch.full((8, 4, 2, 8), 9.0), torch.full((8, 4, 2, 4), 8.0))
    k, v = torch.randn(11, 2, 8), torch.randn(11, 2, 4)
    fi.append_kv(k, v, kv, batch_of())
    wanted_k, wanted_v = torch.full_like(kv.k, 9.0), torch.full_like(kv.v, 8.0)
    for row, where in expected_slots().items():
        wanted_k[where], wanted_v[where] = k[row], v[row]
    assert len(expected_slots()) == 6
    assert torch.equal(kv.k, wanted_k) and torch.equal(kv.v, wanted_v)


def test_every_form_of_address_reaches_the_same_tokens():
    k, v = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    dense = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    fi.append_kv(k, v, dense, batch_of())
    hnd = KVCache(torch.zeros(8, 2, 4, 8), torch.zeros(8, 2, 4, 8), layout="HND")
    fi.append_kv(k, v, hnd, batch_of(table=TABLE.flatten(), table_indptr=ints(0, 2, 4, 6, 8)))
    slots = torch.full((9,), -1)
    for row, (page, offset) in expected_slots().items():
        slots[row] = page * 4 + offset
    mapped = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    fi.append_kv(k, v, mapped, batch_of(slot_mapping=slots))
    reordered = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    fi.append_kv(k, v, reordered, batch_of(table=TABLE.flip(0).contiguous(), table_row=ints(3, 2, 1, 0)))
    for other in (KVCache(*hnd.as_nhd()), mapped, reordered):
        assert torch.equal(dense.k, other.k) and torch.equal(dense.v, other.v)
    ragged = KVCache(torch.zeros(20, 2, 8), torch.zeros(20, 2, 8))
    fi.append_kv(k, v, ragged, batch_of(table=None, kv_indptr=ints(1, 8, 11, 16, 20)))
    assert torch.equal(ragged.k[1 + 5], k[0]) and torch.equal(ragged.v[16:18], v[7:9])
    assert ragged.k[:6].eq(0).all() and ragged.k[18:].eq(0).all()


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_rope_rotates_keys_and_queries_at_their_positions(pairs, tabulated, mapped):
    config = RopeConfig(6, base=50.0, pairs=pairs)
    table = RopeTable.make(config, "cpu", 8 if tabulated else None)
    kv = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    k, v, q = torch.randn(11, 2, 8), torch.randn(11, 2, 8), torch.randn(11, 3, 8)
    before = q.clone()
    slots = torch.arange(11) + 3
    slots[0] = -1
    fi.append_kv(k, v, kv, batch_of(slot_mapping=slots if mapped else None), rope=table, q=q)
    positions = {
        row: int(KV_LENS[r]) - (int(Q_INDPTR[r + 1]) - row)
        for r in range(4)
        for row in range(int(Q_INDPTR[r]), int(Q_INDPTR[r + 1]))
    }
    for row in range(11):
        position = positions.get(row, -1)
        for head in range(3):
            wanted = rotated(before[row, head], position, config) if position >= 0 else before[row, head].double()
            torch.testing.assert_close(q[row, head].double(), wanted, rtol=1e-5, atol=1e-5)
        where = (int(slots[row]) // 4, int(slots[row]) % 4) if mapped else expected_slots().get(row)
        if position < 0 or where is None or (mapped and row == 0):
            continue
        for head in range(2):
            wanted = rotated(k[row, head], position, config)
            torch.testing.assert_close(kv.k[where][head].double(), wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(kv.v[where][head], v[row, head])


@pytest.mark.parametrize(
    ("kv_format", "mantissa", "low", "top"), [("fp8_e4m3", 3, -6, 448.0), ("fp8_e5m2", 2, -14, 57344.0)]
)
def test_quantisation_divides_rounds_to_even_and_saturates(kv_format, mantissa, low, top):
    values = torch.cat(
        [torch.randn(400) * 10.0 ** torch.randint(-5, 6, (400,)), torch.tensor([0.0, top * 3, -top * 3])]
    )
    values = torch.cat([values, torch.tensor([math.inf, -math.inf, 1.0625 * 0.1, 1.1875 * 0.1])])
    scale = 0.1
    stored = quantise(values.view(1, 1, -1), kv_format, scale, torch.float32).flatten().double().tolist()
    for value, found in zip(values.tolist(), stored, strict=True):
        x = float(torch.tensor(value) / torch.tensor(scale))
        if math.isinf(x) or abs(x) >= top:
            wanted = math.copysign(top, x)
        else:
            exponent = max(math.frexp(x)[1] - 1, low)
            step = 2.0 ** (exponent - mantissa)
            wanted = max(-top, min(top, round(x / step) * step))
        assert found == wanted, (value, x)


def test_quantisation_keeps_nan_and_takes_scales_by_head():
    x = torch.tensor([[[1.0, math.nan], [1.0, 8.0]]])
    stored = quantise(x, "fp8_e4m3", torch.tensor([0.5, 4.0]), torch.float32).float()
    assert stored[0, 0, 0] == 2.0 and stored[0, 0, 1].isnan() and stored[0, 1].tolist() == [0.25, 2.0]


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("k", {"k": torch.zeros(9, 3, 8)}),
        ("k", {"k": torch.zeros(9, 16)}),
        ("k", {"k": torch.zeros(8, 2, 8), "v": torch.zeros(8, 2, 8)}),
        ("kv.k", {"k": torch.zeros(9, 2, 4)}),
        ("kv.v", {"v": torch.zeros(9, 2, 4)}),
        ("v", {"v": torch.zeros(8, 2, 8)}),
        ("v", {"v": torch.zeros(9, 2, 8).half()}),
        ("k", {"k": torch.zeros(9, 2, 9)[..., :8]}),
        ("q", {"q": torch.zeros(9, 4, 8)}),
        ("q", {"q": torch.zeros(8, 4, 8), "rope": RopeTable.make(RopeConfig(8), "cpu")}),
        ("q.dtype", {"q": torch.zeros(9, 4, 8).half(), "rope": RopeTable.make(RopeConfig(8), "cpu")}),
        ("rope.config.rotary_dim", {"rope": RopeTable.make(RopeConfig(10), "cpu")}),
        ("rope.inv_freq", {"rope": RopeTable(RopeConfig(8), torch.zeros(4, device="meta"))}),
        ("rope.cos_sin", {"rope": RopeTable(RopeConfig(8), torch.zeros(4), torch.zeros(40, 4))}),
        ("kv.v", {"kv": KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(1, 4, 2, 8).expand(8, -1, -1, -1))}),
        ("q", {"q": torch.zeros(1, 4, 8).expand(9, -1, -1), "rope": RopeTable.make(RopeConfig(8), "cpu")}),
        ("batch.slot_mapping", {"batch": batch_of(slot_mapping=torch.zeros(8, dtype=torch.int64))}),
        ("batch", {"batch": batch_of(table=None, kv_indptr=ints(0, 6, 9, 14, 16))}),
        ("batch.q_indptr", {"batch": batch_of(q_indptr=ints(0, 4, 1, 4, 9))}),
        ("batch.kv_lens", {"batch": batch_of(kv_lens=ints(6, 3, 5, 9))}),
    ],
)
def test_wrong_arguments_are_named(argument, changes):
    kv = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    call = {"k": torch.zeros(9, 2, 8), "v": torch.zeros(9, 2, 8), "kv": kv, "batch": batch_of(), **changes}
    with pytest.raises(ArgumentError) as caught:
        fi.append_kv(**call)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (
            r"slot_mapping\[4\]: 99 is outside its limit 31",
            {"slot_mapping": torch.tensor([0, 1, 2, 3, 99, 5, 6, 7, 8])},
        ),
        (r"table\[0, 1\]: 8 is outside its limit 7", {"table": torch.full_like(TABLE, 8)}),
        (r"table_row\[3\]: -1 is outside its limit 3", {"table_row": ints(0, 1, 2, -1)}),
        (r"table\[0, 1\]: -1 is outside its limit 7", {"table": torch.full_like(TABLE, -1)}),
    ],
)
def test_indices_out_of_range_are_named_on_a_cpu(text, changes):
    kv = KVCache(torch.zeros(8, 4, 2, 8), torch.zeros(8, 4, 2, 8))
    with pytest.raises(IndexCheckError, match=text):
        fi.append_kv(torch.ones(9, 2, 8), torch.ones(9, 2, 8), kv, batch_of(**changes))


def test_cost_and_cases():
    kv = KVCache(torch.zeros(8, 4, 2, 8).to(torch.float8_e4m3fn), torch.zeros(8, 4, 2, 8).to(torch.float8_e4m3fn))
    k, q = torch.zeros(4, 2, 8, dtype=torch.bfloat16), torch.zeros(4, 4, 8, dtype=torch.bfloat16)
    # Positions 2 to 3 and 3 to 4: two of k's four tokens share one.
    batch = Batch(ints(0, 2, 4), ints(4, 5), TABLE[:2])
    assert append_kv_cost(k, k, kv, batch).num_bytes == 2 * 64 * 3
    assert append_kv_cost(k, k, kv, batch, rope=RopeTable.make(RopeConfig(4), "cpu", None)).num_bytes == 2 * 64 * 3
    table = RopeTable.make(RopeConfig(4), "cpu", 16)
    assert append_kv_cost(k, k, kv, batch, rope=table, q=q).num_bytes == 2 * 64 * 3 + 2 * 128 * 2 + 3 * 16
    # Of two tokens that end at position 0 one has none.
    assert append_kv_cost(k, k, kv, Batch(ints(0, 2), ints(1), TABLE[:1]), rope=table).num_bytes == 2 * 64 * 3 + 16
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
