"""Triton's sampling kernels against the definition written with plain Python integers and sorted lists."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
import triton
import triton.language as tl
from fi_core.sampling import DrawKeys, FilterParams, LogprobsOut, PenaltyParams
from fi_triton.sampling import sample as sample_module
from fi_triton.sampling.filter_logits import filter_logits
from fi_triton.sampling.logprobs import logprobs
from fi_triton.sampling.penalize_logits import penalize_logits
from fi_triton.sampling.philox import random_bits, scale_bits, scale_fraction, to_fraction
from fi_triton.sampling.sample import sample
from fi_triton.sampling.top_k import top_k

VOCAB = 211
NAN, INF = math.nan, math.inf


def single(value: float) -> float:
    """``value`` rounded to float32."""
    return torch.tensor(value, dtype=torch.float64).float().item()


@triton.jit
def _bits_kernel(seed_ptr, position_ptr, sample_ptr, purpose_ptr, out_ptr):
    hi, lo = random_bits(tl.load(seed_ptr), tl.load(position_ptr), tl.load(sample_ptr), tl.load(purpose_ptr))
    tl.store(out_ptr, hi)
    tl.store(out_ptr + 1, lo)


@triton.jit
def _scale_kernel(hi_ptr, lo_ptr, total_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    hi, lo, total = tl.load(hi_ptr + lane), tl.load(lo_ptr + lane), tl.load(total_ptr + lane)
    tl.store(out_ptr + lane, scale_bits(hi, lo, total))
    tl.store(out_ptr + N + lane, scale_fraction(lo, total))


@triton.jit
def _fraction_kernel(value_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, to_fraction(tl.load(value_ptr + lane)))


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_philox_known_answers(counter, key, words, device):
    """The vectors published with Random123 (Salmon et al., 2011)."""

    def number(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    sample_word = counter[2] - 2**32 if counter[2] >= 2**31 else counter[2]
    out = torch.full((2,), -1, device=device)
    seed, position = signed(key[0] | key[1] << 32), signed(counter[0] | counter[1] << 32)
    _bits_kernel[(1,)](number(seed), number(position), number(sample_word, torch.int32), number(counter[3]), out)
    assert out.tolist() == [words[0] >> 1, words[1] >> 1]


def test_scaling_is_exact(device):
    generator = torch.Generator().manual_seed(1)
    hi, lo = torch.randint(0, 2**31, (2, 64), generator=generator)
    total = torch.randint(0, 2**52, (64,), generator=generator)
    hi[:2], lo[:2], total[:3] = 2**31 - 1, 2**31 - 1, torch.tensor([2**52 - 1, 1, 0])
    out = torch.full((128,), -1, device=device)
    _scale_kernel[(1,)](hi.to(device), lo.to(device), total.to(device), out, N=64)
    numbers = list(zip(hi.tolist(), lo.tolist(), total.tolist(), strict=True))
    assert out[:64].tolist() == [(a * 2**31 + b) * m // 2**62 for a, b, m in numbers]
    assert out[64:].tolist() == [b * m // 2**31 for _, b, m in numbers]


def test_fractions_round_to_even(device):
    values = torch.tensor(
        [0.0, 0.9, 0.5, 1.5 * 2.0**-31, 2.5 * 2.0**-31, 0.3 * 2.0**-31, 1 - 2.0**-24, 1e-40], device=device
    )
    out = torch.full((8,), -1, device=device)
    _fraction_kernel[(1,)](values, out, N=8)
    assert out.tolist() == [round(value * 2**31) for value in values.double().tolist()]


class Row:
    """The definition of a draw for one row of float32 logits."""

    def __init__(self, logits: list[float], filters: dict[str, float], order: str) -> None:
        temperature = filters.get("temperature", 1.0)
        self.greedy = temperature <= 0
        scaled = logits if self.greedy else [(torch.tensor(x) / torch.tensor(temperature)).item() for x in logits]
        self.scaled = scaled
        self.usable = in_range(filters) and not any(math.isnan(x) or x == INF for x in scaled) and max(scaled) > -INF
        if not self.usable:
            return
        self.shortfall = [single(max(scaled) - x) for x in scaled]
        self.weight = [single(math.exp(-c)) for c in self.shortfall]
        self.mass = [int(w * 2**32) for w in self.weight]
        if self.greedy:
            self.kept = {logits.index(max(logits))}
        else:
            self.kept = self._filtered(filters, order)

    def _filtered(self, filters: dict[str, float], order: str) -> set[int]:
        everything = set(range(len(self.scaled)))
        kept = set(everything)
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            if name in filters:
                kept &= getattr(self, f"_{name}")(kept if order == "sequential" else everything, filters[name])
        if sum(self.mass[i] for i in kept) == 0:
            return {self._ranked(everything)[0]}
        return kept

    def _ranked(self, considered: set[int]) -> list[int]:
        return sorted(considered, key=lambda i: (-self.scaled[i], i))

    def _prefix(self, ranked: list[int], fraction: float) -> set[int]:
        if fraction >= 1 or not ranked:
            return set(ranked)
        limit = max(0, round(fraction * 2**31)) * sum(self.mass[i] for i in ranked) // 2**31
        kept, before = {ranked[0]}, 0
        for i in ranked:
            if before < limit:
                kept.add(i)
            before += self.mass[i]
        return kept

    def _top_k(self, considered: set[int], k: float) -> set[int]:
        return set(self._ranked(considered)[: int(k)]) if k > 0 else considered

    def _top_p(self, considered: set[int], fraction: float) -> set[int]:
        return self._prefix(self._ranked(considered), fraction)

    def _min_p(self, considered: set[int], limit: float) -> set[int]:
        return {i for i in considered if self.weight[i] >= limit}

    def _typical_p(self, considered: set[int], fraction: float) -> set[int]:
        total = sum(self.mass[i] for i in considered)
        moment = sum(int(single(self.weight[i] * self.shortfall[i]) * 2**32) for i in considered if self.mass[i])
        mean = single(moment / max(total, 1))
        ranked = sorted(considered, key=lambda i: (abs(single(self.shortfall[i] - mean)), i))
        return self._prefix(ranked, fraction)

    def token(self, bits: int) -> int:
        if not self.usable:
            return -1
        if self.greedy:
            return next(iter(self.kept))
        total = sum(self.mass[i] for i in self.kept)
        goal, cumulative = bits * total // 2**62, 0
        for i in sorted(self.kept):
            cumulative += self.mass[i]
            if cumulative > goal:
                return i
        raise AssertionError("the cumulative mass never exceeds a goal below the total")


def in_range(filters: dict[str, float]) -> bool:
    """Whether every parameter of a row is in its range."""
    fractions = (0 < filters.get(name, 1.0) <= 1 for name in ("top_p", "typical_p"))
    return filters.get("top_k", 0) >= 0 and all(fractions) and 0 <= filters.get("min_p", 0.0) <= 1


def philox_bits(seed: int, position: int, sample_idx: int, purpose: int) -> int:
    """The 62-bit random number in plain integers."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    counter = [position & 0xFFFFFFFF, position >> 32 & 0xFFFFFFFF, sample_idx & 0xFFFFFFFF, purpose]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (counter[0] >> 1) * 2**31 + (counter[1] >> 1)


