"""cuDNN's and torch's own attention through scaled_dot_product_attention: batches of equal lengths, K and V not paged; of pages
cuDNN's by its Python package nvidia-cudnn-frontend, as torch has no way to name a page table."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..attention_inputs import AttentionInputs
from ..problem import Call, Maker, Outputs, Problem
from . import Peer, PeerOptions, add_folder


def _find(options: PeerOptions) -> str:
    if not torch.backends.cudnn.is_available():
        raise ImportError("this torch has no cuDNN")
    if options.folder is not None:
        add_folder(options.folder)
    return str(torch.backends.cudnn.version())


def _paged(inputs: AttentionInputs) -> Maker:
    """A graph of one operation, for requests of one length; K, V and Q in place, by their strides."""

    def make() -> Call:
        cudnn: Any = importlib.import_module("cudnn")
        shape, device, table = inputs.shape, inputs.q.device, inputs.batch.table
        assert table is not None
        count, q_len, kv_len = len(inputs.q_lens), inputs.q_lens[0], inputs.kv_lens[0]
        out = torch.empty_like(inputs.q)
        heads_first = [tensor.view(count, q_len, *tensor.shape[1:]).transpose(1, 2) for tensor in (inputs.q, out)]
        pages = [tensor.transpose(1, 2) for tensor in (inputs.kv.k, inputs.kv.v)]
        lengths = [torch.full((count, 1, 1, 1), length, dtype=torch.int32, device=device) for length in (q_len, kv_len)]
        tensors = [heads_first[0], *pages, table.view(count, 1, -1, 1), *lengths]
        handle = cudnn.create_handle()
        types = cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle,
        )
        q, k, v, pages_of, q_lens, kv_lens = names = [graph.tensor_like(tensor) for tensor in tensors]
        mask = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
        result, _ = graph.sdpa(
            **{"name": "sdpa", "q": q, "k": k, "v": v, "generate_stats": False, "attn_scale": shape.head_dim**-0.5},
            **{"use_padding_mask": True, "seq_len_q": q_lens, "seq_len_kv": kv_lens},
            **{"paged_attention_k_table": pages_of, "paged_attention_v_table": pages_of},
            paged_attention_max_seq_len_kv=kv_len,
            **(mask if shape.causal else {}),
        )
        result.set_output(True).set_dim(list(heads_first[1].shape)).set_stride(list(heads_first[1].stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)
        given = {**dict(zip(names, tensors, strict=True)), result: heads_first[1]}

        def call() -> Outputs:
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute(given, workspace, handle=handle)
            return {"out": out}

        return call

    return make


def _attention(problem: Problem) -> Mapping[str, Maker]:
    inputs: AttentionInputs = problem.inputs
    shape = inputs.shape
    plain = not (shape.window or shape.soft_cap or shape.sinks or shape.alibi or shape.rope)
    if shape.page_size is not None:
        equal = len(set(inputs.q_lens)) == len(set(inputs.kv_lens)) == 1
        usable = plain and equal and shape.kv_format == "bf16" and shape.q_format == "same" and not inputs.is_decode
        return {"cudnn": _paged(inputs)} if usable and importlib.util.find_spec("cudnn") else {}
    # is_causal is top-left aligned: the same only where queries and keys are equally many.
    if not plain or len(set(inputs.kv_lens)) > 1 or inputs.q_lens != inputs.kv_lens:
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
