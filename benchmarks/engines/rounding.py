"""How far one layer's results of fi, of vLLM's own kernels and of float64 are apart, on the same inputs. Needs vLLM and a GPU.

usage: python rounding.py [OUT.jsonl]
Norms, activations and rotary embeddings by fi and by vLLM's own ops; then attention of the models of ``models.py`` (size small),
over prompts and over decode steps, by fi, FlashAttention-3 and vLLM's Triton kernel. A row has the root mean square error against
float64, or the mean absolute difference of two implementations and the share of elements in which they differ.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import fi_core as fi
import torch
from accuracy import prompts_of
from fi_adapters.forms import LayerForm, Limits
from fi_adapters.plans import PlanPair
from torch import Tensor

PAGE = 16
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Kind:
    """A layer's attention; ``spread`` is the standard deviation of its inputs, which random weights give the models."""

    name: str
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    num_heads: int = 8
    num_kv_heads: int = 2
    spread: float = 1.9


KINDS = (
    Kind("llama", 128),
    Kind("gemma2", 256, soft_cap=50.0),
    Kind("gemma2 window", 256, window=128, soft_cap=50.0),
    Kind("gpt_oss", 64, sinks=True),
    Kind("gpt_oss window", 64, window=128, sinks=True),
)


@dataclass
class Step:
    """Requests of a step: lengths on both sides, and a cache of pages in random order."""

    q_lens: list[int]
    kv_lens: list[int]
    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor

    def __post_init__(self) -> None:
        starts = torch.tensor([0, *self.q_lens]).cumsum(0)
        self.q_indptr = starts.to(DEVICE, torch.int32)
        self.lens = torch.tensor(self.kv_lens, dtype=torch.int32, device=DEVICE)


Runner = Callable[[Kind, Step], Tensor]
"""Attention by some implementation."""


def step_of(kind: Kind, q_lens: list[int], kv_lens: list[int]) -> Step:
    generator = torch.Generator(DEVICE).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE, generator=generator) * kind.spread).bfloat16()

    width = max(-(-length // PAGE) for length in kv_lens)
    order = torch.randperm(len(kv_lens) * width, device=DEVICE, generator=generator)
    pages = order.to(torch.int32).view(len(kv_lens), width)
    shape = (pages.numel(), PAGE, kind.num_kv_heads, kind.head_dim)
    return Step(
        q_lens, kv_lens, normal(sum(q_lens), kind.num_heads, kind.head_dim), normal(*shape), normal(*shape), pages
    )


def sinks_of(kind: Kind, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in every dtype, those of a model's parameter."""
    return torch.linspace(-1, 3, kind.num_heads, device=DEVICE).bfloat16().to(dtype) if kind.sinks else None


def exact(kind: Kind, step: Step) -> Tensor:
    """In float64, one request at a time."""
    outputs, start = [], 0
    for row, (q_len, kv_len) in enumerate(zip(step.q_lens, step.kv_lens, strict=True)):
        q = step.q[start : start + q_len].double().transpose(0, 1)
        start += q_len
        pages = step.table[row].long()
        keys, values = (
            each[pages]
            .flatten(0, 1)[:kv_len]
            .double()
            .transpose(0, 1)
            .repeat_interleave(q.shape[0] // each.shape[2], 0)
            for each in (step.keys, step.values)
        )
        logits = q @ keys.transpose(1, 2) * kind.head_dim**-0.5
        if kind.soft_cap:
            logits = kind.soft_cap * torch.tanh(logits / kind.soft_cap)
        seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=DEVICE).tril(kv_len - q_len)
        if kind.window:
            seen &= ~torch.ones_like(seen).tril(kv_len - q_len - kind.window)
        logits = logits.masked_fill(~seen, float("-inf"))
        sinks = sinks_of(kind, torch.float64)
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(-1, 1, 1).expand(-1, q_len, 1)], dim=-1)
        outputs.append((logits.softmax(-1)[..., :kv_len] @ values).transpose(0, 1))
    return torch.cat(outputs)


@functools.cache
def plans_of(kind: Kind) -> PlanPair:
    named = {"soft_cap": kind.soft_cap, "sinks": kind.sinks}
    features = frozenset(name for name, value in named.items() if value)
    form = LayerForm(kind.num_heads, kind.num_kv_heads, kind.head_dim, "bf16", features)
    return PlanPair(form.spec(torch.bfloat16, PAGE, (kind.window,)), Limits(64, 16384, 1024), DEVICE)


def by_fi(kind: Kind, step: Step) -> Tensor:
    plan = plans_of(kind).pick(max(step.q_lens))
    plan.update(fi.Batch(step.q_indptr, step.lens, table=step.table))
    arguments = fi.LayerArgs(kind.head_dim**-0.5, kind.soft_cap, kind.window, sinks_of(kind, torch.float32))
    out = torch.full_like(step.q, float("nan"))
    return fi.attention(step.q, fi.KVCache(step.keys, step.values), plan, arguments, out=out)


def by_flash(kind: Kind, step: Step) -> Tensor:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=step.q,
        k=step.keys,
        v=step.values,
        max_seqlen_q=max(step.q_lens),
        cu_seqlens_q=step.q_indptr,
        max_seqlen_k=max(step.kv_lens),
        seqused_k=step.lens,
        softmax_scale=kind.head_dim**-0.5,
        causal=True,
        window_size=[kind.window - 1, 0] if kind.window else [-1, -1],
        softcap=kind.soft_cap or 0.0,
        block_table=step.table,
        fa_version=3,
        s_aux=sinks_of(kind, torch.bfloat16),
    )