def hostile_logits(seed: int = 0) -> torch.Tensor:
    """Rows [12, VOCAB]: random, flat, tied, nearly one-hot, masked, signed zeros, subnormal gaps, and unusable ones."""
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[1] = 0.25
    logits[2] = logits[2].round()
    logits[3] = logits[3] * 20
    logits[4, ::3] = -INF
    logits[5] = torch.where(logits[5] > 0, 0.0, -0.0)
    logits[6] = 30000.0 + logits[6].round()
    logits[7, 13] = NAN
    logits[8, 200] = INF
    logits[9] = -INF
    logits[10] = -INF
    logits[10, 77] = -5.0
    return logits


def some_keys(count: int, device: str) -> DrawKeys:
    generator = torch.Generator().manual_seed(7)
    seed = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    position = torch.randint(0, 2**40, (count,), generator=generator)
    return DrawKeys(seed.to(device), torch.arange(count, dtype=torch.int32, device=device), position.to(device))


COLUMNS = {
    "temperature": [1.0, 0.7, 0.0, 1.7],
    "top_k": [5, 0, 1, 40, 1000],
    "top_p": [0.9, 0.5, 1.0, 0.0, 0.999],
    "min_p": [0.05, 0.0, 2.0],
    "typical_p": [0.9, 0.2, 1.0, 0.0, 0.6, 0.95, 0.5],
}


