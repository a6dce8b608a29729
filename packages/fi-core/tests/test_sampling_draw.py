"""``sample`` and ``filter_logits`` against a row-by-row oracle in plain Python integers."""

import math
from dataclasses import dataclass

import fi_core as fi
import numpy as np
import pytest
import torch
from fi_core.random import random_bits

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
DTYPES = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32, "typical_p": torch.float32}


@dataclass
class OracleRow:
    """The definition of a draw, one row at a time, in Python numbers."""

    scaled: list
    shortfall: list
    weight: list
    mass: list

    @classmethod
    def of(cls, logits, temperature):
        scaled = [np.float32(value) / np.float32(temperature) for value in logits]
        if any(math.isnan(value) or value == math.inf for value in scaled) or max(scaled) == -math.inf:
            return None
        shortfall = [max(scaled) - value for value in scaled]
        weight = [np.float32(math.exp(-float(value))) for value in shortfall]
        return cls(scaled, shortfall, weight, [int(float(value) * 2**32) for value in weight])

    def prefix(self, order, tokens, fraction):
        if fraction >= 1:
            return set(tokens)
        fixed = round(float(np.float32(fraction)) * 2**31)
        limit = fixed * sum(self.mass[token] for token in tokens) >> 31
        kept, before = set(), 0
        for token in order:
            if not kept or before < limit:
                kept.add(token)
            before += self.mass[token]
        return kept

    def apply(self, name, value, tokens):
        rank = sorted(tokens, key=lambda token: (-self.scaled[token], token))
        if name == "top_k":
            return set(rank[:value]) if 0 < value < len(self.mass) else set(tokens)
        if name == "top_p":
            return self.prefix(rank, tokens, value)
        if name == "min_p":
            return {token for token in tokens if self.weight[token] >= np.float32(value)}
        total = sum(self.mass[token] for token in tokens)
        moment = sum(int(float(self.weight[t] * self.shortfall[t]) * 2**32) for t in tokens if self.mass[t])
        mean = np.float32(moment / max(total, 1))
        return self.prefix(sorted(tokens, key=lambda t: (abs(self.shortfall[t] - mean), t)), tokens, value)

    def kept(self, values, order):
        everything = tokens = set(range(len(self.mass)))
        for name in OFF:
            if name in values:
                considered = tokens if order == "sequential" else everything
                tokens = tokens & self.apply(name, values[name], considered)
        if values and not any(self.mass[token] for token in tokens):
            return {max(everything, key=lambda token: (self.scaled[token], -token))}
        return tokens

    @staticmethod
    def in_range(values):
        fractions = [values.get(name, 1.0) for name in ("top_p", "typical_p")]
        return (
            values.get("top_k", 0) >= 0
            and all(0 < fraction <= 1 for fraction in fractions)
            and 0 <= values.get("min_p", 0.0) <= 1
            and values.get("temperature", 1.0) >= 0
        )

    def draw(self, tokens, number):
        target = number * sum(self.mass[token] for token in tokens) >> 62
        for token in sorted(tokens):
            target -= self.mass[token]
            if target < 0:
                return token
        return None


def make_keys(num_rows, seed=3):
    return fi.DrawKeys(
        torch.arange(num_rows) * 977 + seed,
        (torch.arange(num_rows) % 3).to(torch.int32),
        torch.arange(num_rows) * 31 + 2,
    )


def columns(values, num_rows):
    """FilterParams columns of a dict of scalars or lists."""
    return {
        name: torch.as_tensor(value, dtype=DTYPES.get(name, torch.float32)).expand(num_rows).contiguous()
        for name, value in values.items()
    }


