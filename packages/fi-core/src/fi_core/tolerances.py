"""How far a kernel may be from the float64 oracle, shared by the conformance cases and by shadow mode.

The limits follow from one rounding of the output and, for 16-bit dtypes, of the softmax weights that tensor cores take
as input: 2^-9 (bfloat16) and 2^-12 (float16) each, with a factor of two or more to spare. float32 means IEEE float32:
tf32 products would miss the limit. An FP8 cache costs nothing here, because the oracle reads the same stored bytes. Where
Q, K and V all are FP8 e4m3 the weights may be too: 2^-4 each, 2.7 % in the root mean square, and tensor cores that multiply
FP8 keep about 14 bits of a sum (DeepSeek-V3, 2024, section 3.3.2).
"""

from __future__ import annotations

import torch

from .contract import Tolerance

_OUTPUT = {
    torch.bfloat16: Tolerance(1e-2, 5e-2),
    torch.float16: Tolerance(2e-3, 1e-2),
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.float64: Tolerance(1e-12, 1e-11),
}
ROUNDED: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-13, 1e-11),
    torch.float32: Tolerance(2e-6, 5e-5),
    torch.float16: Tolerance(5e-4, 1.6e-2),
    torch.bfloat16: Tolerance(4e-3, 1.25e-1),
    torch.float8_e4m3fn: Tolerance(5e-3, 4.0),
    torch.float8_e5m2: Tolerance(5e-3, 4.0),
}
"""Tolerances of elementwise results: float32 arithmetic (float64 for float64) and one rounding of values up to 32 times
the larger of 1 and their RMS. FP8 is compared with the rounded oracle: of values up to 16 times the RMS one in a thousand
may be rounded to the other side. Rounding to a 16-bit dtype before would do that to one in 64 or more."""

_LSE_OF_16_BIT = Tolerance(1e-3, 5e-3)


_FP8_WEIGHTS = Tolerance(5e-2, 2.5e-1)


def attention_tolerance(dtype: torch.dtype, fp8_weights: bool = False) -> Tolerance:
    """For attention outputs of ``dtype``; ``fp8_weights``: Q, K and V are FP8 e4m3, and so may be the softmax weights."""
    return _FP8_WEIGHTS if fp8_weights else _OUTPUT[dtype]


def lse_tolerance(dtype: torch.dtype) -> Tolerance:
    """For the float32 log-sum-exp of logits whose inputs have ``dtype``: products of 16-bit numbers are exact in float32,
    but a soft-cap may use the hardware's tanh."""
    return _OUTPUT[torch.float32] if dtype in (torch.float32, torch.float64) else _LSE_OF_16_BIT


def append_tolerance(dtype: torch.dtype, kv_format: str) -> Tolerance:
    """For rotated keys and queries. FP8: rounding may fall to the other side for a few elements, which then differ by a
    whole step. float32: angles computed in float32 are off by position * 2^-24 radians."""
    if kv_format.startswith("fp8"):
        return Tolerance(3e-2, 1.0)
    return Tolerance(1e-4, 1e-3) if dtype == torch.float32 else _OUTPUT[dtype]