def columns(names: tuple[str, ...], count: int) -> dict[str, torch.Tensor]:
    values = {name: (COLUMNS[name] * count)[:count] for name in names}
    return {
        name: torch.tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }


def make_filters(table: dict[str, torch.Tensor], order: str, device: str) -> FilterParams:
    return FilterParams(**{name: value.to(device) for name, value in table.items()}, order=order)


def oracle_rows(logits: torch.Tensor, table: dict[str, torch.Tensor], order: str) -> list[Row]:
    parameters = [{name: value[n].item() for name, value in table.items()} for n in range(logits.shape[0])]
    return [Row(row.tolist(), parameter, order) for row, parameter in zip(logits.float(), parameters, strict=True)]


COMBINATIONS = [
    (),
    ("temperature",),
    ("top_k",),
    ("temperature", "top_p"),
    ("min_p",),
    ("typical_p",),
    ("top_k", "top_p"),
    ("temperature", "top_k", "top_p", "min_p", "typical_p"),
]


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_sample_follows_the_definition(names, order, device):
    logits = hostile_logits()
    keys, table = some_keys(logits.shape[0], device), columns(names, logits.shape[0])
    tokens = torch.full((logits.shape[0],), -99, device=device)
    sample(logits.to(device), make_filters(table, order, device), keys, None, tokens)
    bits = [
        philox_bits(a, c, b, 0) for a, b, c in zip(*(getattr(keys, f.name).tolist() for f in fields(keys)), strict=True)
    ]
    rows = oracle_rows(logits, table, order)
    assert tokens.tolist() == [row.token(number) for row, number in zip(rows, bits, strict=True)]


@pytest.mark.parametrize(
    "names", [("top_k", "top_p"), ("temperature", "top_k", "top_p", "min_p", "typical_p")], ids="+".join
)
def test_rows_that_exceed_the_candidate_list_are_searched_in_place(names, device, monkeypatch):
    logits = hostile_logits(1).to(device)
    filters = make_filters(columns(names, logits.shape[0]), "sequential", device)
    tokens = [torch.full((logits.shape[0],), -99, device=device) for _ in range(2)]
    sample(logits, filters, some_keys(logits.shape[0], device), None, tokens[0])
    monkeypatch.setattr(sample_module, "MAX_CANDIDATES", 3)
    sample(logits, filters, some_keys(logits.shape[0], device), None, tokens[1])
    assert torch.equal(*tokens) and -99 not in tokens[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sample_maps_rows_and_reads_strided_half_precision(dtype, device):
    whole = hostile_logits(2).to(device=device, dtype=dtype)
    strided = torch.full((12, VOCAB + 5), NAN, device=device, dtype=dtype)
    strided[:, :VOCAB] = whole
    rows = torch.tensor([3, 0, 0, 7, 11], device=device)
    table = columns(("temperature", "top_k"), 5)
    tokens = torch.full((5,), -99, device=device)
    keys = some_keys(5, device)
    sample(strided[:, :VOCAB], make_filters(table, "joint", device), keys, rows, tokens)
    bits = [
        philox_bits(a, c, b, 0) for a, b, c in zip(*(getattr(keys, f.name).tolist() for f in fields(keys)), strict=True)
    ]
    expected = oracle_rows(whole[rows].cpu(), table, "joint")
    assert tokens.tolist() == [row.token(number) for row, number in zip(expected, bits, strict=True)]


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("names", [("temperature",), ("top_k", "top_p"), COMBINATIONS[-1]], ids="+".join)
def test_filter_logits_follows_the_definition(names, kind, order, device):
    logits = hostile_logits(3)
    table = columns(names, logits.shape[0])
    out = torch.full(logits.shape, NAN, device=device)
    filter_logits(logits.to(device), make_filters(table, order, device), kind, out)
    for n, row in enumerate(oracle_rows(logits, table, order)):
        kept = row.kept if row.usable else set()
        if kind == "logits":
            expected = [row.scaled[i] if i in kept else -INF for i in range(VOCAB)]
            assert out[n].tolist() == expected
        else:
            total = 1 if row.greedy else max(1, sum(row.mass[i] for i in kept))
            expected = [(1 if row.greedy else row.mass[i]) / total if i in kept else 0.0 for i in range(VOCAB)]
            torch.testing.assert_close(out[n].cpu().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 6, 50])
