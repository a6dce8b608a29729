"""The memory-bound operations at 8192 and 64 tokens of Llama-3.1-8B's shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from fi_core.contract import EXACT, Cost, Tolerance
from fi_core.ops import OPERATIONS, add_rmsnorm, append_kv, copy_pages, gelu_mul, merge_states, rmsnorm, rope, silu_mul
from fi_core.ops.quantised_output import OUT_FORMATS
from fi_core.records import KV_FORMATS, Batch, KVCache, KVFormat
from fi_core.reference.activations import gated_gelu, gated_silu
from fi_core.reference.append_kv import append_kv as reference_append
from fi_core.reference.merge_states import merge
from fi_core.reference.norms import added, normalized, stored
from fi_core.reference.rope import apply_rope
from fi_core.rope import RopeConfig, RopeTable
from fi_core.tolerances import ROUNDED, append_tolerance
from torch import Tensor

from .ceilings import copies
from .numerics import checker
from .problem import Case, Maker, Outputs, Problem, generator_on, normal

DTYPE = torch.bfloat16
TOKENS = (8192, 64)
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, PAGE = 32, 8, 128, 4096, 14336, 16
EPS = 1e-5
FEW_REPEATS = 20
"""Calls of a few tokens are shorter than a graph's launch: so many stand in one graph, and the time is divided."""

F64 = torch.float64
_ROUNDED = ROUNDED[DTYPE]


def _repeats(num_tokens: int) -> int:
    return FEW_REPEATS if num_tokens <= 64 else 1


def _typical(op: str, **changes: Hashable) -> dict[str, Hashable]:
    operation = next(item for item in OPERATIONS if item.name == op)
    return {**operation.typical, **changes}


@dataclass(frozen=True)
class _Judged:
    """What a builder found: the expected outputs with their tolerances, our call's maker, its cost."""

    expected: Mapping[str, Tensor]
    tolerances: Mapping[str, Tolerance]
    ours: Maker
    cost: Cost


def _problem(op: str, inputs: object, num_tokens: int, judged: _Judged, **fields: Hashable) -> Problem:
    device = next(iter(judged.expected.values())).device
    return Problem(
        request=_typical(op, **fields),
        inputs=inputs,
        ours={"": judged.ours},
        check=checker(judged.expected, judged.tolerances),
        cost=judged.cost,
        ceilings=copies(judged.cost, device),
        repeats=_repeats(num_tokens),
    )


@dataclass(frozen=True)
class RopeInputs:
    """q [T, Hq, D] and k [T, Hkv, D], rotated in place at ``positions`` int64 [T] (halves, base as in ``table``)."""

    q: Tensor
    k: Tensor
    positions: Tensor
    table: RopeTable


