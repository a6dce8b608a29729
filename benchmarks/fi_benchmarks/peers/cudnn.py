"""cuDNN's and torch's own attention through scaled_dot_product_attention: batches of equal lengths, K and V not paged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..attention_inputs import AttentionInputs
from ..problem import Maker, Outputs, Problem
from . import Peer, PeerOptions


def _find(options: PeerOptions) -> str:
    if not torch.backends.cudnn.is_available():
        raise ImportError("this torch has no cuDNN")
    return str(torch.backends.cudnn.version())


def _attention(problem: Problem) -> Mapping[str, Maker]:
    inputs: AttentionInputs = problem.inputs
    shape = inputs.shape
    plain = not (shape.window or shape.soft_cap or shape.sinks or shape.alibi or shape.rope)
    # is_causal is top-left aligned: the same only where queries and keys are equally many.
    if shape.page_size is not None or not plain or len(set(inputs.kv_lens)) > 1 or inputs.q_lens != inputs.kv_lens:
        return {}
    size = (len(inputs.q_lens), inputs.q_lens[0])
    q, k, v = (tensor.view(*size, *tensor.shape[1:]).transpose(1, 2) for tensor in (inputs.q, inputs.kv.k, inputs.kv.v))

    def maker(backend: SDPBackend) -> Maker:
        def call() -> Outputs:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=True)
            return {"out": out.transpose(1, 2).reshape(inputs.q.shape)}

        return lambda: call

    return {"cudnn": maker(SDPBackend.CUDNN_ATTENTION), "torch-fa2": maker(SDPBackend.FLASH_ATTENTION)}


PEER = Peer("cudnn", _find, {"attention": _attention})
