"""vLLM's norms, gated activations and rotary embeddings on fi, through its registry of out-of-tree custom ops.

vLLM makes an object of these classes wherever a model names theirs. They run where its setting ``custom_ops`` enables the op
(by default where Inductor does not compile the model); elsewhere the base class's native form does.
"""

from __future__ import annotations

from typing import Any

import fi_core as fi
import torch
from torch import Tensor
from vllm import envs
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

Normed = Tensor | tuple[Tensor, Tensor]


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float = 0.0) -> Normed:
    """The norm, or (norm of the sum, sum), both in place as vLLM's own kernels do it."""
    if residual is None:
        return fi.rmsnorm(x, weight, eps, weight_bias=weight_bias)
    return fi.add_rmsnorm(x, residual, weight, eps, weight_bias=weight_bias, out=x), residual


class FiRMSNorm(RMSNorm):
    """Left to the base class: a variance over part of the row, weights of another dtype, and batch-invariant mode."""

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        weight = self.weight.data
        if self.variance_size_override is not None or weight.dtype != x.dtype or envs.VLLM_BATCH_INVARIANT:
            return super().forward_cuda(x, residual)
        return _norm(x, residual, weight, self.variance_epsilon)


class FiGemmaRMSNorm(GemmaRMSNorm):
    """Left to the base class: weights of another dtype, batch-invariant mode, and a residual in float16, which it widens."""

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        weight = self.weight.data
        widens = residual is not None and x.dtype == torch.float16
        if widens or weight.dtype != x.dtype or envs.VLLM_BATCH_INVARIANT:
            return super().forward_cuda(x, residual)
        return _norm(x, residual, weight, self.variance_epsilon, weight_bias=1.0)


class FiSiluAndMul(SiluAndMul):
    def forward_cuda(self, x: Tensor) -> Tensor:
        return fi.silu_mul(x)


class FiGeluAndMul(GeluAndMul):
    def forward_cuda(self, x: Tensor) -> Tensor:
        return fi.gelu_mul(x, self.approximate)


class _Rotary(RotaryEmbedding):
    """Rotates in place by the table that vLLM computed, whatever the scaling: the values are vLLM's, read as float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = self._read() if hasattr(self, "cos_sin_cache") else None

    def forward_cuda(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        table = self._table
        if table is None or table.inv_freq.device != query.device:
            table = self._table = self._read()
        heads = query.view(positions.numel(), -1, self.head_size)
        others = None if key is None else key.view(positions.numel(), -1, self.head_size)
        fi.rope(heads, others, positions.flatten(), table, q_out=heads, k_out=others)
        return query, key

    def _read(self) -> fi.RopeTable:
        config = fi.RopeConfig(self.rotary_dim, pairs="half" if self.is_neox_style else "interleaved")
        cos_sin = self.cos_sin_cache.float().contiguous()
        frequencies = config.inv_freq().to(device=cos_sin.device, dtype=torch.float32)  # not read beside a table
        return fi.RopeTable(config, frequencies, cos_sin)


class FiRotaryEmbedding(_Rotary):
    pass


class FiLinearScalingRotaryEmbedding(_Rotary, LinearScalingRotaryEmbedding):
    pass


class FiLlama3RotaryEmbedding(_Rotary, Llama3RotaryEmbedding):
    pass


class FiYaRNScalingRotaryEmbedding(_Rotary, YaRNScalingRotaryEmbedding):
    pass


REPLACED: dict[type[CustomOp], type[CustomOp]] = {
    RMSNorm: FiRMSNorm,
    GemmaRMSNorm: FiGemmaRMSNorm,
    SiluAndMul: FiSiluAndMul,
    GeluAndMul: FiGeluAndMul,
    RotaryEmbedding: FiRotaryEmbedding,
    LinearScalingRotaryEmbedding: FiLinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding: FiLlama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding: FiYaRNScalingRotaryEmbedding,
}
"""vLLM's class -> ours."""


def install() -> None:
    """Register every class of ``REPLACED`` that no other plugin replaced, under the setting's name of vLLM's own op."""
    for engine_class, ours in REPLACED.items():
        if engine_class.__name__ not in op_registry_oot:
            setting = engine_class.name
            CustomOp.register_oot(ours, name=engine_class.__name__)
            ours.name = setting  # register_oot renames the op, and "+rms_norm" would no longer mean it
