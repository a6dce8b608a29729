"""Philox and exact scaling against published vectors and Python's unbounded integers."""

import random

import pytest
import torch
from fi_core.random import philox4x32, random_bits, scale_bits, scale_fraction
from fi_core.sampling import DrawKeys

WORD = 0xFFFFFFFF


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The published definition in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(words(*counter), words(*key))) == expected


def test_key_layout_matches_the_definition():
    draw = random.Random(5)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63)] + [draw.randrange(-(2**63), 2**63) for _ in range(40)]
    samples = [0, 3, 2**31 - 1, -1, 7] + [draw.randrange(2**31) for _ in range(40)]
    positions = [0, 1, 2**32 - 1, 2**32, 2**40 + 3] + [draw.randrange(2**48) for _ in range(40)]
    keys = DrawKeys(torch.tensor(seeds), torch.tensor(samples, dtype=torch.int32), torch.tensor(positions))
    for purpose, offset in ((0, 0), (1, 0), (2, 7)):
        hi, lo = random_bits(keys, purpose, offset)
        for row, (seed, sample, position) in enumerate(zip(seeds, samples, positions, strict=True)):
            place = position + offset
            block = plain_philox(
                [place & WORD, place >> 32, sample & WORD, purpose], [seed & WORD, (seed >> 32) & WORD]
            )
            assert (int(hi[row]), int(lo[row])) == (block[0] >> 1, block[1] >> 1)


def test_every_part_of_the_key_changes_the_number():
    base = {"seed": 11, "sample": 2, "position": 40, "purpose": 0}
    seen = set()
    for name in (None, *base):
        key = {**base, **({name: base[name] + 1} if name else {})}
        keys = DrawKeys(
            torch.tensor([key["seed"]]),
            torch.tensor([key["sample"]], dtype=torch.int32),
            torch.tensor([key["position"]]),
        )
        hi, lo = random_bits(keys, key["purpose"])
        seen.add((int(hi), int(lo)))
    assert len(seen) == 5


def test_scaling_is_exact():
    draw = random.Random(6)
    top = 2**31 - 1
    totals = [0, 1, 2, 2**31 - 1, 2**31, 2**51, 2**52 - 1] + [draw.randrange(2**52) for _ in range(300)]
    numbers = [(top, top), (0, 0), (top, 0), (0, top), (1, 1), (top, top), (top, top)]
    numbers += [(draw.randrange(2**31), draw.randrange(2**31)) for _ in range(300)]
    bits = (torch.tensor([hi for hi, _ in numbers]), torch.tensor([lo for _, lo in numbers]))
    expected = [((hi << 31) + lo) * total >> 62 for (hi, lo), total in zip(numbers, totals, strict=True)]
    assert scale_bits(bits, torch.tensor(totals)).tolist() == expected
    fractions = [hi for hi, _ in numbers]
    expected = [fraction * total >> 31 for fraction, total in zip(fractions, totals, strict=True)]
    assert scale_fraction(torch.tensor(fractions), torch.tensor(totals)).tolist() == expected
