"""The attention backend that SGLang's registry makes for the name ``fi``."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import fi_core as fi
from fi_adapters.forms import LayerForm, Limits, is_captured
from fi_adapters.plans import PlanPair, finds_prefixes, shares_prefixes
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor

from .layers import BoundLayer, geometry_of, window_of, windows_of
from .steps import MAX_DEPTH, MAX_PREFIXES, MAX_REQUESTS, StepBuffers

logger = logging.getLogger(__name__)

_CHAINS = (None, "EAGLE", "EAGLE3", "STANDALONE")
"""Speculative algorithms that verify a chain of tokens where ``speculative_eagle_topk`` is 1."""

_DRAFT_ELSEWHERE = "a draft model runs with speculative_draft_attention_backend='triton'"


class FiAttnBackend(AttentionBackend):
    """Decoder attention of fi over SGLang's pool and its request-to-token map.

    Decode and verification are planned inside the graph: filling the buffers, finding what requests share and planning are
    kernels on the device, recorded once and replayed with it, so a steady decode step runs none of this Python. Other steps
    are planned before they run, and each of their requests reads its own tokens.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        """``runner``: SGLang's ModelRunner. Raises NotImplementedError for what is not served, with the option to change."""
        super().__init__()
        check_engine_options(runner)
        self.pool = runner.token_to_kv_pool
        self.dtype = runner.dtype
        self.device = runner.req_to_token_pool.req_to_token.device
        self.batch_invariant = runner.server_args.enable_deterministic_inference
        self.limits = limits_of(runner)
        self.buffers = StepBuffers(runner.req_to_token_pool.req_to_token, self.limits.max_batch)
        modules = runner.model.modules()
        self.windows = windows_of(module for module in modules if isinstance(module, RadixAttention))
        self.pairs: dict[LayerForm, PlanPair] = {}
        self.layers: dict[int, BoundLayer] = {}
        self.batch: fi.Batch | None = None
        self.sharing: fi.Batch | None = None  # the same with its prefixes, where they were looked for
        self.longest = 0
        self.looks = _may_look(runner) and finds_prefixes(fi.target_of(self.device), MAX_DEPTH)
        if not self.looks:
            logger.info(
                "fi: each request reads its own prefix; shared ones are read once with --disable-overlap-schedule or speculation,"
                " a radix cache, and without deterministic inference"
            )

    # SGLang's contract of a step

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a step of prompts, from lengths on the device; the host knows only how many tokens it has."""
        mode = forward_batch.forward_mode
        if _is_uniform(mode) or mode.is_idle():
            return
        if not mode.is_extend() or mode.is_dllm_extend():
            raise NotImplementedError(f"fi-sglang: a step of mode {mode.name}; {_DRAFT_ELSEWHERE}")
        slots = forward_batch.out_cache_loc
        if slots.shape[0] > self.limits.max_tokens:
            raise fi.CapacityError("out_cache_loc", f"at most {self.limits.max_tokens} tokens", slots.shape[0])
        self._plan(
            self.buffers.ragged(
                forward_batch.seq_lens, forward_batch.req_pool_indices, slots, forward_batch.extend_seq_lens
            ),
            self.limits.max_tokens,
        )

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Plan a step of decode or verification, whose requests all have equally many new tokens."""
        mode = forward_batch.forward_mode
        if not _is_uniform(mode):
            return
        num_new, added = 1, 0
        if mode.is_target_verify():  # seq_lens are those before the drafted tokens
            num_new = added = int(forward_batch.spec_info.draft_token_num)
        elif forward_batch.spec_info is not None and getattr(forward_batch.spec_info, "kv_indptr", None) is not None:
            raise NotImplementedError(f"fi-sglang: a step of a draft model; {_DRAFT_ELSEWHERE}")
        batch = self.buffers.uniform(
            forward_batch.seq_lens, forward_batch.req_pool_indices, forward_batch.out_cache_loc, num_new, added
        )
        self._plan(batch, num_new, self.looks)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Everything that graphs read is there already; raises where replays must not be (FI_SHADOW, the reference)."""
        if not is_captured(self.device.type):
            raise NotImplementedError(
                "fi-sglang: FI_SHADOW compares calls, and the reference reads lengths on the host, which no CUDA graph does: "
                "start with disable_cuda_graph=True"
            )
        if max_bs > self.buffers.max_batch:
            raise fi.CapacityError("max_bs", f"at most {self.buffers.max_batch} requests", max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1  # padding reads the first row of the map, which SGLang keeps for it

    # the layers

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq * D] (or with heads apart), k and v [T, Hkv, D] or None where the cache has them; returns [T, Hq * Dv]."""
        assert self.batch is not None, "SGLang plans a step before its layers run"
        bound = self._bind(layer, sinks)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if save_kv_cache and k is not None and v is not None:
            self._append(k, v, layer, bound)
        plan, batch = self._planned(self._pair(bound, layer))
        if plan.batch is not batch:  # a form of layer that is met for the first time
            plan.update(batch)
        given = getattr(forward_batch, "_attn_output", None)
        out = None if given is None else given.view(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        out = fi.attention(q, bound.cache, plan, bound.arguments, out=out)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    forward_decode = forward_extend
    """A decode step is an extend step with one token a request."""

    def _append(self, k: Tensor, v: Tensor, layer: Any, bound: BoundLayer) -> None:
        """Write the step's keys and values to their slots."""
        batch = self.batch
        assert batch is not None and batch.slot_mapping is not None
        num_tokens = batch.slot_mapping.shape[0]
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)[:num_tokens]
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)[:num_tokens]
        if k.shape[0] < num_tokens:  # a padded step of which SGLang passes the real tokens
            batch = replace(batch, slot_mapping=batch.slot_mapping[: k.shape[0]])
        fi.append_kv(k, v, bound.cache, batch)

    def _plan(self, batch: fi.Batch, longest: int, looks: bool = False) -> None:
        self.batch, self.longest = batch, longest
        # No form of layer is known before the first step has run, and then some may share.
        may_share = looks and (not self.pairs or any(pair.shared for pair in self.pairs.values()))
        self.sharing = self.buffers.sharing(batch) if may_share else None
        for pair in self.pairs.values():
            plan, its_batch = self._planned(pair)
            plan.update(its_batch)

    def _planned(self, pair: PlanPair) -> tuple[fi.Plan, fi.Batch]:
        """The plan of a form of layer for the present step, and the batch that it is updated with."""
        assert self.batch is not None
        if pair.shared is not None and self.sharing is not None:
            return pair.shared, self.sharing
        return pair.pick(self.longest), self.batch

    def _bind(self, layer: Any, sinks: Tensor | None) -> BoundLayer:
        """The layer's record. Asking the pool also waits for a layer whose cache comes back from the host."""
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        bound = self.layers.get(layer.layer_id)
        if bound is None or bound.cache.k.data_ptr() != keys.data_ptr():
            bound = self.layers[layer.layer_id] = BoundLayer.of(layer, keys, values, sinks)
        bound.follow(sinks)
        return bound

    def _pair(self, bound: BoundLayer, layer: Any) -> PlanPair:
        """The plans of the layer's form, made when it is first met: SGLang runs every graph's step before it captures."""
        pair = self.pairs.get(bound.form)
        if pair is None:
            windows = self.windows.get(geometry_of(layer), [window_of(layer)])
            spec = bound.form.spec(self.dtype, 1, windows, self.batch_invariant)
            shared = self._shared_capacity(spec)
            pair = self.pairs[bound.form] = PlanPair(spec, self.limits, self.device, shared=shared)
        return pair

    def _shared_capacity(self, spec: fi.AttentionSpec) -> fi.Capacity | None:
        """Of the plan for decode steps whose requests share prefixes; None where they are not looked for, or no kernel of the
        backend that serves other steps reads them once."""
        if not self.looks or not shares_prefixes(spec, self.limits, fi.target_of(self.device), steps=(True,)):
            return None
        few = replace(self.limits, max_batch=min(self.limits.max_batch, MAX_REQUESTS))
        return few.capacity(True, MAX_PREFIXES, MAX_DEPTH)


