"""Typical calls of the model's operations on random data, through the public functions."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch

from ..contract import EXACT, Tolerance
from ..ops import (
    add_rmsnorm,
    append_kv,
    attention,
    copy_pages,
    find_shared_prefixes,
    gelu_mul,
    merge_states,
    rmsnorm,
    rope,
    silu_mul,
)
from ..ops.cases import normal
from ..ops.quantised_output import OUT_FORMATS
from ..plan import attention_values, plan
from ..records import AttentionSpec, Batch, KVCache
from ..rope import RopeConfig, RopeTable
from ..tolerances import ROUNDED
from .workload import Builder, Outputs, Scale, Workload

_SEED = 20
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 32, 8, 128, 16


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _norm(device: torch.device, scale: Scale) -> Workload:
    generator, size = _generator(), scale.hidden_size
    x = normal((scale.num_tokens, size), scale.dtype, device, generator)
    weight, out = normal((size,), scale.dtype, device, generator), torch.empty_like(x)
    values = {"dtype": scale.dtype, "hidden_size": size, "out_format": "same"}
    cost = rmsnorm.cost(scale.num_tokens, size, scale.dtype)
    case = f"tokens={scale.num_tokens} hidden={size}"
    tolerance = {"out": ROUNDED[scale.dtype]}
    return Workload(case, values, lambda: {"out": rmsnorm.rmsnorm(x, weight, out=out)}, cost, tolerance)


def _add_norm(device: torch.device, scale: Scale, out_format: str) -> Workload:
    generator, size = _generator(), scale.hidden_size
    x = normal((scale.num_tokens, size), scale.dtype, device, generator)
    residual = normal((scale.num_tokens, size), scale.dtype, device, generator)
    out_dtype = OUT_FORMATS[out_format] or scale.dtype
    weight = normal((size,), scale.dtype, device, generator)
    out = torch.empty(x.shape, dtype=out_dtype, device=device)
    values = {"dtype": scale.dtype, "hidden_size": size, "out_format": out_format}
    cost = add_rmsnorm.cost(scale.num_tokens, size, scale.dtype, out_dtype)
    divisor = None if out_format == "same" else torch.full((1,), 0.02, device=device)

    def call() -> Outputs:
        return {"out": add_rmsnorm.add_rmsnorm(x, residual, weight, scale=divisor, out=out), "residual": residual}

    tolerance = {"out": ROUNDED[out_dtype], "residual": EXACT}
    case = f"tokens={scale.num_tokens} hidden={size}" + ("" if out_format == "same" else f" out={out_format}")
    return Workload(case, values, call, cost, tolerance)


def _gate(device: torch.device, scale: Scale, gelu: bool) -> Workload:
    x = normal((scale.num_tokens, 2 * scale.width), scale.dtype, device, _generator())
    out = torch.empty((scale.num_tokens, scale.width), dtype=scale.dtype, device=device)
    values: dict[str, Hashable] = {"dtype": scale.dtype, "width": scale.width}
    case = f"tokens={scale.num_tokens} width={scale.width}"
    tolerance = {"out": ROUNDED[scale.dtype]}
    if gelu:
        cost = gelu_mul.cost(scale.num_tokens, scale.width, scale.dtype)
        values["approximate"] = "tanh"
        return Workload(case, values, lambda: {"out": gelu_mul.gelu_mul(x, out=out)}, cost, tolerance)
    cost = silu_mul.cost(scale.num_tokens, scale.width, scale.dtype)
    return Workload(case, values, lambda: {"out": silu_mul.silu_mul(x, out=out)}, cost, tolerance)


def _rope(device: torch.device, scale: Scale) -> Workload:
    generator = _generator()
    q = normal((scale.num_tokens, _HEADS, _HEAD_DIM), scale.dtype, device, generator)
    k = normal((scale.num_tokens, _KV_HEADS, _HEAD_DIM), scale.dtype, device, generator)
    positions = torch.randint(0, 8192, (scale.num_tokens,), generator=generator).to(device)
    table = RopeTable.make(RopeConfig(_HEAD_DIM, base=500000.0), device, 8192)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)

    def call() -> Outputs:
        rope.rope(q, k, positions, table, q_out=q_out, k_out=k_out)
        return {"q_out": q_out, "k_out": k_out}

    cost = rope.cost(scale.num_tokens, _HEADS + _KV_HEADS, _HEAD_DIM, _HEAD_DIM, scale.dtype, table=True)
    tolerance = {"q_out": ROUNDED[scale.dtype], "k_out": ROUNDED[scale.dtype]}
    case = f"tokens={scale.num_tokens} heads={_HEADS}/{_KV_HEADS} d={_HEAD_DIM}"
    values = {"dtype": scale.dtype, "head_dim": _HEAD_DIM, "rotary_dim": _HEAD_DIM, "pairs": "half", "source": "table"}
    return Workload(case, values, call, cost, tolerance)


def _paged(device: torch.device, scale: Scale, q_lens: list[int], kv_lens: list[int]) -> tuple[KVCache, Batch]:
    """A cache of random pages and a batch whose pages lie in random order."""
    generator = _generator()
    pages = [-(-length // _PAGE) for length in kv_lens]
    order = torch.randperm(sum(pages), generator=generator).to(torch.int32)
    table = torch.zeros((len(pages), max(pages)), dtype=torch.int32)
    start = 0
    for row, count in enumerate(pages):
        table[row, :count] = order[start : start + count]
        start += count
    shape = (sum(pages), _PAGE, _KV_HEADS, _HEAD_DIM)
    cache = KVCache(normal(shape, scale.dtype, device, generator), normal(shape, scale.dtype, device, generator))
    indptr = torch.tensor([0, *q_lens]).cumsum(0).to(device=device, dtype=torch.int32)
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return cache, Batch(indptr, lengths, table.to(device))


def _attention(device: torch.device, scale: Scale, decode: bool) -> Workload:
    count = scale.num_requests if decode else 2
    q_lens = [1 if decode else scale.prompt_len] * count
    kv_lens = [scale.kv_len if decode else scale.prompt_len] * count
    cache, batch = _paged(device, scale, q_lens, kv_lens)
    q = normal((sum(q_lens), _HEADS, _HEAD_DIM), scale.dtype, device, torch.Generator().manual_seed(_SEED + 1))
    spec = AttentionSpec(_HEADS, _KV_HEADS, _HEAD_DIM, dtype=scale.dtype, page_size=_PAGE)
    tokens, longest = sum(q_lens), max(kv_lens)
    made = plan(spec, max_batch=count, max_q_tokens=tokens, max_q_len=max(q_lens), max_kv_len=longest, device=device)
    made.update(batch)
    out = torch.empty_like(q)
    kind = f"decode b={count} kv={kv_lens[0]}" if decode else f"prefill b={count} q={q_lens[0]}"
    return Workload(
        f"{kind} heads={_HEADS}/{_KV_HEADS} d={_HEAD_DIM}",
        attention_values(spec, max(q_lens)),
        lambda: {"out": attention.attention(q, cache, made, out=out)},
        attention.attention_cost(spec, q_lens, kv_lens, None),
        {"out": Tolerance(1e-2, 5e-2) if scale.dtype == torch.bfloat16 else Tolerance(1e-5, 1e-4)},
    )


def _append(device: torch.device, scale: Scale) -> Workload:
    q_lens = [scale.num_tokens // scale.num_requests] * scale.num_requests
    cache, batch = _paged(device, scale, q_lens, [scale.kv_len] * scale.num_requests)
    generator = torch.Generator().manual_seed(_SEED + 1)
    k = normal((sum(q_lens), _KV_HEADS, _HEAD_DIM), scale.dtype, device, generator)
    v = normal(k.shape, scale.dtype, device, generator)

    def call() -> Outputs:
        append_kv.append_kv(k, v, cache, batch)
        return {"k": cache.k, "v": cache.v}

    values = dict(append_kv.OPERATION.typical) | {"dtype": scale.dtype, "kv_format": cache.format}
    cost = append_kv.append_kv_cost(k, v, cache, batch)
    return Workload(f"tokens={sum(q_lens)} kv_heads={_KV_HEADS}", values, call, cost, {"k": EXACT, "v": EXACT})


def _copy(device: torch.device, scale: Scale) -> Workload:
    """Half of a cache's pages to the other half."""
    cache, _ = _paged(device, scale, [1] * scale.num_requests, [scale.kv_len] * scale.num_requests)
    order = torch.randperm(cache.k.shape[0], generator=_generator()).to(device)
    sources, targets = order.view(2, -1).unbind()

    def call() -> Outputs:
        copy_pages.copy_pages(cache, cache, sources, targets)
        return {"k": cache.k, "v": cache.v}

    values = dict(copy_pages.OPERATION.typical) | {"kv_format": cache.format}
    cost = copy_pages.copy_pages_cost(cache, len(sources))
    case = f"pages={len(sources)} page_size={_PAGE} kv_heads={_KV_HEADS}"
    return Workload(case, values, call, cost, {"k": EXACT, "v": EXACT})