def _rope(device: torch.device, num_tokens: int, source: str) -> Problem:
    generator = generator_on(device)
    q = normal((num_tokens, HEADS, HEAD_DIM), DTYPE, generator)
    k = normal((num_tokens, KV_HEADS, HEAD_DIM), DTYPE, generator)
    positions = torch.arange(num_tokens, device=device)
    table = RopeTable.make(RopeConfig(HEAD_DIM), device, max(TOKENS) if source == "table" else None)

    def ours() -> Callable[[], Outputs]:
        q_own, k_own = q.clone(), k.clone()

        def call() -> Outputs:
            rope.rope(q_own, k_own, positions, table, q_out=q_own, k_out=k_own)
            return {"q": q_own, "k": k_own}

        return call

    expected = {"q": apply_rope(q, positions, table, F64), "k": apply_rope(k, positions, table, F64)}
    cost = rope.cost(num_tokens, HEADS + KV_HEADS, HEAD_DIM, HEAD_DIM, DTYPE, table=source == "table")
    judged = _Judged(expected, {"q": _ROUNDED, "k": _ROUNDED}, ours, cost)
    fields = {"dtype": DTYPE, "head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM, "pairs": "half", "source": source}
    return _problem("rope", RopeInputs(q, k, positions, table), num_tokens, judged, **fields)


@dataclass(frozen=True)
class NormInputs:
    """x (and the residual stream) [T, hidden], weight [hidden]; with ``scale`` the output is FP8, x / scale."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    eps: float
    scale: Tensor | None = None


def _norm(device: torch.device, num_tokens: int, op: str, out_format: str) -> Problem:
    generator = generator_on(device)
    x, residual = (normal((num_tokens, HIDDEN), DTYPE, generator) for _ in range(2))
    weight = normal((HIDDEN,), DTYPE, generator)
    same, adds = out_format == "same", op == "add_rmsnorm"
    scale = None if same else torch.full((1,), 0.05, device=device)
    out_dtype = OUT_FORMATS[out_format] or DTYPE

    def ours() -> Callable[[], Outputs]:
        out = torch.empty(x.shape, dtype=out_dtype, device=device)
        if not adds:
            return lambda: {"out": rmsnorm.rmsnorm(x, weight, EPS, scale=scale, out=out)}
        own = residual.clone()
        return lambda: {"out": add_rmsnorm.add_rmsnorm(x, own, weight, EPS, scale=scale, out=out), "residual": own}

    total = added(x, residual, torch.float32) if adds else x
    expected = {"out": stored(normalized(total, weight, EPS, 0.0, F64), scale, F64 if same else out_dtype)}
    tolerances = {"out": ROUNDED[out_dtype], "residual": EXACT}
    if adds:
        expected["residual"] = total
    cost = (add_rmsnorm if adds else rmsnorm).cost(num_tokens, HIDDEN, DTYPE, out_dtype)
    inputs = NormInputs(x, residual if adds else None, weight, EPS, scale)
    fields: dict[str, Hashable] = {"dtype": DTYPE, "hidden_size": HIDDEN, "out_format": out_format}
    return _problem(op, inputs, num_tokens, _Judged(expected, tolerances, ours, cost), **fields)


@dataclass(frozen=True)
class GateInputs:
    """x [T, 2 * width]: gate, then up."""

    x: Tensor


def _gate(device: torch.device, num_tokens: int, op: str) -> Problem:
    x = normal((num_tokens, 2 * WIDTH), DTYPE, generator_on(device))
    values: dict[str, Hashable] = {"dtype": DTYPE, "width": WIDTH}
    wide = gated_silu(x, torch.float32) if op == "silu_mul" else gated_gelu(x, "tanh", torch.float32)
    if op == "gelu_mul":
        values["approximate"] = "tanh"

    def ours() -> Callable[[], Outputs]:
        out = x.new_empty((num_tokens, WIDTH))
        if op == "silu_mul":
            return lambda: {"out": silu_mul.silu_mul(x, out=out)}
        return lambda: {"out": gelu_mul.gelu_mul(x, "tanh", out=out)}

    judged = _Judged(
        {"out": wide},
        {"out": _ROUNDED},
        ours,
        (gelu_mul if op == "gelu_mul" else silu_mul).cost(num_tokens, WIDTH, DTYPE),
    )
    return _problem(op, GateInputs(x), num_tokens, judged, **values)


@dataclass(frozen=True)
class AppendInputs:
    """One request of T new tokens at positions 0 .. T - 1 whose pages lie in random order; ``kv`` is empty before."""

    k: Tensor
    v: Tensor
    q: Tensor | None
    kv: KVCache
    batch: Batch
    rope: RopeTable | None


def own_cache(kv: KVCache) -> KVCache:
    """A copy of the cache."""
    return replace(kv, k=kv.k.clone(), v=kv.v.clone())


def _append(device: torch.device, num_tokens: int, kv_format: KVFormat, with_rope: bool, with_q: bool) -> Problem:
    generator = generator_on(device)
    k, v = (normal((num_tokens, KV_HEADS, HEAD_DIM), DTYPE, generator) for _ in range(2))
    q = normal((num_tokens, HEADS, HEAD_DIM), DTYPE, generator) if with_q else None
    num_pages = num_tokens // PAGE
    shape = (num_pages, PAGE, KV_HEADS, HEAD_DIM)
    scale = None if kv_format == "bf16" else torch.full((1,), 0.05, device=device).squeeze()
    cached_k, cached_v = (normal(shape, KV_FORMATS[kv_format], generator) for _ in range(2))
    kv = KVCache(cached_k, cached_v, format=kv_format, k_scale=scale, v_scale=scale)
    table = torch.randperm(num_pages, device=device, generator=generator).int().unsqueeze(0)
    ends = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    batch = Batch(ends, ends[1:], table)
    rotation = RopeTable.make(RopeConfig(HEAD_DIM), device, max(TOKENS)) if with_rope else None

    def ours() -> Callable[[], Outputs]:
        cache, own_q = own_cache(kv), None if q is None else q.clone()

        def call() -> Outputs:
            append_kv.append_kv(k, v, cache, batch, rope=rotation, q=own_q)
            return {"k": cache.k, "v": cache.v} | ({} if own_q is None else {"q": own_q})

        return call

    wanted, rotated = own_cache(kv), None if q is None else q.clone()
    reference_append(k, v, wanted, batch, rotation, rotated, F64)
    expected = {"k": wanted.k, "v": wanted.v} | ({} if rotated is None else {"q": rotated})
    written = append_tolerance(DTYPE, kv_format)
    tolerances = {"k": written if with_rope else EXACT, "v": EXACT, "q": _ROUNDED}
    if kv_format != "bf16":
        tolerances |= {"k": written, "v": written}
    cost = append_kv.append_kv_cost(k, v, kv, batch, rope=rotation, q=q)
    judged = _Judged(expected, tolerances, ours, cost)
    fields: dict[str, Hashable] = {"dtype": DTYPE, "kv_format": kv_format, "page_size": PAGE}
    if with_rope:
        fields |= {"rope": "half", "rope_source": "table"}
    return _problem("append_kv", AppendInputs(k, v, q, kv, batch, rotation), num_tokens, judged, **fields)


@dataclass(frozen=True)
class MergeInputs:
    """o [N, T, H, D] and float32 natural-log lse [N, T, H]."""

    o: Tensor
    lse: Tensor


def _merge(device: torch.device, num_tokens: int) -> Problem:
    generator, num_states = generator_on(device), 4
    o = normal((num_states, num_tokens, HEADS, HEAD_DIM), DTYPE, generator)
    lse = normal((num_states, num_tokens, HEADS), torch.float32, generator)

    def call() -> Outputs:
        merged, log_sum = merge_states.merge_states(o, lse)
        return {"o": merged, "lse": log_sum}

    expected = dict(zip(("o", "lse"), merge(o, lse, torch.float32), strict=True))
    cost = merge_states.merge_states_cost(num_states, num_tokens, HEADS, HEAD_DIM, DTYPE.itemsize)
    judged = _Judged(expected, {"o": _ROUNDED, "lse": ROUNDED[torch.float32]}, lambda: call, cost)
    return _problem("merge_states", MergeInputs(o, lse), num_tokens, judged, dtype=DTYPE, head_dim=HEAD_DIM)


@dataclass(frozen=True)
class CopyInputs:
    """Pages ``sources`` int64 [N] of ``kv`` to pages ``targets`` of it, all different."""

    kv: KVCache
    sources: Tensor
    targets: Tensor


def _copy(device: torch.device, num_tokens: int) -> Problem:
    generator, num_pages = generator_on(device), num_tokens // PAGE
    k, v = (normal((2 * num_pages, PAGE, KV_HEADS, HEAD_DIM), DTYPE, generator) for _ in range(2))
    kv = KVCache(k, v)
    order = torch.randperm(2 * num_pages, device=device, generator=generator)
    sources, targets = order[:num_pages].clone(), order[num_pages:].clone()

    def ours() -> Callable[[], Outputs]:
        own = own_cache(kv)

        def call() -> Outputs:
            copy_pages.copy_pages(own, own, sources, targets)
            return {"k": own.k, "v": own.v}

        return call

    wanted = own_cache(kv)
    for cache in (wanted.k, wanted.v):
        cache[targets] = cache[sources]
    judged = _Judged(
        {"k": wanted.k, "v": wanted.v}, {"k": EXACT, "v": EXACT}, ours, copy_pages.copy_pages_cost(kv, num_pages)
    )
    return _problem("copy_pages", CopyInputs(kv, sources, targets), num_tokens, judged, page_size=PAGE)


def memory_cases() -> Iterator[Case]:
    """All of them; "rope T8192" and the like are the names of the peers' file."""
    for num_tokens in TOKENS:
        made: list[tuple[str, str, Callable[..., Problem]]] = [
            ("rope", "rope T{}", partial(_rope, source="table")),
            ("rope", "rope T{} computed", partial(_rope, source="computed")),
            ("rmsnorm", "rmsnorm T{}", partial(_norm, op="rmsnorm", out_format="same")),
            ("rmsnorm", "rmsnorm T{} fp8", partial(_norm, op="rmsnorm", out_format="fp8_e4m3")),
            ("add_rmsnorm", "add_rmsnorm T{}", partial(_norm, op="add_rmsnorm", out_format="same")),
            ("add_rmsnorm", "add_rmsnorm T{} fp8", partial(_norm, op="add_rmsnorm", out_format="fp8_e4m3")),
            ("silu_mul", "silu_mul T{}", partial(_gate, op="silu_mul")),
            ("gelu_mul", "gelu_mul T{}", partial(_gate, op="gelu_mul")),
            ("merge_states", "merge_states N4 T{}", _merge),
            ("copy_pages", "copy_pages T{}", _copy),
        ]
        formats: tuple[tuple[KVFormat, str], ...] = (("bf16", ""), ("fp8_e4m3", " fp8"))
        for kv_format, suffix in formats:
            for name, with_rope, with_q in (("", False, False), (" rope k", True, False), (" rope q k", True, True)):
                build: Callable[..., Problem] = partial(
                    _append, kv_format=kv_format, with_rope=with_rope, with_q=with_q
                )
                made.append(("append_kv", f"append T{{}}{suffix}{name}", build))
        for op, name, build in made:
            yield Case(op, "memory", name.format(num_tokens), partial(build, num_tokens=num_tokens))
