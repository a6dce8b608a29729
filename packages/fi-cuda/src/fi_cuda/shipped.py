"""The kernels of common models, which are built ahead of time and checked without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .kernels.append_kv import AppendShape, spec_for
from .kernels.copy_pages import CopyPagesSpec
from .kernels.gated_activation import SILU, GatedActivationSpec
from .kernels.merge_states import MergeStatesSpec
from .kernels.rmsnorm import RmsNormSpec
from .kernels.rope import spec_for as rope_spec_for
from .spec import KernelSpec

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Element types and the KV formats that store them unchanged."""

VECTOR_BYTES = 16
"""What base addresses and strides of these models' tensors align to."""

PAGE_SIZE = 16


@dataclass(frozen=True)
class ModelShape:
    """The dims that kernels see: of the residual stream, of the MLP, of attention."""

    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_norm: bool = False


MODELS = {
    "llama-3.2-1b": ModelShape(2048, 8192, 32, 8, 64),
    "llama-3.2-3b": ModelShape(3072, 8192, 24, 8, 128),
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 8, 128),
    "llama-3.1-70b": ModelShape(8192, 28672, 64, 8, 128),
    "qwen2.5-0.5b": ModelShape(896, 4864, 14, 2, 64),
    "qwen2.5-7b": ModelShape(3584, 18944, 28, 4, 128),
    "qwen3-0.6b": ModelShape(1024, 3072, 16, 8, 128, head_norm=True),
    "qwen3-8b": ModelShape(4096, 12288, 32, 8, 128, head_norm=True),
    "qwen3-32b": ModelShape(5120, 25600, 64, 8, 128, head_norm=True),
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 64),
    "smollm2-1.7b": ModelShape(2048, 8192, 32, 32, 64),
}


def shipped_specs() -> list[KernelSpec]:
    """Every spec once, in a fixed order."""
    found: dict[KernelSpec, None] = {}
    for model in MODELS.values():
        for dtype in DTYPES:
            found.update(dict.fromkeys(_specs_of(model, dtype)))
    # Pages of every model are copied by the same kernels.
    found.update(dict.fromkeys(CopyPagesSpec(index, VECTOR_BYTES) for index in (torch.int32, torch.int64)))
    return list(found)


def _specs_of(model: ModelShape, dtype: torch.dtype) -> Iterator[KernelSpec]:
    """Append: K and V alone through slots, as for engines that rotate by themselves; and with RoPE through a table."""
    yield RmsNormSpec(dtype, model.hidden_size, VECTOR_BYTES, add=False)
    yield RmsNormSpec(dtype, model.hidden_size, VECTOR_BYTES, add=True)
    if model.head_norm:
        yield RmsNormSpec(dtype, model.head_dim, VECTOR_BYTES, add=False)
    yield GatedActivationSpec(dtype, model.intermediate_size, VECTOR_BYTES, SILU)
    yield MergeStatesSpec(dtype, model.head_dim, VECTOR_BYTES)
    for table in (False, True):
        dims = (model.head_dim, model.head_dim, VECTOR_BYTES)
        for few_tokens in (False, True):
            yield rope_spec_for(dtype, torch.int64, dims, "half", table, few_tokens)
    for kv_format in (DTYPES[dtype], "fp8_e4m3"):
        plain = AppendShape(
            dtype=dtype,
            kv_format=kv_format,
            head_dim=model.head_dim,
            head_dim_vo=model.head_dim,
            page_size=PAGE_SIZE,
            addressing="slots",
            rotary_dim=0,
            pairs="none",
            table=False,
            num_q_heads=0,
            num_kv_heads=model.num_kv_heads,
            vector=VECTOR_BYTES,
            stored_vector=VECTOR_BYTES,
        )
        yield spec_for(plain)
        yield spec_for(plain._replace(few_tokens=True))
        rotated = plain._replace(
            addressing="dense", rotary_dim=model.head_dim, pairs="half", num_q_heads=model.num_q_heads
        )
        yield spec_for(rotated)
        yield spec_for(rotated._replace(table=True))
