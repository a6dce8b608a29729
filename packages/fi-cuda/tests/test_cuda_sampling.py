"""Sampling of whole vocabularies on the GPU: distributions that the conformance cases are too small for, against the float64
reference, in every form of a row's cluster; the same bits on every run and in any batch."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core.reference.sampling.draw import filter_logits as reference_filter
from fi_core.reference.sampling.draw import sample as reference_sample
from fi_core.reference.sampling.penalties import penalize_logits as reference_penalties
from fi_core.sampling import DrawKeys, FilterParams, PenaltyParams, TokenHistory

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

VOCAB = 128256
MOST_BOUNDARY_ROWS = 0.01
"""Share of draws that a rounding of the exponential may tip."""

COLUMNS = {"top_k": torch.int32} | dict.fromkeys(("top_p", "min_p", "typical_p", "temperature"), torch.float32)
FILTERS: dict[str, dict[str, float]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "large_top_k": {"top_k": 5000},
    "large_top_k_top_p": {"top_k": 5000, "top_p": 0.9},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
}


def rows_of(kind: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(3)
    normal = torch.randn((num_rows, vocab_size), device="cuda", generator=generator)
    made = {
        "normal": lambda: 3 * normal,
        "narrow": lambda: 0.01 * normal,
        "uniform": lambda: torch.rand((num_rows, vocab_size), device="cuda", generator=generator),
        "equal": lambda: torch.full_like(normal, 0.25),
        "tied": lambda: (1.5 * normal).round(),
        "rounded": lambda: (3 * normal).bfloat16().float(),
        "few": lambda: torch.where(normal > 3.1, 3 * normal, -torch.inf),
        "one_group": lambda: torch.where(torch.arange(vocab_size, device="cuda") < 200, 20 + normal, normal),
    }
    return made[kind]()


def parameters(values: dict[str, float], num_rows: int, order: str = "sequential") -> tuple[FilterParams, DrawKeys]:
    columns = {
        name: torch.full((num_rows,), value, dtype=COLUMNS[name], device="cuda") for name, value in values.items()
    }
    seed = torch.arange(num_rows, device="cuda") * 7919 + 5
    keys = DrawKeys(seed, torch.zeros_like(seed, dtype=torch.int32), seed + 100)
    return FilterParams(**columns, order=order), keys


def drawn(logits: torch.Tensor, filters: FilterParams, keys: DrawKeys) -> torch.Tensor:
    from fi_cuda.kernels.sampling.sample import sample

    tokens = torch.full_like(keys.seed, -77)
    sample(logits, filters, keys, None, tokens)
    return tokens


@pytest.mark.parametrize("num_rows", [3, 20, 70])
@pytest.mark.parametrize("kind", ["normal", "narrow", "uniform", "equal", "tied", "rounded", "few", "one_group"])
def test_draws_are_those_of_the_reference(kind, num_rows):
    logits = rows_of(kind, num_rows, VOCAB)
    for name, values in FILTERS.items():
        for order in ("sequential", "joint"):
            filters, keys = parameters(values, num_rows, order)
            expected = torch.empty_like(keys.seed)
            reference_sample(logits, filters, keys, None, expected)
            other = int((drawn(logits, filters, keys) != expected).sum())
            assert other <= max(1, MOST_BOUNDARY_ROWS * num_rows), (name, order)


@pytest.mark.parametrize("kind", ["normal", "narrow", "equal", "tied"])
def test_probabilities_are_those_of_the_reference(kind):
    from fi_cuda.kernels.sampling.filter_logits import filter_logits

    logits = rows_of(kind, 5, VOCAB)
    for name in ("top_p", "top_k", "all"):
        filters, _ = parameters(FILTERS[name], 5)
        out = torch.full_like(logits, -7.0)
        expected = torch.empty_like(logits, dtype=torch.float64)
        filter_logits(logits, filters, "probs", out)
        reference_filter(logits, filters, "probs", expected)
        assert torch.allclose(out.sum(dim=1), torch.ones(5, device="cuda"), atol=1e-4), name
        # A token at the limit may go either way.
        assert int(((out > 0) != (expected > 0)).sum(dim=1).max()) <= 1, name
        assert float((out - expected).abs().max()) < 1e-4, name


def test_a_row_draws_the_same_alone_and_in_any_batch():
    logits = rows_of("normal", 70, VOCAB)
    for values in FILTERS.values():
        filters, keys = parameters(values, 70)
        tokens = drawn(logits, filters, keys)
        assert torch.equal(tokens, drawn(logits, filters, keys))
        for row in (0, 33, 69):
            one, _ = parameters(values, 1)
            key = DrawKeys(keys.seed[row : row + 1], keys.sample[row : row + 1], keys.position[row : row + 1])
            assert drawn(logits[row : row + 1], one, key).item() == tokens[row].item()


def history_of(num_rows: int, num_tokens: int) -> TokenHistory:
    """Outputs of ``num_tokens`` draws a row, recorded on the device a few at a time."""
    history = TokenHistory.empty(num_rows, VOCAB, 2 * num_tokens, "cuda")
    generator = torch.Generator(device="cuda").manual_seed(6)
    told = torch.randint(0, 3 * num_tokens, (num_rows, num_tokens), device="cuda", generator=generator) * 37 % VOCAB
    for piece in told.split(50, dim=1):
        fi.record_tokens(history, piece.contiguous())
    return history


def penalties_of(num_rows: int, num_tokens: int = 300) -> PenaltyParams:
    generator = torch.Generator(device="cuda").manual_seed(7)
    words = (VOCAB + 31) // 32
    masks = torch.randint(-(2**31), 2**31, (2, num_rows, words), device="cuda", generator=generator).to(torch.int32)
    bias = torch.rand((num_rows, VOCAB), device="cuda", generator=generator).topk(20, dim=1).indices
    column = torch.rand(num_rows, device="cuda", generator=generator)
    return PenaltyParams(
        allowed=masks[0] | masks[1],
        bias_indptr=torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * 20,
        bias_tokens=bias.to(torch.int32).flatten(),
        bias_values=torch.randn(num_rows * 20, device="cuda", generator=generator) * 3,
        repetition=column + 0.7,
        frequency=column - 0.3,
        presence=column,
        history=history_of(num_rows, num_tokens),
    )


@pytest.mark.parametrize("num_rows", [3, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalised_draws_are_those_of_the_reference(num_rows, dtype):
    from fi_cuda.kernels.sampling.penalize_logits import penalize_logits
    from fi_cuda.kernels.sampling.sample import sample_columns

    penalties, slots = penalties_of(num_rows), torch.randperm(num_rows, device="cuda")
    slots[1] = -1
    for kind in ("normal", "tied", "rounded"):
        logits = rows_of(kind, num_rows, VOCAB).to(dtype)
        expected, out = torch.empty_like(logits), torch.full_like(logits, 7.0)
        reference_penalties(logits, penalties, expected, slots)
        penalize_logits(logits, penalties, out, slots)
        assert torch.equal(out, expected), kind
        for name, values in FILTERS.items():
            filters, keys = parameters(values, num_rows)
            wanted, found = torch.empty_like(keys.seed), torch.full_like(keys.seed, -77)
            reference_sample(logits, filters, keys, None, wanted, penalties, slots)
            sample_columns(logits, filters, keys, None, found, penalties, slots)
            assert int((found != wanted).sum()) <= max(1, MOST_BOUNDARY_ROWS * num_rows), (kind, name)
            assert found[1] == -1


@pytest.mark.parametrize("num_rows", [3, 20, 70])
def test_typical_draws_are_those_of_the_reference(num_rows):
    from fi_cuda.kernels.sampling.sample import sample_columns

    for kind in ("normal", "narrow", "tied", "few", "one_group"):
        logits = rows_of(kind, num_rows, VOCAB)
        for values in (
            {"typical_p": 0.9},
            {"typical_p": 0.2},
            {"top_k": 50, "typical_p": 0.5},
            {"typical_p": 0.7, "min_p": 0.1},
        ):
            for order in ("sequential", "joint"):
                filters, keys = parameters(values, num_rows, order)
                wanted, found = torch.empty_like(keys.seed), torch.full_like(keys.seed, -77)
                reference_sample(logits, filters, keys, None, wanted)
                sample_columns(logits, filters, keys, None, found, PenaltyParams(), None)
                assert int((found != wanted).sum()) <= max(1, MOST_BOUNDARY_ROWS * num_rows), (kind, values, order)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"top_k": 100, "top_p": 0.95, "min_p": 0.005},
    ],
    ids=lambda values: "+".join(values) or "plain",
)
def test_ten_million_draws_follow_the_distribution(values):
    num_draws, vocab_size = 10_000_000, 500
    generator = torch.Generator(device="cuda").manual_seed(1)
    logits = 2 * torch.randn((1, vocab_size), device="cuda", generator=generator)
    filters, _ = parameters(values, num_draws)
    number = torch.arange(num_draws, device="cuda")
    keys = DrawKeys(torch.full_like(number, 12345), (number % 1000).to(torch.int32), number // 1000)
    tokens = fi.sample(logits, filters, keys, rows=torch.zeros(num_draws, dtype=torch.int32, device="cuda"))
    one, _ = parameters(values, 1)
    probs = torch.empty((1, vocab_size), dtype=torch.float64, device="cuda")
    reference_filter(logits, one, "probs", probs)
    assert int(tokens.min()) >= 0
    counts, expected = tokens.bincount(minlength=vocab_size).double(), probs[0] * num_draws
    assert counts[expected == 0].sum() == 0
    # Tokens with few expected draws count together.
    rare = (expected > 0) & (expected < 5)
    counts, expected = (torch.cat([item[expected >= 5], item[rare].sum()[None]]) for item in (counts, expected))
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    half = torch.stack([(used.sum() - 1).double(), statistic]) / 2
    assert torch.special.gammaincc(half[0], half[1]) > 1e-4
