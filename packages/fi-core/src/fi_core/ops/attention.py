"""Attention over paged or ragged KV: the contract and the public function.

Source of the algorithm: attention with an online softmax over KV tiles (Milakov and Gimelshein, 2018; Dao et al.,
2022, section 3.1), over pages (Kwon et al., 2023, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from .. import library
from ..contract import Case, Cost, Operation
from ..errors import ArgumentError
from ..plan import Plan, plan_of
from ..records import AttentionSpec, KVCache, LayerArgs, ResolvedLayer
from ..rope import RopeConfig, RopeTable, YarnScaling
from ..settings import settings
from .arguments import check_last_dim, check_writable
from .caches import check_cache, check_strides


def _cases() -> Iterator[Case]:
    from .cases.attention import cases
    from .cases.attention_long import long_cases

    return chain(cases(), long_cases())


OPERATION = Operation(
    name="attention",
    summary="softmax(q k^T) v of prefill, decode and mixed batches over a paged or ragged KV cache",
    fields={
        "dtype": "dtype of out, and of q with q_format 'same'",
        "q_format": "'same', 'fp8_e4m3' or 'fp8_e5m2': what q is stored as",
        "kv_format": "storage format of K and V",
        "head_dim": "width of a Q and K head",
        "head_dim_vo": "width of a V and output head",
        "group_size": "query heads a KV head",
        "page_size": "tokens a page, None with ragged KV",
        "kv_layout": "'NHD' or 'HND'",
        "table": "'dense', 'indptr' or 'ragged'",
        "causal": "whether later keys are hidden, positions aligned at the end",
        "windowed": "whether some call uses a sliding window",
        "features": "soft_cap, sinks, alibi, mask, lse: what calls may use",
        "batch_invariant": "whether a request's result may not depend on the rest of the batch",
        "rope": "what attention rotates itself: 'none', 'q', or 'qk' with keys unrotated in the cache",
        "rope_pairs": "'none', 'half' or 'interleaved'",
        "rotary_dim": "dims of a head that rotate, 0 with rope 'none'",
        "max_q_len": "most new tokens of one request",
        "levels": "whether batches may name prefixes that requests share",
    },
    typical={
        "dtype": torch.bfloat16,
        "q_format": "same",
        "kv_format": "bf16",
        "head_dim": 128,
        "head_dim_vo": 128,
        "group_size": 4,
        "page_size": 16,
        "kv_layout": "NHD",
        "table": "dense",
        "causal": True,
        "windowed": False,
        "features": frozenset(),
        "batch_invariant": False,
        "rope": "none",
        "rope_pairs": "none",
        "rotary_dim": 0,
        "max_q_len": 1,
        "levels": False,
    },
    cases=_cases,
)

_DEFAULT_LAYER = LayerArgs()


def attention(
    q: Tensor,
    kv: KVCache,
    plan: Plan,
    layer: LayerArgs = _DEFAULT_LAYER,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend from ``q`` [T, Hq, D] to the batch of the plan's last update; returns ``out`` [T, Hq, Dv].

    ``q`` has the spec's ``q_dtype`` and may be any view whose last dim is contiguous and whose other strides are multiples of
    16 bytes; the same holds for K, V and ``out``. T may exceed the batch's tokens: rows past q_indptr[B] are neither
    read nor written. ``out`` may be given (it must not overlap q or kv); ``lse`` float32 [T, Hq] is filled with the
    natural-log sum of exponentials of the logits and needs the spec's feature "lse". A query that sees no key gets
    out = 0 and lse = -inf (with sinks: lse = sink).

    Stream-ordered, no synchronisation, legal in CUDA-graph capture. Raises ArgumentError naming the argument; where its
    strides or address are at fault, that is a LayoutError, an UnsupportedError too.
    """
    if torch.compiler.is_compiling():
        return _compiled(q, kv, plan, layer, out, lse)
    spec = plan.spec
    shape = q.shape
    if len(shape) != 3 or shape[1] != spec.num_qo_heads or shape[2] != spec.head_dim:
        raise ArgumentError("q", f"[T, {spec.num_qo_heads}, {spec.head_dim}]", list(shape))
    if shape[0] < plan.num_q_tokens:
        raise ArgumentError("q", f"at least {plan.num_q_tokens} rows, the tokens of the plan's batch", shape[0])
    _check_tensor("q", q, plan.q_dtype, plan)
    if plan.checked_caches.get(kv) is None:
        _check_cache(kv, plan)
        plan.checked_caches.put(kv, True)
    if out is None:
        out = torch.empty((shape[0], spec.num_qo_heads, spec.head_dim_vo or 0), dtype=spec.dtype, device=q.device)
    else:
        _check_output(out, (shape[0], spec.num_qo_heads, spec.head_dim_vo or 0), plan)
        if out.data_ptr() == q.data_ptr() and out.numel():
            raise ArgumentError("out", "memory apart from q's", "a tensor that begins where q does")
    if lse is not None:
        _check_lse(lse, (shape[0], spec.num_qo_heads), plan)
    resolved = plan.resolve(layer)
    if plan.batch is None:
        raise ArgumentError("plan", "a plan updated with a batch", "no update yet")
    if plan.observed:
        _observed(q, kv, plan, resolved, out, lse)
    else:
        try:
            plan.state.run(q, kv, resolved, out, lse)
        except IndexError:
            _name_bad_index(q, kv, plan)
            raise
    return out


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, plan: Plan) -> None:
    if tensor.dtype != dtype:
        raise ArgumentError(name, f"{dtype} (the plan's)", tensor.dtype)
    if tensor.device != plan.device:
        raise ArgumentError(name, f"a tensor on {plan.device} (the plan's)", tensor.device)
    check_strides(name, tensor)


