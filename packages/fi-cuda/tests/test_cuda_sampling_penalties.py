"""Penalties, typical_p and ten million draws on the GPU: whole vocabularies against the reference, in every form of a row's
cluster."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core.reference.sampling.draw import filter_logits as reference_filter
from fi_core.reference.sampling.draw import map_columns
from fi_core.reference.sampling.penalties import penalize_logits as reference_penalties
from fi_core.sampling import DrawKeys, PenaltyParams, TokenHistory
from kernel_exponential import check_drawn
from test_cuda_sampling import FILTERS, VOCAB, parameters, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


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
def test_penalised_draws_are_those_of_the_reference(num_rows, dtype, monkeypatch):
    from fi_cuda.kernels.sampling.penalize_logits import penalize_logits
    from fi_cuda.kernels.sampling.sample import sample_columns

    penalties, slots = penalties_of(num_rows), torch.randperm(num_rows, device="cuda")
    slots[1] = -1
    has = slots >= 0
    for kind in ("normal", "tied", "rounded"):
        logits = rows_of(kind, num_rows, VOCAB).to(dtype)
        expected, out = torch.empty_like(logits), torch.full_like(logits, 7.0)
        reference_penalties(logits, penalties, expected, slots)
        penalize_logits(logits, penalties, out, slots)
        assert torch.equal(out, expected), kind
        for values in FILTERS.values():
            filters, keys = parameters(values, num_rows)
            found = torch.full_like(keys.seed, -77)
            sample_columns(logits, filters, keys, None, found, penalties, slots)
            assert found[1] == -1
            picked = map_columns(filters, lambda column: column[slots[has]])
            keys = DrawKeys(keys.seed[slots[has]], keys.sample[slots[has]], keys.position[has])
            check_drawn(monkeypatch, found[has], expected[has], picked, keys)


@pytest.mark.parametrize("num_rows", [3, 20, 70])
def test_typical_draws_are_those_of_the_reference(num_rows, monkeypatch):
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
                found = torch.full_like(keys.seed, -77)
                sample_columns(logits, filters, keys, None, found, PenaltyParams(), None)
                check_drawn(monkeypatch, found, logits, filters, keys)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"typical_p": 0.8},
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
