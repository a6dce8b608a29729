"""Keys and draws: seeds in any batch, torch's own generator without them, and rows that cannot be drawn from."""

import fi_core as fi
import torch
from fi_adapters.draws import draw, fresh_keys, seeded_keys

CPU = torch.device("cpu")


def test_a_row_with_a_generator_draws_the_same_in_any_batch():
    logits = torch.zeros(5, 1000)

    def tokens(row, num_rows, steps=4):
        generators = {row: torch.Generator().manual_seed(7)}
        keys = (fresh_keys(num_rows, CPU, generators) for _ in range(steps))
        return [int(draw(logits[:num_rows], fi.FilterParams(), key)[row]) for key in keys]

    alone = tokens(0, 1)
    assert tokens(3, 5) == alone and len(set(alone)) > 1


def test_rows_without_a_generator_follow_torchs_own():
    torch.manual_seed(3)
    first = fresh_keys(4, CPU).seed
    torch.manual_seed(3)
    again = fresh_keys(4, CPU).seed
    assert first.equal(again) and len(set(first.tolist())) == 4
    assert not fresh_keys(4, CPU).seed.equal(again)


def test_seeds_and_positions_make_the_draw():
    logits, filters = torch.zeros(2, 1000), fi.FilterParams()
    seeds, positions = torch.tensor([5, 5], dtype=torch.int32), torch.tensor([7, 8], dtype=torch.int32)
    first = draw(logits, filters, seeded_keys(seeds, positions))
    assert first.equal(draw(logits, filters, seeded_keys(seeds, positions)))
    assert first[0] != first[1]
    assert first[0] == draw(logits[:1], filters, seeded_keys(seeds[:1], positions[:1]))[0]


def test_a_row_of_nan_gives_a_token_that_can_be_looked_up():
    logits = torch.full((2, 10), torch.nan)
    logits[1] = 0.0
    tokens = draw(logits, fi.FilterParams(), fresh_keys(2, CPU))
    assert tokens[0] == 0 and 0 <= tokens[1] < 10
