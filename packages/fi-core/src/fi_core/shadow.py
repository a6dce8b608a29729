"""Shadow mode (FI_SHADOW=f): a fraction of the attention and append calls is compared with the float64 reference.

Which calls are compared depends on their number alone. Calls captured into a CUDA graph cannot be compared and are
counted. Comparing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .conformance.compare import compare
from .contract import EXACT, Tolerance
from .errors import ShadowMismatchError
from .plan import Plan
from .records import KV_FORMATS, Batch, KVCache, ResolvedLayer
from .rope import RopeTable
from .settings import settings
from .tolerances import append_tolerance, attention_tolerance, lse_tolerance


@dataclass(frozen=True)
class ShadowStatistics:
    """Calls seen in shadow mode, of these compared, skipped while a graph was captured, and found wrong."""

    calls: int = 0
    compared: int = 0
    captured: int = 0
    mismatches: int = 0


_statistics = ShadowStatistics()


def statistics() -> ShadowStatistics:
    """Counts since the process began or since ``reset``."""
    return _statistics


def reset() -> None:
    """Set every count to 0."""
    global _statistics
    _statistics = ShadowStatistics()


def _count(**more: int) -> None:
    global _statistics
    _statistics = replace(_statistics, **{name: getattr(_statistics, name) + step for name, step in more.items()})


def _chosen(device: torch.device) -> bool:
    """Count a call; whether it is one to compare: call i is when floor((i + 1) f) exceeds floor(i f)."""
    fraction = settings().shadow
    if fraction == 0:
        return False
    number = _statistics.calls
    _count(calls=1)
    if int((number + 1) * fraction) == int(number * fraction):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _count(captured=1)
        return False
    _count(compared=1)
    return True


def compare_attention(
    q: Tensor, kv: KVCache, plan: Plan, layer: ResolvedLayer, out: Tensor, lse: Tensor | None
) -> None:
    """Compare ``out`` and ``lse`` with the reference, request by request; raises ShadowMismatchError."""
    if not _chosen(q.device):
        return
    from .reference.attention import oracle

    assert plan.batch is not None
    expected, expected_lse = oracle(plan.spec, plan.batch, q, kv, layer)
    indptr = plan.batch.q_indptr.tolist()
    for request in range(plan.batch.size):
        rows = slice(indptr[request], indptr[request + 1])
        where = f"attention, request {request}"
        _compare(f"{where}, out", out[rows], expected[rows], attention_tolerance(plan.spec.dtype))
        if lse is not None:
            _compare(f"{where}, lse", lse[rows], expected_lse[rows], lse_tolerance(plan.spec.dtype))


def prepare_append(
    k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None
) -> Callable[[], None]:
    """Before an append: compute what it is to write. The returned function, called after, raises ShadowMismatchError."""
    if not _chosen(k.device):
        return lambda: None
    from .reference import serving_dtype
    from .reference.append_kv import appended, bytes_view

    compute_dtype = serving_dtype(k.dtype) if rope is None else torch.float64
    expected = appended(k, v, kv, batch, rope, q, compute_dtype)
    where = (expected.block, expected.offset) if kv.is_paged else (expected.block,)
    tolerance = EXACT if rope is None else append_tolerance(k.dtype, kv.format or "")

    def verify() -> None:
        stored = KV_FORMATS[kv.format or ""]
        for name, cache, values, limit in zip(
            "kv", kv.as_nhd(), (expected.k, expected.v), (tolerance, EXACT), strict=True
        ):
            written = bytes_view(cache)[where].view(stored)
            _compare(f"append_kv, {name}", written.double(), values.double(), limit)
        if q is not None and expected.q is not None:
            _compare("append_kv, q", q[expected.q_rows], expected.q.double(), append_tolerance(q.dtype, ""))

    return verify


def _compare(what: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Raise ShadowMismatchError unless ``actual`` is within ``tolerance`` of ``expected``. NaN may stand where NaN is
    expected: the reference got it from the same inputs."""
    actual, expected = actual.double(), expected.double()
    both_nan = actual.isnan() & expected.isnan()
    result = compare(actual.masked_fill(both_nan, 0.0), expected.masked_fill(both_nan, 0.0), tolerance)
    if not result.passed:
        _count(mismatches=1)
        raise ShadowMismatchError(f"{what}: {result.message}")
