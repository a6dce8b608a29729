"""Shadow mode (FI_SHADOW=f): a fraction of the calls is compared with the reference, in float64 where it has a choice.

Compared are the calls of every operation of fi-core that computes: all but ``copy_pages``, and none that a plugin
brings. Which calls are compared depends on their number alone. Calls captured into a CUDA graph cannot be compared and
are counted. Comparing waits for the device and copies the operands (of ``attention`` and ``append_kv`` not the cache).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .conformance.compare import compare
from .contract import EXACT, Tolerance
from .errors import ShadowMismatchError
from .plan import Plan
from .records import KV_FORMATS, Batch, KVCache, ResolvedLayer
from .rope import RopeTable
from .settings import settings
from .tolerances import ROUNDED, append_tolerance, attention_tolerance, lse_tolerance

_LIMITS: Mapping[str, Callable[[torch.dtype], Tolerance]] = {
    "merge_states": attention_tolerance,
    # Angles computed in float32 are off by position * 2^-24 radians, whatever the dtype.
    "rope": lambda dtype: attention_tolerance(torch.bfloat16),
    "rmsnorm": ROUNDED.__getitem__,
    "add_rmsnorm": ROUNDED.__getitem__,
    "silu_mul": ROUNDED.__getitem__,
    "gelu_mul": ROUNDED.__getitem__,
    "top_k": ROUNDED.__getitem__,
    "find_shared_prefixes": ROUNDED.__getitem__,
    "logprobs": lambda dtype: Tolerance(1e-5, 2e-5),
    "penalize_logits": ROUNDED.__getitem__,
    "record_tokens": ROUNDED.__getitem__,
}
"""Limits of floating outputs, by their dtype; integer outputs of these operations are exact."""

_DRAWN = ("sample", "filter_logits", "verify_chain", "verify_tree")
"""Operations in which the rounding of an exponential may tip a token over a boundary, for one row in many thousands."""
_WRONG_ROWS = 1e-3


@dataclass(frozen=True)
class ShadowStatistics:
    """Calls seen in shadow mode, of these compared, skipped while a graph was captured, and found wrong."""

    calls: int = 0
    compared: int = 0
    captured: int = 0
    mismatches: int = 0


_lock = threading.Lock()
_statistics = ShadowStatistics()
_drawn_rows: dict[str, tuple[int, int]] = {}


def statistics() -> ShadowStatistics:
    """Counts since the process began or since ``reset``."""
    return _statistics


def reset() -> None:
    """Set every count to 0."""
    global _statistics
    with _lock:
        _statistics = ShadowStatistics()
        _drawn_rows.clear()


def _count(**more: int) -> ShadowStatistics:
    """Add to the counts; returns those from before."""
    global _statistics
    with _lock:
        before = _statistics
        _statistics = replace(before, **{name: getattr(before, name) + step for name, step in more.items()})
        return before


def _chosen(device: torch.device) -> bool:
    """Count a call; whether it is one to compare: call i is when floor((i + 1) f) exceeds floor(i f)."""
    fraction = settings().shadow
    if fraction == 0:
        return False
    number = _count(calls=1).calls
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
        _compare(
            f"{where}, out",
            out[rows],
            expected[rows],
            attention_tolerance(plan.spec.dtype, plan.spec.allows_fp8_weights),
        )
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
            _compare(f"append_kv, {name}", written, values, limit)
        if q is not None and expected.q is not None:
            _compare("append_kv, q", q[expected.q_rows], expected.q, append_tolerance(q.dtype, ""))

    return verify


def shadowed(op: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """``kernel`` of operation ``op`` followed, in the calls that are chosen, by a comparison of all that the reference
    writes, given copies of the same arguments. An operation that is not compared this way keeps its kernel."""
    if op not in _LIMITS and op not in _DRAWN:
        return kernel
    from .reference.plugin import load

    reference = load(op)

    def run(*arguments: Any) -> None:
        if not _chosen(next(item.device for item in arguments if isinstance(item, Tensor))):
            kernel(*arguments)
            return
        copies = _Copies(widen=op in _LIMITS)
        # Inference mode keeps no versions of tensors, which tell what was written.
        with torch.inference_mode(False), torch.no_grad():
            copied = [copies.copy(item) for item in arguments]
            versions = {key: copy._version for key, (_, copy) in copies.pairs.items()}
            reference(*copied)
        kernel(*arguments)
        written = [pair for key, pair in copies.pairs.items() if pair[1]._version != versions[key]]
        if op in _DRAWN:
            _compare_rows(op, written)
            return
        for actual, expected in written:
            limit = _LIMITS[op](actual.dtype) if actual.is_floating_point() else EXACT
            _compare(f"{op}, output {list(actual.shape)}", actual, expected, limit)

    return run


class _Copies:
    """Copies of tensors, one for each piece of memory, inside records too; ``widen``: floats as float64."""

    def __init__(self, widen: bool) -> None:
        self.widen = widen
        self.pairs: dict[Any, tuple[Tensor, Tensor]] = {}

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in self.pairs:
                # FP8 outputs keep their dtype, which tells the reference what to round to.
                widen = self.widen and value.is_floating_point() and value.element_size() > 1
                dtype = torch.float64 if widen else value.dtype
                self.pairs[key] = (value, value.to(dtype, copy=True))
            return self.pairs[key][1]
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{item.name: self.copy(getattr(value, item.name)) for item in fields(value)})
        return value


def _compare_rows(op: str, outputs: list[tuple[Tensor, Tensor]]) -> None:
    """Count rows that differ in some output; raises ShadowMismatchError once they are more than one and more than
    _WRONG_ROWS of those compared."""
    wrong: Tensor | None = None
    for actual, expected in outputs:
        if actual.is_floating_point():
            equal = torch.isclose(actual, expected, rtol=1e-5, atol=2e-6, equal_nan=True)
        else:
            equal = actual == expected
        differs = ~equal.reshape(actual.shape[0], -1).all(dim=1)
        wrong = differs if wrong is None else wrong | differs
    if wrong is None:
        return
    num_wrong = int(wrong.sum())
    with _lock:
        seen, bad = _drawn_rows.get(op, (0, 0))
        _drawn_rows[op] = seen, bad = seen + wrong.shape[0], bad + num_wrong
    if num_wrong and bad > max(1, seen * _WRONG_ROWS):
        _count(mismatches=1)
        row = int(wrong.nonzero()[0])
        raise ShadowMismatchError(
            f"{op}, row {row}: {bad} of the {seen} rows compared so far differ from the reference"
        )


def _compare(what: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Raise ShadowMismatchError unless ``actual`` is within ``tolerance``, or one step of its dtype, of ``expected``. NaN
    may stand where NaN is expected: the reference got it from the same inputs."""
    found, wanted = actual.double(), expected.double()
    both_nan = found.isnan() & wanted.isnan()
    found, wanted = found.masked_fill(both_nan, 0.0), wanted.masked_fill(both_nan, 0.0)
    if tolerance != EXACT:
        # Activations have outliers far above their RMS, which the limits are relative to.
        near = (found - wanted).abs() <= torch.finfo(actual.dtype).eps * wanted.abs()
        found = torch.where(near, wanted, found)
    result = compare(found, wanted, tolerance)
    if not result.passed:
        _count(mismatches=1)
        raise ShadowMismatchError(f"{what}: {result.message}")
