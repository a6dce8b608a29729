"""Sampling from columns on the host: typical_p and penalties against the reference, fibers in random orders."""

from __future__ import annotations

import pytest
import torch
from emulated_kernels import EmulatedKernel, emulate
from fi_core.reference.sampling.draw import sample as reference_sample
from fi_core.reference.sampling.history import record_tokens as reference_record
from fi_core.sampling import NO_PENALTIES, PenaltyParams, TokenHistory
from fi_cuda.kernels.sampling import sample as sample_module
from fi_cuda.kernels.sampling.geometry import geometry
from test_cuda_sampling_on_host import COLUMNS, KINDS, VOCAB, parameters, rows_of

pytestmark = pytest.mark.timeout(300)

NUM_ROWS = 3
TYPICAL = ({"typical_p": 0.9}, {"typical_p": 0.2}, {"typical_p": 0.7, "min_p": 0.1}, {"top_k": 50, "typical_p": 0.5})
COLUMNS.setdefault("typical_p", torch.float32)


@pytest.fixture(params=[(1, 128), (2, 256)], ids=["one_block", "two_blocks"])
def form(request, monkeypatch):
    sample_module._bound_to_columns.cache_clear()
    monkeypatch.setattr(sample_module, "geometry_for", lambda vocab, *_, **__: geometry(vocab, *request.param))
    emulate(monkeypatch, [sample_module])
    yield request.param
    sample_module._bound_to_columns.cache_clear()


def penalties_of(seed, vocab_size, capacity=64, num_told=40, num_biased=20):
    generator = torch.Generator().manual_seed(seed)
    history = TokenHistory.empty(NUM_ROWS, vocab_size, capacity)
    told = torch.randint(0, vocab_size, (NUM_ROWS, num_told), generator=generator)
    told[1, :20] = 7
    reference_record(history, told, None)
    words = (vocab_size + 31) // 32
    masks = torch.randint(-(2**31), 2**31, (2, NUM_ROWS, words), generator=generator).to(torch.int32)
    column = torch.rand(NUM_ROWS, generator=generator)
    return PenaltyParams(
        allowed=masks[0] | masks[1],
        step_allowed=torch.where(masks[0] % 3 == 0, masks[0], -1) if seed % 2 else None,
        bias_indptr=torch.arange(NUM_ROWS + 1, dtype=torch.int32) * num_biased,
        bias_tokens=torch.rand((NUM_ROWS, vocab_size), generator=generator)
        .topk(num_biased, dim=1)
        .indices.to(torch.int32)
        .flatten(),
        bias_values=3 * torch.randn(NUM_ROWS * num_biased, generator=generator),
        repetition=column + 0.7,
        frequency=column - 0.3,
        presence=column,
        history=history,
    )


def check_draws(monkeypatch, logits, values, order, penalties=NO_PENALTIES, slots=None):
    filters, keys = parameters(values, NUM_ROWS, order)
    expected, found = torch.empty_like(keys.seed), torch.full_like(keys.seed, -77)
    reference_sample(logits, filters, keys, None, expected, penalties, slots)
    for seed in (0, 1, 2):
        monkeypatch.setattr(EmulatedKernel, "seed", seed)
        sample_module.sample_columns(logits, filters, keys, None, found, penalties, slots)
        assert found.tolist() == expected.tolist(), (values, order, seed)


@pytest.mark.parametrize(
    "values", TYPICAL, ids=lambda values: "+".join(f"{name}{value}" for name, value in values.items())
)
def test_typical_draws_are_those_of_the_reference(form, values, monkeypatch):
    for kind in KINDS:
        for order in ("sequential", "joint"):
            check_draws(monkeypatch, rows_of(kind), values, order)


# Packs of 16 bytes are copied, others pass through registers; of 1300 a warp's part does not end with a word of bits.
@pytest.mark.parametrize("vocab_size", [1008, 1010, 1300])
@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0.7}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}],
    ids=lambda values: "+".join(values) or "plain",
)
def test_penalised_draws_are_those_of_the_reference(form, values, vocab_size, monkeypatch):
    slots = torch.tensor([2, -1, 0])
    for seed, kind in enumerate(KINDS):
        logits, penalties = rows_of(kind, vocab_size), penalties_of(seed, vocab_size)
        check_draws(monkeypatch, logits, values, "sequential", penalties, slots)
        if kind == "normal":
            check_draws(monkeypatch, logits.bfloat16(), values, "sequential", penalties, slots)


def test_lists_longer_than_what_comes_with_the_row(form, monkeypatch):
    # Half of the vocabulary in a history, and more biases than a warp has lanes.
    penalties = penalties_of(3, VOCAB, capacity=700, num_told=1100, num_biased=100)
    assert 512 < int(penalties.history.num_entries.min()) and int(penalties.history.num_entries.max()) <= 700
    check_draws(monkeypatch, rows_of("normal"), {}, "sequential", penalties)
    check_draws(monkeypatch, rows_of("normal"), {"top_p": 0.9}, "sequential", penalties)
    # A block whose list is applied may be sent what top_k begins with.
    check_draws(monkeypatch, rows_of("normal"), {"top_k": 50}, "sequential", penalties)


def test_what_a_history_lacks_makes_its_row_unusable(form, monkeypatch):
    penalties = penalties_of(0, VOCAB, capacity=30)
    assert (penalties.history.num_entries > 30).tolist() == [True, False, True]
    check_draws(monkeypatch, rows_of("normal"), {}, "sequential", penalties)
