"""torch's own kernels, as eager code calls them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from ..memory_cases import CopyInputs, GateInputs, NormInputs
from ..problem import Call, Maker, Outputs, Problem
from ..sampling_cases import SamplingInputs
from . import Peer, PeerOptions


def _find(options: PeerOptions) -> str:
    return str(torch.__version__)


def _norm(problem: Problem) -> Mapping[str, Maker]:
    inputs: NormInputs = problem.inputs
    stream = inputs.residual
    if inputs.scale is not None:
        return {}

    def plain() -> Outputs:
        return {"out": functional.rms_norm(inputs.x, inputs.weight.shape, inputs.weight, inputs.eps)}

    def make_added() -> Call:
        assert stream is not None
        residual = stream.clone()

        def call() -> Outputs:
            residual.add_(inputs.x)
            out = functional.rms_norm(residual, inputs.weight.shape, inputs.weight, inputs.eps)
            return {"out": out, "residual": residual}

        return call

    return {"torch": (lambda: plain) if stream is None else make_added}


def _silu(problem: Problem) -> Mapping[str, Maker]:
    inputs: GateInputs = problem.inputs
    gate, up = inputs.x.chunk(2, dim=-1)
    return {"torch": lambda: lambda: {"out": functional.silu(gate) * up}}


def _gelu(problem: Problem) -> Mapping[str, Maker]:
    inputs: GateInputs = problem.inputs
    gate, up = inputs.x.chunk(2, dim=-1)
    return {"torch": lambda: lambda: {"out": functional.gelu(gate, approximate="tanh") * up}}


def _copy(problem: Problem) -> Mapping[str, Maker]:
    inputs: CopyInputs = problem.inputs

    def make() -> Call:
        caches = {"k": inputs.kv.k.clone(), "v": inputs.kv.v.clone()}

        def call() -> Outputs:
            for cache in caches.values():
                cache[inputs.targets] = cache[inputs.sources]
            return caches

        return call

    return {"torch": make}


def _sample(problem: Problem) -> Mapping[str, Maker]:
    inputs: SamplingInputs = problem.inputs
    if inputs.task != "plain":
        return {}
    return {"torch": lambda: lambda: {"drawn": torch.multinomial(torch.softmax(inputs.logits, -1), 1)}}


def _top_k(problem: Problem) -> Mapping[str, Maker]:
    inputs: SamplingInputs = problem.inputs
    return {"torch": lambda: lambda: {"values": torch.topk(inputs.logits, inputs.k).values}}


def _logprobs(problem: Problem) -> Mapping[str, Maker]:
    inputs: SamplingInputs = problem.inputs

    return {"torch": lambda: lambda: {"values": torch.log_softmax(inputs.logits, -1).topk(inputs.k).values}}


PEER = Peer(
    "torch",
    _find,
    {
        "rmsnorm": _norm,
        "add_rmsnorm": _norm,
        "silu_mul": _silu,
        "gelu_mul": _gelu,
        "copy_pages": _copy,
        "sample": _sample,
        "top_k": _top_k,
        "logprobs": _logprobs,
    },
)
