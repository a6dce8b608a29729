"""Each step's metadata: fi's batch over vLLM's own device tensors, and the plans updated with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fi_core as fi
import torch
from fi_adapters.forms import LayerForm, Limits, is_captured
from fi_adapters.plans import PlanPair, common_prefix, shares_prefixes, update
from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger(__name__)

MIN_PREFIX, MIN_REQUESTS = 256, 8
"""Tokens that requests share, and requests, from which reading the tokens once is worth one more part to merge: vLLM's bounds."""


@dataclass
class FiMetadata(AttentionMetadata):
    """Of one step and one KV group: ``batch`` with the slots of its first ``num_tokens`` tokens (padding included, whose
    slots are negative), and the plan of each form of layer."""

    batch: fi.Batch
    num_tokens: int
    plans: Mapping[LayerForm, fi.Plan]


class FiMetadataBuilder(AttentionMetadataBuilder[FiMetadata]):
    """Builds metadata without a copy to the host: lengths, tables and slots stay where vLLM put them.

    vLLM hands slices of buffers that it keeps, so a captured graph sees the same addresses, and kernels plan on the device:
    any batch can be captured, mixed ones too.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        windows: dict[LayerForm, list[int | None]] = {}
        dtype = vllm_config.model_config.dtype
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).items():
            if getattr(layer, "head_size_v", kv_cache_spec.head_size) != kv_cache_spec.head_size:
                raise NotImplementedError(
                    f"fi-vllm: {name} has V heads of {layer.head_size_v}, K heads of another size"
                )
            windows.setdefault(layer.impl.form_of(dtype), []).append(layer.impl.window)
        # The mode FULL captures one graph for both kinds of step, which holds one plan's kernel.
        one_plan = vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL
        page_size, limits = kv_cache_spec.block_size, limits_of(vllm_config)
        specs = {form: form.spec(dtype, page_size, found, envs.VLLM_BATCH_INVARIANT) for form, found in windows.items()}
        self.shares = self._shares(specs, limits)
        self.pairs = {
            form: PlanPair(spec, limits, device, one_plan, max_prefixes=int(self.shares))
            for form, spec in specs.items()
        }
        self._common: tuple[int, int] | None = None
        # A graph holds the kernels of batches with levels or those of batches without, so all steps of a captured kind have them.
        mode = vllm_config.compilation_config.cudagraph_mode
        self._decode_len = limits.decode_len
        self._has_levels = tuple(
            self.shares and kind == CUDAGraphMode.FULL for kind in (mode.mixed_mode(), mode.decode_mode())
        )
        self._no_prefix = fi.SharedPrefixes(torch.zeros(1, 4, dtype=torch.int32, device=device))

    def _shares(self, specs: Mapping[LayerForm, fi.AttentionSpec], limits: Limits) -> bool:
        """Whether steps name the prefix that all their requests share: where vLLM's cascade is on and fi has the kernels."""
        if self.vllm_config.model_config.disable_cascade_attn:
            return False
        target = fi.target_of(self.device)
        found = all(shares_prefixes(spec, limits, target) for spec in specs.values())
        if not found:
            logger.warning(
                "fi-vllm: no kernel reads a common prefix of %s once; it is read for each request", self.layer_names
            )
        return found

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        captured = is_captured(vllm_config.device_config.device_type)
        return AttentionCGSupport.ALWAYS if captured else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FiMetadata:
        """``fast_build`` has nothing to change: planning is one kernel launch or a few. ``common_prefix_len`` is 0:
        ``use_cascade_attention`` has kept it."""
        step, common, levels = common_attn_metadata, self._common, None
        self._common = None
        if common is not None:
            levels = common_prefix(*common, self.device)
        elif self._has_levels[step.max_query_len <= self._decode_len]:
            levels = self._no_prefix
        if not step.causal:
            raise NotImplementedError("fi-vllm: attention without a causal mask, which some draft models ask for")
        num_tokens = step.num_actual_tokens
        batch = fi.Batch(
            step.query_start_loc,
            step.seq_lens,
            table=step.block_table_tensor,
            slot_mapping=step.slot_mapping[:num_tokens],
            levels=levels,
        )
        return FiMetadata(batch, num_tokens, update(self.pairs, batch, step.max_query_len))

    def use_cascade_attention(self, common_prefix_len: int, query_lens: Any, *args: Any, **kwargs: Any) -> bool:
        """Keep what the requests of the coming step share for ``build``, and answer no: vLLM takes a cascade for other kernels
        that no full CUDA graph holds, while fi plans it as part of any step, captured or not."""
        if self.shares and common_prefix_len >= MIN_PREFIX and len(query_lens) >= MIN_REQUESTS:
            self._common = (len(query_lens), int(common_prefix_len))
        return False


def limits_of(config: VllmConfig) -> Limits:
    """Upper bounds of the engine's steps; with speculation the drafted tokens come on top."""
    scheduler, speculation = config.scheduler_config, config.speculative_config
    drafted = 0
    if speculation is not None and speculation.num_speculative_tokens:
        drafted = speculation.num_speculative_tokens * (2 if speculation.parallel_drafting else 1)
    return Limits(
        max_batch=scheduler.max_num_seqs,
        max_tokens=scheduler.max_num_batched_tokens + drafted * scheduler.max_num_seqs,
        max_kv_len=config.model_config.max_model_len + drafted,
        decode_len=1 + drafted,
    )