def _find(device: torch.device, scale: Scale) -> Workload:
    """Requests of which every four share all pages but the last, and all of them a quarter."""
    num, width = scale.num_requests, max(scale.kv_len // _PAGE, 1)
    request, entry = torch.arange(num, dtype=torch.int32)[:, None], torch.arange(width, dtype=torch.int32)
    group = torch.where(entry < width // 4, 0, torch.where(entry < width - 1, 1 + request // 4, 1 + num + request))
    table = (group * width + entry).to(device)
    lens = torch.full((num,), width * _PAGE, dtype=torch.int32, device=device)
    batch = Batch(torch.arange(num + 1, dtype=torch.int32, device=device), lens, table)
    found = find_shared_prefixes.find_shared_prefixes(batch, _PAGE)

    def call() -> Outputs:
        find_shared_prefixes.find_shared_prefixes(batch, _PAGE, out=found)
        assert found.order is not None
        return {"nodes": found.nodes, "order": found.order}

    values = dict(find_shared_prefixes.OPERATION.typical)
    cost = find_shared_prefixes.find_shared_prefixes_cost(num, num * width)
    return Workload(f"requests={num} entries={width}", values, call, cost, {"nodes": EXACT, "order": EXACT})


def _merge(device: torch.device, scale: Scale) -> Workload:
    generator, num_states = _generator(), 4
    o = normal((num_states, scale.num_tokens, _HEADS, _HEAD_DIM), scale.dtype, device, generator)
    lse = normal(o.shape[:3], torch.float32, device, generator)

    def call() -> Outputs:
        merged, merged_lse = merge_states.merge_states(o, lse)
        return {"o": merged, "lse": merged_lse}

    cost = merge_states.merge_states_cost(num_states, scale.num_tokens, _HEADS, _HEAD_DIM, scale.dtype.itemsize)
    values = {"dtype": scale.dtype, "head_dim": _HEAD_DIM}
    tolerance = {"o": ROUNDED[scale.dtype], "lse": ROUNDED[torch.float32]}
    return Workload(f"states={num_states} tokens={scale.num_tokens} heads={_HEADS}", values, call, cost, tolerance)


MODEL_WORKLOADS: dict[str, tuple[Builder, ...]] = {
    "attention": (partial(_attention, decode=True), partial(_attention, decode=False)),
    "append_kv": (_append,),
    "copy_pages": (_copy,),
    "find_shared_prefixes": (_find,),
    "merge_states": (_merge,),
    "rope": (_rope,),
    "rmsnorm": (_norm,),
    "add_rmsnorm": (partial(_add_norm, out_format="same"), partial(_add_norm, out_format="fp8_e4m3")),
    "silu_mul": (partial(_gate, gelu=False),),
    "gelu_mul": (partial(_gate, gelu=True),),
}
"""Builders of the typical calls of the operations of a model's layers."""
