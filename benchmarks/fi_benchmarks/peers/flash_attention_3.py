"""FlashAttention-3 as vLLM ships it: one extension that registers torch operators and needs no compiler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..attention_inputs import AttentionInputs, int32, offsets
from ..problem import Maker, Outputs, Problem
from . import Peer, PeerOptions

LIBRARY = "_vllm_fa3_C.abi3.so"


def _find(options: PeerOptions) -> str:
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        path = None if options.folder is None else options.folder / LIBRARY
        if path is None or not path.exists():
            raise ImportError(f"{LIBRARY} is not in {options.folder or 'a folder that --peers names'}")
        torch.ops.load_library(str(path))
    return LIBRARY


def _spread(scale: float | Tensor | None, shape: tuple[int, int], q: Tensor) -> Tensor | None:
    """An FP8 tensor's only scale, which make_inputs gives as a float, for each request and head."""
    return None if scale is None else torch.full(shape, float(scale), device=q.device)


def _forward(inputs: AttentionInputs, table: Tensor | None, kv_starts: Tensor | None) -> Tensor:
    """The extension's only entry point, whose arguments are positional."""
    shape, layer = inputs.shape, inputs.layer
    lengths = inputs.batch.kv_lens if table is not None else None
    longest = max(inputs.kv_lens) if table is None else table.shape[1] * (shape.page_size or 1)
    new_kv, rotary, left = (None, None), (None, None, None), -1
    heads = (inputs.batch.size, shape.num_kv_heads)
    descale = tuple(_spread(scale, heads, inputs.q) for scale in (layer.q_scale, inputs.kv.k_scale, inputs.kv.v_scale))
    if shape.window is not None:
        left = shape.window - 1
    right = 0 if shape.causal and shape.window is not None else -1
    sinks = None if layer.sinks is None else layer.sinks.bfloat16()
    found = torch.ops._vllm_fa3_C.fwd(
        *(inputs.q, inputs.kv.k, inputs.kv.v, *new_kv, None, None),
        *(inputs.batch.q_indptr, kv_starts, None, None, lengths, max(inputs.q_lens), longest),
        *(table, None, None, *rotary, *descale, shape.head_dim**-0.5),
        *(shape.causal, left, right, layer.soft_cap or 0.0, True),
        *(None, 0, None, 0, sinks, 1, 0, None),
    )
    out: Tensor = found[0]
    return out


def _attention(problem: Problem) -> Mapping[str, Maker]:
    inputs: AttentionInputs = problem.inputs
    shape = inputs.shape
    mixed = (shape.kv_format != "bf16") != (shape.q_format != "same")  # FP8 keys need FP8 queries
    if shape.alibi or shape.rope is not None or mixed:
        return {}
    starts = None if inputs.batch.table is not None else int32(offsets(inputs.kv_lens), inputs.q.device)

    def call() -> Outputs:
        return {"out": _forward(inputs, inputs.batch.table, starts)}

    return {"fa3": lambda: call}


PEER = Peer("fa3", _find, {"attention": _attention})
