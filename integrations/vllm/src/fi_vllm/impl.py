"""One layer's attention: K and V into the cache, then fi's attention into vLLM's output."""

from __future__ import annotations

from typing import Any

import fi_core as fi
import torch
from fi_adapters.forms import LayerForm, kv_format_of
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .metadata import FiMetadata


class FiImpl(AttentionImpl[FiMetadata]):
    """``form_of`` and ``window`` say which plan the layer uses and what it picks in it. Whatever vLLM asks for beyond the
    arguments that are named here is refused by Python."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"fi-vllm: attention of type {attn_type}; decoder attention is served")
        if self.total_cp_world_size > 1:
            raise NotImplementedError("fi-vllm: context parallelism (a KV cache spread over ranks)")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.window, self.kv_cache_dtype = float(scale), sliding_window, kv_cache_dtype
        self.soft_cap = logits_soft_cap or None  # 0 is vLLM's word for none
        self.sinks = sinks
        # Layers are made under vLLM's default device, which is the model's.
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.writes_kv = kv_sharing_target_layer_name is None
        asked = {"soft_cap": self.soft_cap, "sinks": sinks, "alibi": self.slopes}
        self.features = frozenset(name for name, value in asked.items() if value is not None)
        # vLLM quantises the queries by the layer's own scale before it calls ``forward``, where this says so.
        self.supports_quant_query_input = rounds_queries(kv_cache_dtype)
        self.form: LayerForm | None = None
        self._read_sinks: Tensor | None = None
        self._arguments: fi.LayerArgs | None = None
        self._memory: Tensor | None = None
        self._cache: fi.KVCache | None = None

    def form_of(self, dtype: torch.dtype) -> LayerForm:
        """The layer's form in a model of ``dtype``; the metadata's plans are found by it."""
        kv_format = kv_format_of(self.kv_cache_dtype, dtype)
        self.form = LayerForm(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            kv_format,
            self.features,
            q_format="fp8_e4m3" if self.supports_quant_query_input else "same",
        )
        return self.form

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the sinks as they were loaded; vLLM calls this after each loading of weights. The tensor that kernels read stays
        the same, for graphs that were captured before."""
        if self.sinks is None:
            return
        if self._read_sinks is None:
            self._read_sinks = torch.empty(self.num_heads, dtype=torch.float32, device=self.sinks.device)
        self._read_sinks.copy_(self.sinks.detach())

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: FiMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [T, Hq, D], FP8 where ``supports_quant_query_input``; key and value [T, Hkv, D], None where another layer wrote
        them; output [T, Hq, D], whose rows past the batch's tokens are left alone. T may exceed the batch's tokens. In the
        profiling run, without metadata, the output is 0."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fi-vllm: attention with a quantised output")
        if attn_metadata is None:
            return output.fill_(0)
        cache = self._cache_in(layer, kv_cache)
        if self.writes_kv and key is not None and value is not None:
            num_tokens = attn_metadata.num_tokens
            fi.append_kv(key[:num_tokens], value[:num_tokens], cache, attn_metadata.batch)
        plan = attn_metadata.plans[self.form or self.form_of(query.dtype)]
        if plan.batch is not attn_metadata.batch:  # another step was planned since, such as a draft model's
            plan.update(attn_metadata.batch)
        fi.attention(query, cache, plan, self._layer_arguments(layer), out=output)
        return output

    def _layer_arguments(self, layer: Any) -> fi.LayerArgs:
        """Made anew where a model changed the scale, as those that vLLM runs from transformers do."""
        found = self._arguments
        if found is None or found.scale != self.scale:
            if self.sinks is not None and self._read_sinks is None:
                self.process_weights_after_loading(self.sinks.dtype)
            q_scale = layer._q_scale if self.supports_quant_query_input else None
            found = fi.LayerArgs(self.scale, self.soft_cap, self.window, self._read_sinks, self.slopes, q_scale=q_scale)
            self._arguments = found
        return found

    def _cache_in(self, layer: Any, memory: Tensor) -> fi.KVCache:
        """K and V in ``memory`` [pages, 2, tokens, Hkv, D]; FP8 arrives as bytes, its scales are the layer's."""
        if self._cache is None or self._memory is not memory:
            kv_format = kv_format_of(self.kv_cache_dtype, memory.dtype)
            scales = (layer._k_scale, layer._v_scale) if kv_format.startswith("fp8") else (None, None)
            self._cache = fi.KVCache(memory[:, 0], memory[:, 1], "NHD", kv_format, *scales)
            self._memory = memory
        return self._cache


def rounds_queries(kv_cache_dtype: str) -> bool:
    """Whether attention takes its queries in FP8: beside a cache in e4m3, where vLLM's option asks for it."""
    asked = get_current_vllm_config().attention_config.use_prefill_query_quantization
    return asked and kv_cache_dtype in ("fp8", "fp8_e4m3")