def _check_output(out: Tensor, shape: tuple[int, ...], plan: Plan) -> None:
    if out.shape != shape:
        raise ArgumentError("out", str(list(shape)), list(out.shape))
    _check_tensor("out", out, plan.spec.dtype, plan)
    check_writable("out", out)


def _check_lse(lse: Tensor, shape: tuple[int, int], plan: Plan) -> None:
    if "lse" not in plan.spec.features:
        raise ArgumentError("lse", "None (spec.features has no 'lse')", "a tensor")
    if lse.shape != shape or lse.dtype != torch.float32 or lse.device != plan.device:
        expected = f"float32 {list(shape)} on {plan.device}"
        raise ArgumentError("lse", expected, f"{lse.dtype} {list(lse.shape)} on {lse.device}")
    check_last_dim("lse", lse)
    check_writable("lse", lse)


def _check_cache(kv: KVCache, plan: Plan) -> None:
    spec = plan.spec
    for name, actual, expected in (
        ("format", kv.format, spec.kv_format),
        ("layout", kv.layout, spec.kv_layout),
        ("page_size", kv.page_size, spec.page_size),
    ):
        if actual != expected:
            raise ArgumentError(f"kv.{name}", f"{expected!r} (the plan's)", repr(actual))
    check_cache(kv, spec.num_kv_heads, spec.head_dim, spec.head_dim_vo or 0, plan.device)


def _name_bad_index(q: Tensor, kv: KVCache, plan: Plan) -> None:
    """After torch found an index out of range on a CPU: raise IndexCheckError naming it."""
    from .. import checks

    checks.check_attention(plan, q, kv)