def test_top_k(dtype, k, device):
    logits = hostile_logits(4).to(dtype)
    values = torch.full((12, k), NAN, device=device)
    indices = torch.full((12, k), -99, device=device)
    top_k(logits.to(device), values, indices)
    for n, row in enumerate(logits.float().tolist()):
        numbers = [-INF if math.isnan(x) else x for x in row]
        expected = sorted(range(VOCAB), key=lambda i: (-numbers[i], i))[:k]
        assert indices[n].tolist() == expected
        assert values[n].tolist() == [numbers[i] for i in expected]


@pytest.mark.parametrize("top_n", [0, 5])
def test_logprobs(top_n, device):
    logits = hostile_logits(5)
    tokens = torch.tensor([0, 210, 7, 9, 0, 1, 2, 3, 4, 5, 77, -1])
    out = LogprobsOut(
        torch.full((12,), -7.0, device=device),
        torch.full((12, top_n), -7.0, device=device),
        torch.full((12, top_n), -7, device=device),
    )
    logprobs(logits.to(device), tokens.to(device), out)
    logs = logits.double().log_softmax(1)
    expected = logs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
    expected[11] = -INF
    torch.testing.assert_close(out.chosen.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(
        out.values.cpu().double(), logs.gather(1, out.indices.cpu()), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", ["allowed", "bias", "repetition", "frequency", "presence", "all"])
def test_penalties(dtype, parts, device):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(3, VOCAB, generator=generator).to(dtype)
    wanted = ("allowed", "bias", "repetition", "frequency", "presence") if parts == "all" else (parts,)
    allowed = torch.randint(-(2**31), 2**31, (3, 7), generator=generator).to(torch.int32)
    prompt, output = torch.randint(0, 3, (2, 5, VOCAB), generator=generator).to(torch.int32)
    rows = torch.tensor([4, 0, 4], dtype=torch.int32)
    bias = (
        torch.tensor([0, 0, 21, 23], dtype=torch.int32),
        torch.arange(23, dtype=torch.int32) * 9 % VOCAB,
        torch.randn(23),
    )
    bias[1][20] = -1
    scale = {name: torch.tensor([1.0, 1.3, 0.8]) for name in ("repetition", "frequency", "presence") if name in wanted}
    given = {"allowed": allowed} if "allowed" in wanted else {}
    given |= dict(zip(("bias_indptr", "bias_tokens", "bias_values"), bias, strict=True)) if "bias" in wanted else {}
    given |= scale | ({"output_counts": output, "rows": rows} if scale else {})
    given |= {"prompt_counts": prompt} if "repetition" in wanted else {}
    out = torch.full((3, VOCAB), NAN, dtype=dtype, device=device)
    penalize_logits(logits.to(device), PenaltyParams(**{name: value.to(device) for name, value in given.items()}), out)
    expected = logits.double()
    for n in range(3):
        entries = range(int(bias[0][n]), int(bias[0][n + 1])) if "bias" in wanted else ()
        biases = {bias[1][entry].item(): bias[2][entry].item() for entry in entries}
        for i in range(VOCAB):
            value = expected[n, i].item()
            if "allowed" in wanted and not allowed[n, i // 32].item() >> (i % 32) & 1:
                value = -INF
            value += biases.get(i, 0.0)
            count, seen = output[rows[n], i].item(), output[rows[n], i].item() or prompt[rows[n], i].item()
            if "repetition" in wanted and seen:
                value = value / scale["repetition"][n].item() if value > 0 else value * scale["repetition"][n].item()
            if "frequency" in wanted:
                value -= scale["frequency"][n].item() * count
            if "presence" in wanted:
                value -= scale["presence"][n].item() * (count > 0)
            expected[n, i] = value
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
