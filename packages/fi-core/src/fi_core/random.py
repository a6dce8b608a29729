"""Keyed random numbers and their exact scaling, in int64 tensor arithmetic.

Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number depends
on its key alone (seed, sample, position, purpose), never on the place in a batch, so every back end can make it
anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import DrawKeys

PURPOSE_DRAW = 0
"""The draw of a token from its distribution."""
PURPOSE_ACCEPT = 1
"""The acceptance of a drafted token against the draft's distribution."""
PURPOSE_RESIDUAL = 2
"""The draw after a rejection, or after a chain accepted to its end, against the draft's distribution."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_HALF = 2**31 - 1

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32; every word is an int64 tensor with a value from 0 to 2^32 - 1 (shapes broadcast)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_idx in range(_ROUNDS):
        if round_idx:
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        # The 64-bit product may exceed int64; it wraps to the same bits, and the masks below undo the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
    return c0, c1, c2, c3


def random_bits(keys: DrawKeys, purpose: int, offset: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """The 62-bit random number R = hi * 2^31 + lo of each key at position + ``offset``: int64 [N] (hi, lo), 31 bits
    each.

    Philox key (seed low, seed high), counter (position low, position high, sample, purpose) in words of 32 bits (of the
    two's complement); hi and lo are the upper 31 bits of the first two words of the block.
    """
    position = keys.position + offset
    counter = (
        position & _WORD,
        (position >> 32) & _WORD,
        keys.sample.to(torch.int64) & _WORD,
        torch.full_like(position, purpose),
    )
    word0, word1, _, _ = philox4x32(counter, (keys.seed & _WORD, (keys.seed >> 32) & _WORD))
    return word0 >> 1, word1 >> 1


def scale_bits(bits: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """floor(R * total / 2^62) for int64 0 <= total < 2^52, exact: every intermediate stays below 2^63."""
    hi, lo = bits
    total_hi, total_lo = total >> 31, total & _HALF
    middle = hi * total_lo + ((lo * total_lo) >> 31)
    lower = lo * total_hi + (middle & _HALF)
    return hi * total_hi + (middle >> 31) + (lower >> 31)


def scale_fraction(fraction: Tensor, total: Tensor) -> Tensor:
    """floor(fraction * total / 2^31) for int64 0 <= fraction < 2^31 and 0 <= total < 2^52, exact."""
    return fraction * (total >> 31) + ((fraction * (total & _HALF)) >> 31)