def hostile_logits(num_rows, vocab_size, seed):
    """Rows with ties, -inf, huge values and plain noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    logits[1::5] = (logits[1::5] * 2).round() / 2
    logits[2::5] = torch.where(torch.rand(logits[2::5].shape, generator=generator) < 0.5, -torch.inf, logits[2::5])
    logits[3::5] *= 1e29
    logits[4::10] = 0.25
    logits[:, 0] = torch.where(logits[:, 0].isinf(), 0.0, logits[:, 0])
    return logits


GRID = [
    {},
    {"top_k": [1, 2, 3, 0, 1000]},
    {"top_p": [0.0, 0.3, 0.9, 0.999, 1.0]},
    {"min_p": [0.0, 0.05, 0.5, 1.0, 1.5]},
    {"typical_p": [0.0, 0.2, 0.7, 0.95, 1.0]},
    {"top_k": [5, 40, 0, 2, 7], "top_p": [0.8, 1.0, 0.5, 0.95, 0.7]},
    {"top_k": [5, 40, 0, 2, 7], "top_p": [0.8, 1.0, 0.5, 0.95, 0.7], "min_p": [0.1, 0.0, 0.2, 0.9, 0.01]},
    {"top_k": [2, 3, 4, 5, 6], "typical_p": [0.05, 0.2, 0.5, 0.05, 0.9]},
    {"top_k": [9, 0, 4, 5, 6], "top_p": 0.9, "min_p": 0.02, "typical_p": [0.3, 0.6, 0.9, 1.0, 0.1]},
]


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("values", GRID, ids=lambda values: "+".join(values) or "plain")
@pytest.mark.parametrize("vocab_size", [1, 2, 13, 150])
def test_agrees_with_the_integer_oracle_bit_for_bit(values, order, vocab_size):
    num_rows = 40
    cycled = {
        name: [np.ravel(value)[row % np.size(value)].item() for row in range(num_rows)]
        for name, value in values.items()
    }
    temperature = [(0.7, 1.0, 1.3, 0.05)[row % 4] for row in range(num_rows)]
    logits = hostile_logits(num_rows, vocab_size, seed=vocab_size)
    keys = make_keys(num_rows)
    filters = fi.FilterParams(**columns({"temperature": temperature, **cycled}, num_rows), order=order)
    tokens = fi.sample(logits, filters, keys, out=torch.full((num_rows,), -77))
    masked = fi.filter_logits(logits, filters, "logits", out=torch.full_like(logits, torch.nan))
    probs = fi.filter_logits(logits, filters, "probs", out=torch.full_like(logits, torch.nan))
    hi, lo = random_bits(keys, 0)
    for row in range(num_rows):
        oracle = OracleRow.of(logits[row].numpy(), temperature[row])
        given = {name: value[row] for name, value in cycled.items()}
        if not oracle.in_range(given):
            assert int(tokens[row]) == -1
            assert masked[row].eq(-torch.inf).all() and probs[row].eq(0).all()
            continue
        kept = oracle.kept(given, order)
        assert int(tokens[row]) == oracle.draw(kept, (int(hi[row]) << 31) + int(lo[row]))
        finite = {token for token in kept if oracle.scaled[token] > -math.inf}
        assert set(masked[row].isfinite().nonzero().ravel().tolist()) == finite
        assert all(masked[row, token].item() == oracle.scaled[token] for token in finite)
        total = sum(oracle.mass[token] for token in kept)
        expected = [np.float32(oracle.mass[token] / total) if token in kept else 0.0 for token in range(vocab_size)]
        assert probs[row].tolist() == [float(value) for value in expected]


def test_unusable_rows_give_no_token():
    logits = torch.zeros(6, 8)
    logits[0, 3], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 0], logits[3, 1] = torch.nan, torch.inf
    logits[4, 5] = 3e38  # overflows to +inf at temperature 0.1
    for values in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5}, {"temperature": 0.1}):
        filters = fi.FilterParams(**columns(values, 6))
        tokens = fi.sample(logits, filters, make_keys(6)).tolist()
        assert tokens[:4] == [-1] * 4 and 0 <= tokens[5] < 8
        assert (tokens[4] == -1) == ("temperature" in values)
        assert fi.filter_logits(logits, filters, "probs")[:4].eq(0).all()
        assert fi.filter_logits(logits, filters, "logits")[:4].eq(-torch.inf).all()
    greedy = fi.FilterParams(temperature=torch.zeros(6))
    assert fi.sample(logits, greedy, make_keys(6)).tolist() == [-1, -1, -1, -1, 5, 0]
    assert fi.filter_logits(logits, greedy, "probs").sum(1).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.5, math.nan)),
        ("top_k", (-1, -(2**31))),
        ("top_p", (0.0, -0.1, 1.5, math.nan, math.inf)),
        ("min_p", (-0.1, 1.5, math.nan)),
        ("typical_p", (0.0, -1.0, 1.01, math.nan)),
    ],
)
def test_a_parameter_out_of_its_range_makes_its_own_row_unusable(name, values):
    num_rows = 2 * len(values) + 1
    good = {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}
    mixed = [values[row // 2] if row % 2 else good[name] for row in range(num_rows)]
    filters = fi.FilterParams(**columns({**good, name: mixed}, num_rows))
    logits = torch.randn(num_rows, 20, generator=torch.Generator().manual_seed(2))
    tokens = fi.sample(logits, filters, make_keys(num_rows)).tolist()
    assert [token == -1 for token in tokens] == [row % 2 == 1 for row in range(num_rows)]
    assert (fi.filter_logits(logits, filters).sum(1) > 0).tolist() == [row % 2 == 0 for row in range(num_rows)]


def test_slots_pick_rows_of_the_parameters():
    num_rows, slots = 6, torch.tensor([7, 2, -1, 0, 2, 5])
    logits = hostile_logits(num_rows, 50, seed=5)
    held = {"temperature": [0.0, 9, 1.3, 9, 9, 0.7, 9, 1.0], "top_k": [0, -9, 9, -9, -9, 5, -9, 2]}
    filters, keys = fi.FilterParams(**columns(held, 8)), make_keys(8)
    position = torch.arange(num_rows) * 5
    places = slots.clamp(min=0)
    gathered = fi.FilterParams(**{name: getattr(filters, name)[places] for name in held})
    own_keys = fi.DrawKeys(keys.seed[places], keys.sample[places], position)
    expected = fi.sample(logits, gathered, own_keys)
    expected[2] = -1
    columns_of_keys = fi.DrawKeys(keys.seed, keys.sample, position)
    assert torch.equal(fi.sample(logits, filters, columns_of_keys, slots=slots), expected)
    for bad in (slots.int(), slots.float()):
        with pytest.raises(fi.ArgumentError, match="^slots"):
            fi.sample(logits, filters, columns_of_keys, slots=bad)
    with pytest.raises(fi.IndexCheckError, match=r"^slots\[0\]: 8 is outside its limit 7"):
        fi.sample(logits, filters, columns_of_keys, slots=slots + 1)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0, 4.0]] * 50)
    keys = make_keys(50)
    assert fi.sample(logits, fi.FilterParams(temperature=torch.zeros(50)), keys).tolist() == [1] * 50
    assert fi.sample(logits, fi.FilterParams(**columns({"top_k": 1}, 50)), keys).tolist() == [1] * 50
    assert set(fi.sample(logits, fi.FilterParams(**columns({"top_k": 2}, 50)), keys).tolist()) == {1, 2}
    assert set(fi.sample(logits, fi.FilterParams(**columns({"top_k": 3}, 50)), keys).tolist()) == {1, 2, 4}


def mixed_batch(num_rows, vocab_size):
    values = {
        "temperature": [(0.0, 0.8, 1.0, 1.5, 0.0, 0.3)[row % 6] for row in range(num_rows)],
        "top_k": [(0, 5, 50, 1)[row % 4] for row in range(num_rows)],
        "top_p": [(1.0, 0.9, 0.5)[row % 3] for row in range(num_rows)],
        "min_p": [(0.0, 0.05)[row % 2] for row in range(num_rows)],
        "typical_p": [(1.0, 1.0, 0.8, 1.0, 0.5)[row % 5] for row in range(num_rows)],
    }
    return hostile_logits(num_rows, vocab_size, seed=9), columns(values, num_rows), make_keys(num_rows)


def take(logits, filters, keys, rows):
    picked = fi.FilterParams(**{name: value[rows] for name, value in filters.items()})
    return logits[rows], picked, fi.DrawKeys(keys.seed[rows], keys.sample[rows], keys.position[rows])


def test_token_does_not_depend_on_the_batch_around_it():
    num_rows = 23
    logits, filters, keys = mixed_batch(num_rows, 301)
    tokens = fi.sample(logits, fi.FilterParams(**filters), keys)
    shuffled = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fi.sample(*take(logits, filters, keys, shuffled)), tokens[shuffled])
    for row in range(num_rows):
        assert torch.equal(fi.sample(*take(logits, filters, keys, torch.tensor([row]))), tokens[row : row + 1])


def test_filters_that_are_off_change_nothing():
    logits, _, keys = mixed_batch(20, 120)
    plain = fi.sample(logits, fi.FilterParams(), keys)
    off = columns({**OFF, "temperature": 1.0}, 20)
    assert torch.equal(fi.sample(logits, fi.FilterParams(**off), keys), plain)
    assert torch.equal(fi.sample(logits, fi.FilterParams(**off, order="joint"), keys), plain)


@pytest.mark.parametrize("rows_dtype", [torch.int32, torch.int64])
def test_rows_map_outputs_to_logits(rows_dtype):
    logits = hostile_logits(4, 50, seed=2)
    rows = torch.tensor([3, 0, 0, 2, 3, 3, 1], dtype=rows_dtype)
    keys = make_keys(7)
    filters = fi.FilterParams(**columns({"top_p": 0.9, "temperature": [0.0, 1, 1, 1, 1, 2, 1]}, 7))
    expected = fi.sample(logits[rows.long()], filters, keys)
    assert torch.equal(fi.sample(logits, filters, keys, rows=rows), expected)
    assert len(set(fi.sample(logits, fi.FilterParams(), make_keys(200), rows=rows[1:2].repeat(200)).tolist())) > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32_and_rows_may_be_strided(dtype):
    logits = (hostile_logits(10, 64, seed=4).clamp(-6e4, 6e4)).to(dtype)
    padded = torch.full((20, 100), torch.nan, dtype=dtype)
    padded[::2, 10:74] = logits
    keys = make_keys(10)
    filters = fi.FilterParams(**columns({"top_p": 0.8, "top_k": 20}, 10))
    expected = fi.sample(logits.to(torch.float32), filters, keys)
    assert torch.equal(fi.sample(padded[::2, 10:74], filters, keys), expected)


@pytest.mark.parametrize("row", [4, -1])
def test_rows_out_of_range_are_named_on_a_cpu(row):
    rows = torch.tensor([0, 1, row, 2])
    with pytest.raises(fi.IndexCheckError, match=rf"^rows\[2\]: {row} is outside its limit 3"):
        fi.sample(torch.zeros(4, 6), fi.FilterParams(), make_keys(4), rows=rows)


def test_empty_batch():
    assert fi.sample(torch.zeros(0, 5), fi.FilterParams(), make_keys(0)).shape == (0,)
    assert fi.sample(
        torch.zeros(3, 5), fi.FilterParams(), make_keys(0), rows=torch.zeros(0, dtype=torch.int32)
    ).shape == (0,)
    assert fi.filter_logits(torch.zeros(0, 5), fi.FilterParams()).shape == (0, 5)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("logits", lambda logits, keys: fi.sample(logits[0], fi.FilterParams(), keys)),
        ("logits.dtype", lambda logits, keys: fi.sample(logits.to(torch.int32), fi.FilterParams(), keys)),
        ("logits", lambda logits, keys: fi.sample(logits.t(), fi.FilterParams(), keys)),
        ("logits", lambda logits, keys: fi.sample(torch.zeros(4, 2**19 + 1), fi.FilterParams(), keys)),
        ("filters.top_k.dtype", lambda logits, keys: fi.sample(logits, fi.FilterParams(top_k=torch.zeros(4)), keys)),
        ("filters.top_p", lambda logits, keys: fi.sample(logits, fi.FilterParams(top_p=torch.zeros(3)), keys)),
        ("filters.order", lambda logits, keys: fi.sample(logits, fi.FilterParams(order="both"), keys)),
        ("keys.seed", lambda logits, keys: fi.sample(logits, fi.FilterParams(), make_keys(5))),
        ("rows.dtype", lambda logits, keys: fi.sample(logits, fi.FilterParams(), keys, rows=torch.zeros(4))),
        (
            "rows",
            lambda logits, keys: fi.sample(logits[:0], fi.FilterParams(), keys, rows=torch.zeros(4, dtype=torch.int64)),
        ),
        ("filters.top_p", lambda logits, keys: fi.sample(logits, fi.FilterParams(top_p=0.5), keys)),
        (
            "out",
            lambda logits, keys: fi.filter_logits(logits, fi.FilterParams(), out=torch.zeros(1, 6).expand(4, 6)),
        ),
        ("out.dtype", lambda logits, keys: fi.sample(logits, fi.FilterParams(), keys, out=torch.zeros(4))),
        ("kind", lambda logits, keys: fi.filter_logits(logits, fi.FilterParams(), "mass")),
    ],
)
def test_bad_arguments_are_named(argument, call):
    with pytest.raises(fi.ArgumentError) as caught:
        call(torch.zeros(4, 6), make_keys(4))
    assert caught.value.argument == argument
