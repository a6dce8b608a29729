"""A plugin for SGLang that stands in for libraries which take too much room on a machine that has little.

Put this folder on PYTHONPATH. SGLang's backend fa3 finds FlashAttention-3 in the library that vLLM ships, which the variable
FI_FA3_LIBRARY names (vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so), instead of in sglang-kernel's, which is 1.8 GB large; and
speculation imports without the packages cutlass and deep_gemm, which only sparse attention calls.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def patch() -> None:
    """The entry point of SGLang."""
    _leave_out("sglang.jit_kernel.dsa.cutedsl_paged_mqa_logits", "CuteDSLPagedMQALogitsRunner", "pick_dsl_expand")
    sparse = _leave_out("sglang.srt.layers.attention.dsa_backend")
    sparse.DeepseekSparseAttnBackend = type("DeepseekSparseAttnBackend", (), {})  # asked for by isinstance
    library = os.environ.get("FI_FA3_LIBRARY")
    if library is None:
        return
    import sgl_kernel

    torch.ops.load_library(library)
    sgl_kernel.flash_ops = _leave_out("sgl_kernel.flash_ops")
    torch.ops.sgl_kernel.fwd = SimpleNamespace(default=_forward)
    torch.ops.sgl_kernel.get_scheduler_metadata = _scheduler_metadata


def _leave_out(module: str, *names: str) -> ModuleType:
    """A module of that name with nothing but ``names``, none of which may be called."""
    found = sys.modules[module] = ModuleType(module)
    for name in names:
        setattr(found, name, None)
    return found


def _forward(*arguments: Any, **named: Any) -> list[torch.Tensor]:
    """sglang-kernel's operator on vLLM's, which has no ``attention_chunk`` (the 28th argument) nor sparse masks, and has
    context parallelism instead."""
    before, chunk, after = arguments[:27], arguments[27], arguments[28:]
    names = ("softcap", "is_rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "sinks")
    given = dict(zip((*names, "sparse_mask_fine", "only_qv"), after, strict=False)) | named
    if chunk or given["sparse_mask_fine"] is not None or given["only_qv"]:
        raise NotImplementedError("vLLM's FlashAttention-3 has no attention_chunk, sparse_mask_fine or only_qv")
    if before[3] is None:  # SGLang gives cu_seqlens_k_new without new keys too
        before = (*before[:9], None, *before[10:])
    return torch.ops._vllm_fa3_C.fwd(*before, *(given[name] for name in names), 1, 0, None)


def _scheduler_metadata(*arguments: Any) -> None:
    """None: each call prepares its own, because vLLM's library lays it out for buffers of another size."""