def _is_uniform(mode: Any) -> bool:
    return bool(mode.is_decode() or mode.is_target_verify())


def _may_look(runner: Any) -> bool:
    """Whether steps may find shared prefixes in the map as a graph is replayed.

    With the overlap scheduler SGLang holds that a replayed step of decode has read the map before the replay begins, so that
    the row of a request which ended a step ago may be written while its last step still runs. Others would then read their
    prefix through that row. Speculation has it wait for the whole step.
    """
    options = runner.server_args
    overlapped = not options.disable_overlap_schedule and options.speculative_algorithm is None
    return not (options.disable_radix_cache or options.enable_deterministic_inference or overlapped)


def limits_of(runner: Any) -> Limits:
    """Upper bounds of the engine's steps: a prompt that is not cut into chunks is one step."""
    options, pool = runner.server_args, runner.req_to_token_pool
    drafted = options.speculative_num_draft_tokens or 0
    max_batch = pool.size + 1
    longest_prefill = max(
        options.chunked_prefill_size or 0, options.max_prefill_tokens or 0, runner.model_config.context_len
    )
    return Limits(
        max_batch=max_batch,
        max_tokens=longest_prefill + max_batch * max(1, drafted),
        max_kv_len=pool.req_to_token.shape[1],
        decode_len=max(1, drafted),
    )


def check_engine_options(runner: Any) -> None:
    """Raise NotImplementedError for what the engine was asked for and fi does not serve in it."""
    options, pool = runner.server_args, runner.token_to_kv_pool
    layout = getattr(pool, "kv_cache_layout", None)
    for is_asked, what in (
        (
            runner.model_config.attention_arch == AttentionArch.MLA,
            "latent attention (MLA): use another attention backend",
        ),
        (runner.model_config.is_encoder_decoder, "encoder-decoder models: use another attention backend"),
        (
            type(pool) is not MHATokenToKVPool,
            f"a KV pool of type {type(pool).__name__} (disable_hybrid_swa_memory=True keeps window layers in the common pool)",
        ),
        (layout not in (None, "nhd"), f"the pool layout {layout}"),
        (getattr(runner, "dcp_size", 1) > 1, "decode context parallelism"),
        (options.speculative_algorithm not in _CHAINS, f"speculation by {options.speculative_algorithm}"),
        ((options.speculative_eagle_topk or 1) > 1, "draft trees: pass speculative_eagle_topk=1"),
    ):
        if is_asked:
            raise NotImplementedError(f"fi-sglang: {what}")