def by_triton(kind: Kind, step: Step) -> Tensor:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.full_like(step.q, float("nan"))
    parts = (len(step.q_lens), kind.num_heads, 16)  # of a decode step, as vLLM splits it
    unified_attention(
        q=step.q,
        k=step.keys,
        v=step.values,
        out=out,
        cu_seqlens_q=step.q_indptr,
        max_seqlen_q=max(step.q_lens),
        seqused_k=step.lens,
        max_seqlen_k=max(step.kv_lens),
        softmax_scale=kind.head_dim**-0.5,
        causal=True,
        window_size=(kind.window - 1, 0) if kind.window else (-1, -1),
        block_table=step.table,
        softcap=kind.soft_cap or 0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=len(step.q_lens),
        num_par_softmax_segments=parts[-1],
        softmax_segm_output=torch.empty(*parts, kind.head_dim, device=DEVICE),
        softmax_segm_max=torch.empty(parts, device=DEVICE),
        softmax_segm_expsum=torch.empty(parts, device=DEVICE),
        sinks=sinks_of(kind, torch.bfloat16),
    )
    return out


def report(op: str, case: str, results: dict[str, Tensor], truth: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, found in results.items():
        error = (found.double() - truth).square().mean().sqrt().item()
        rows.append({"op": op, "case": case, "impl": name, "rmse": error})
    for one, two in combinations(results, 2):
        apart = (results[one].double() - results[two].double()).abs()
        share = (apart > 0).double().mean().item()
        rows.append(
            {"op": op, "case": case, "impl": one, "against": two, "mean": apart.mean().item(), "differing": share}
        )
    return rows


def attention_rows() -> list[dict[str, Any]]:
    lengths = [len(prompt) + 64 for prompt in prompts_of(32000)]
    rows = []
    for kind in KINDS:
        for case, q_lens in (("prefill", lengths), ("decode", [1] * len(lengths))):
            step = step_of(kind, q_lens, lengths)
            implementations: dict[str, Runner] = {
                "fi": by_fi,
                "FLASH_ATTN": by_flash,
                "TRITON_ATTN": by_triton,
            }
            results = {name: run(kind, step) for name, run in implementations.items()}
            rows += report("engine_attention", f"{kind.name} {case}", results, exact(kind, step))
    return rows


def layer_rows() -> list[dict[str, Any]]:
    """fi's layers and vLLM's, in the forms that the models use."""
    import vllm._C
    import vllm._C_stable_libtorch  # noqa: F401 (registers the ops)

    own, generator = torch.ops._C, torch.Generator(DEVICE).manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

    rows = []
    x, residual, weight = normal(512, 1024), normal(512, 1024), (1 + 0.1 * normal(1024)).bfloat16()
    for name, factor in (("weights 1", torch.ones_like(weight)), ("weights near 1", weight)):
        theirs = torch.empty_like(x)
        own.rms_norm(theirs, x, factor, 1e-6)
        wide = x.double()
        truth = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * factor.double()
        rows += report("rmsnorm", name, {"fi": fi.rmsnorm(x, factor, 1e-6), "vllm": theirs}, truth)
        theirs, their_sum, our_sum = x.clone(), residual.clone(), residual.clone()
        own.fused_add_rms_norm(theirs, their_sum, factor, 1e-6)
        ours = fi.add_rmsnorm(x.clone(), our_sum, factor, 1e-6)
        wide = x.double() + residual.double()
        truth = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * factor.double()
        rows += report("add_rmsnorm", name, {"fi": ours, "vllm": theirs}, truth)
        rows += report("add_rmsnorm sum", name, {"fi": our_sum, "vllm": their_sum}, wide)
    gates = normal(512, 2 * 2816)
    theirs = torch.empty(512, 2816, dtype=gates.dtype, device=DEVICE)
    own.silu_and_mul(theirs, gates)
    first, second = gates.double().chunk(2, dim=-1)
    results = {"fi": fi.silu_mul(gates), "vllm": theirs}
    rows += report("silu_mul", "", results, first * torch.sigmoid(first) * second)
    return rows + rope_rows(own, normal)


def rope_rows(own: Any, normal: Callable[..., Tensor]) -> list[dict[str, Any]]:
    """The table is bfloat16, as vLLM keeps it; float64 rotates by the same table."""
    config = fi.RopeConfig(128)
    positions = torch.arange(512, device=DEVICE)
    angles = positions.double()[:, None] * config.inv_freq().to(DEVICE).double()[None]
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).bfloat16()
    q, k = normal(512, 8, 128), normal(512, 2, 128)
    their_q, their_k = q.clone().view(512, -1), k.clone().view(512, -1)
    own.rotary_embedding(positions, their_q, their_k, 128, table, True)
    frequencies = config.inv_freq().to(device=DEVICE, dtype=torch.float32)
    our_q, our_k = q.clone(), k.clone()
    fi.rope(our_q, our_k, positions, fi.RopeTable(config, frequencies, table.float()), q_out=our_q, k_out=our_k)
    cos, sin = (part[:, None].double() for part in table.chunk(2, dim=-1))
    first, second = q.double().chunk(2, dim=-1)
    truth = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return report("rope", "", {"fi": our_q, "vllm": their_q.view_as(q)}, truth)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for measure in (layer_rows, attention_rows):
        found = measure()
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