def _observed(q: Tensor, kv: KVCache, plan: Plan, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
    """The call in checked or shadow mode."""
    from .. import checks, shadow

    if settings().check:
        checks.check_attention(plan, q, kv)
    plan.state.run(q, kv, layer, out, lse)
    shadow.compare_attention(q, kv, plan, layer, out, lse)


_NO_WINDOW = 0
_SPEC_WINDOW = -1


def _compiled(q: Tensor, kv: KVCache, plan: Plan, layer: LayerArgs, out: Tensor | None, lse: Tensor | None) -> Tensor:
    """What torch.compile traces: the output's allocation and one opaque operator that does the rest."""
    spec = plan.spec
    if out is None:
        out = torch.empty((q.shape[0], spec.num_qo_heads, spec.head_dim_vo or 0), dtype=spec.dtype, device=q.device)
    window = _SPEC_WINDOW if layer.window == "spec" else _NO_WINDOW if layer.window is None else layer.window
    numbers = (layer.scale, layer.soft_cap, window)
    q_scale = layer.q_scale if isinstance(layer.q_scale, Tensor) else None
    rope = layer.rope
    workspace = list(plan.state.workspace)
    _OP(
        q,
        kv.k,
        kv.v,
        *library.cache_details(kv),
        plan.handle,
        workspace,
        *numbers,
        layer.sinks,
        layer.alibi_slopes,
        q_scale,
        None if q_scale is not None else layer.q_scale,
        None if rope is None else rope.inv_freq,
        1.0 if rope is None else rope.config.attention_factor,
        out,
        lse,
    )
    return out


def _run(*flat: Any) -> None:
    """The operator's arguments, in the order of its schema."""
    q, k, v, layout, kv_format, scales, scale_values, handle, _, *numbers, out, lse = flat
    scale, soft_cap, window, sinks, slopes, q_scale, q_scale_value, inv_freq, attention_factor = numbers
    plan = plan_of(handle)
    picked: int | Literal["spec"] | None = (
        "spec" if window == _SPEC_WINDOW else None if window == _NO_WINDOW else window
    )
    rope = None
    if inv_freq is not None and plan.spec.rope is not None:
        # inv_freq already holds the scaling; of it kernels read the attention factor only.
        scaling = YarnScaling(1.0, 1, attention_factor=attention_factor)
        config = RopeConfig(plan.spec.rope.rotary_dim, pairs=plan.spec.rope.pairs, scaling=scaling)
        rope = RopeTable(config, inv_freq)
    layer = LayerArgs(scale, soft_cap, picked, sinks, slopes, q_scale_value if q_scale is None else q_scale, rope)
    kv = library.cache_of(k, v, layout, kv_format, scales, scale_values)
    attention(q, kv, plan, layer, out, lse)


_OP = library.register(
    "attention(Tensor q, Tensor k, Tensor v, str layout, str kv_format, Tensor?[] scales, float[] scale_values, "
    "SymInt plan, Tensor(a!)[] workspace, float? scale, float? soft_cap, SymInt window, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? q_scale, float? q_scale_value, Tensor? inv_freq, float attention_factor, "
    "Tensor(b!) out, Tensor(c!)? lse) -> ()",
    _run,
)


def lse_base2(lse: Tensor) -> Tensor:
    """A natural-log ``lse`` of any shape as base-2 logarithms, which some libraries expect: lse / ln(2), a new tensor of
    the same dtype. -inf stays -inf."""
    return lse * math.log2(math.e)


def visible_pairs(q_len: int, kv_len: int, causal: bool, window: int | None) -> int:
    """(query, key) pairs of one request that causality and window leave visible."""
    first = kv_len - q_len
    hidden = 0 if window is None else _triangle(kv_len - window) - _triangle(first - window)
    return (_triangle(kv_len) - _triangle(first) if causal else q_len * kv_len) - hidden


def _triangle(count: int) -> int:
    return count * (count + 1) // 2 if count > 0 else 0


def attention_cost(spec: AttentionSpec, q_lens: Sequence[int], kv_lens: Sequence[int], window: int | None) -> Cost:
    """Fewest bytes (each visible key and value once, q, out) and FLOPs (2 (D + Dv) a visible pair and query head)."""
    dims = spec.head_dim + (spec.head_dim_vo or 0)
    keys = pairs = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        start = 0 if window is None else max(0, kv_len - q_len - window + 1)
        keys += kv_len - start if q_len else 0
        pairs += visible_pairs(q_len, kv_len, spec.causal, window)
    num_bytes = keys * spec.num_kv_heads * dims * spec.kv_dtype.itemsize
    row_bytes = spec.head_dim * spec.q_dtype.itemsize + (spec.head_dim_vo or 0) * spec.dtype.itemsize
    num_bytes += sum(q_lens) * spec.num_qo_heads * row_bytes
    return Cost(num_bytes, 2 * dims * pairs * spec.num_qo_heads)
