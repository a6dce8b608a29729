"""Device function of quantisation to FP8 (Micikevicius et al., 2022, section 3)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantise(x, scale, LIMIT: tl.constexpr):
    """Float32 ``x`` as an FP8 format holds it before rounding: divided by the scale, saturated at ``LIMIT``, NaN kept.
    LIMIT 0: not quantised."""
    if LIMIT > 0:
        x = tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x
