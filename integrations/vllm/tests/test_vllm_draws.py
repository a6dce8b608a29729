"""The sampler's part that needs no vLLM: the filters' meaning, seeds, and rows that cannot be drawn from."""

import pytest
import torch
from fi_vllm.draws import draw, filters_of, keys_of

CPU = torch.device("cpu")


def test_top_k_then_top_p_as_vllm_applies_them():
    """Drawn tokens are those that a plain torch mask keeps, in about the proportions of its softmax."""
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    num_draws, k, p = 4000, 8, 0.8
    values, order = logits[0].sort(descending=True)
    weights = values[:k].softmax(0)
    kept = order[:k][(weights.cumsum(0) - weights) < p]
    expected = torch.zeros(50).index_put((kept,), logits[0, kept].softmax(0))
    rows = logits.expand(num_draws, 50)
    tokens = draw(rows, {}, torch.full((num_draws,), k), torch.full((num_draws,), p))
    found = torch.bincount(tokens, minlength=50) / num_draws
    assert set(tokens.tolist()) <= set(kept.tolist())
    assert (found - expected).abs().max() < 5 * (0.25 / num_draws) ** 0.5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_k_of_either_integer_type_and_rows_without_a_filter(dtype):
    k, p = torch.tensor([1, 50], dtype=dtype), torch.tensor([1.0, 1.0])
    logits = torch.randn(2, 50)
    assert draw(logits, {}, k, p)[0] == logits[0].argmax()
    assert filters_of(k, None).top_k.dtype == torch.int32 and filters_of(None, p).top_k is None


def test_a_seeded_row_draws_the_same_in_any_batch():
    logits = torch.zeros(5, 1000)

    def tokens(row, num_rows, steps=4):
        generators = {row: torch.Generator().manual_seed(7)}
        return [int(draw(logits[:num_rows], generators, None, None)[row]) for _ in range(steps)]

    alone = tokens(0, 1)
    assert tokens(3, 5) == alone and len(set(alone)) > 1


def test_rows_without_a_seed_follow_torchs_own_generator():
    torch.manual_seed(3)
    first = keys_of(4, {}, CPU).seed
    torch.manual_seed(3)
    again = keys_of(4, {}, CPU).seed
    assert first.equal(again) and len(set(first.tolist())) == 4
    assert not keys_of(4, {}, CPU).seed.equal(again)


def test_a_row_of_nan_gives_a_token_that_can_be_looked_up():
    logits = torch.full((2, 10), torch.nan)
    logits[1] = 0.0
    tokens = draw(logits, {}, None, None)
    assert tokens[0] == 0 and 0 <= tokens[1] < 10
