"""FlashInfer. Its modules are compiled on first use, which takes minutes: those already compiled are used, the others only
where the options say so."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ..attention_inputs import AttentionInputs, int32, offsets
from ..memory_cases import AppendInputs, GateInputs, MergeInputs, NormInputs, RopeInputs, own_cache
from ..prefix_cases import PrefixInputs
from ..problem import Call, Maker, Outputs, Problem
from ..sampling_cases import MIN_P, TOP_K, TOP_P, SamplingInputs
from ..speculation_cases import DraftInputs
from . import Peer, PeerOptions, add_folder

_WORKSPACE_BYTES = 512 << 20
LN2 = math.log(2.0)


class NotCompiledError(RuntimeError):
    """A module that would have to be compiled first."""


def _find(options: PeerOptions) -> str:
    if options.folder is not None:
        add_folder(options.folder)
        if (options.folder / "stubs.py").exists():
            importlib.import_module("stubs")  # stands in for FlashInfer's imports that serve other GPUs
            # By default its norms come from a package that is among them.
            os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    flashinfer = _flashinfer()
    spec_class = importlib.import_module("flashinfer.jit.core").JitSpecNvcc
    compile_module = spec_class.build

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self.jit_library_path.exists():
            return
        if not options.compile:
            raise NotCompiledError(f"{self.name} is not compiled (--compile-peers compiles what is missing)")
        compile_module(self, *arguments, **keywords)

    spec_class.build = build
    return str(flashinfer.__version__)


def _flashinfer() -> ModuleType:
    return importlib.import_module("flashinfer")


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _options(inputs: AttentionInputs, causal: bool) -> dict[str, Any]:
    shape, layer = inputs.shape, inputs.layer
    options: dict[str, Any] = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.kv.k.dtype}
    options |= {"window_left": -1 if shape.window is None else shape.window - 1}
    options |= {"logits_soft_cap": layer.soft_cap} if layer.soft_cap else {}
    return options | ({"causal": shape.causal} if causal else {})


def _scales(inputs: AttentionInputs) -> dict[str, Any]:
    return {} if inputs.kv.k_scale is None else {"k_scale": inputs.kv.k_scale, "v_scale": inputs.kv.v_scale}


def _paged(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """indptr, page ids and length of the last page, as FlashInfer names a batch's pages (on the host where it plans)."""
    page_size = inputs.shape.page_size or 1
    last = [(length - 1) % page_size + 1 for length in inputs.kv_lens]
    cpu = torch.device("cpu")
    assert inputs.pages is not None
    return int32(offsets(inputs.num_pages), cpu), inputs.pages, int32(last, cpu)


def _decode(inputs: AttentionInputs, tensor_cores: bool) -> Maker:
    def make() -> Call:
        shape = inputs.shape
        wrapper = _flashinfer().BatchDecodeWithPagedKVCacheWrapper(
            _workspace(inputs.q.device), "NHD", use_tensor_cores=tensor_cores, backend="fa2"
        )
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
        wrapper.plan(*_paged(inputs), *heads, **_options(inputs, causal=False))
        cache_pair, scales = (inputs.kv.k, inputs.kv.v), _scales(inputs)
        return lambda: {"out": wrapper.run(inputs.q, cache_pair, **scales)}

    return make


def _prefill(inputs: AttentionInputs, backend: str) -> Maker:
    def make() -> Call:
        shape, flashinfer = inputs.shape, _flashinfer()
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)
        options, indptr = _options(inputs, causal=True), inputs.batch.q_indptr
        if shape.page_size is None:
            ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(indptr.device), "NHD", backend=backend)
            ragged.plan(indptr, int32(offsets(inputs.kv_lens), indptr.device), *heads, **options)
            return lambda: {"out": ragged.run(inputs.q, inputs.kv.k, inputs.kv.v)}
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(indptr.device), "NHD", backend=backend)
        pages = [part.to(indptr.device) for part in _paged(inputs)]
        wrapper.plan(indptr, *pages, *heads, shape.page_size, **options)
        cache_pair, scales = (inputs.kv.k, inputs.kv.v), _scales(inputs)
        return lambda: {"out": wrapper.run(inputs.q, cache_pair, **scales)}

    return make


def _holistic(inputs: AttentionInputs) -> Maker:
    def make() -> Call:
        shape, device = inputs.shape, inputs.q.device
        wrapper = _flashinfer().BatchAttention("NHD")
        indptr, pages, _ = _paged(inputs)
        heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim, shape.page_size)
        dtypes = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.kv.k.dtype}
        wrapper.plan(
            inputs.batch.q_indptr, indptr.to(device), pages, inputs.batch.kv_lens, *heads, causal=shape.causal, **dtypes
        )
        return lambda: {"out": wrapper.run(inputs.q, (inputs.kv.k, inputs.kv.v))[0]}

    return make


def _cascade(inputs: PrefixInputs, backend: str | None = None) -> Maker:
    """``backend``: of the wrappers of its levels, which it takes no argument for; None: as FlashInfer chooses."""

    def make() -> Call:
        shape, tree, device = inputs.shape, inputs.tree, inputs.q.device
        levels = [*tree.levels, (1, tree.suffix)]
        wrapper = _flashinfer().MultiLevelCascadeAttentionWrapper(len(levels), _workspace(device), "NHD")
        for level in wrapper._batch_prefill_wrappers if backend else ():
            level._backend = backend
        size = shape.page_size or 1
        counts = [-(-tokens // size) for _, tokens in levels]
        groups = [tree.count // members for members, _ in levels]
        wrapper.plan(
            [int32(range(0, tree.count + 1, members), device) * tree.q_len for members, _ in levels],
            [int32(range(0, group * count + 1, count), device) for group, count in zip(groups, counts, strict=True)],
            list(inputs.level_pages),
            [
                int32([(tokens - 1) % size + 1] * group, device)
                for group, (_, tokens) in zip(groups, levels, strict=True)
            ],
            *(shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, size),
            causal=tree.q_len > 1,
            q_data_type=inputs.q.dtype,
        )
        cache_pair = (inputs.kv.k, inputs.kv.v)
        return lambda: {"out": wrapper.run(inputs.q, cache_pair)}

    return make


def _attention(problem: Problem) -> Mapping[str, Maker]:
    inputs: AttentionInputs = problem.inputs
    if isinstance(inputs, PrefixInputs):
        found = {}
        if inputs.shape.kv_format == "bf16":
            found = {"flashinfer-cascade": _cascade(inputs), "flashinfer-cascade-fa2": _cascade(inputs, "fa2")}
        return found | ({"flashinfer-fa2-tc": _decode(inputs, True)} if inputs.is_decode else {})
    if inputs.shape.sinks or inputs.shape.alibi or inputs.shape.rotates_or_reads_fp8_queries:
        return {}
    if inputs.is_decode:
        return {"flashinfer-fa2": _decode(inputs, False), "flashinfer-fa2-tc": _decode(inputs, True)}
    backends = ("fa2",) if inputs.shape.kv_format != "bf16" else ("fa3", "fa2")
    found = {f"flashinfer-{backend}": _prefill(inputs, backend) for backend in backends}
    if len(set(inputs.q_lens)) > 1 and inputs.shape.page_size is not None:
        found["flashinfer-holistic"] = _holistic(inputs)
    return found


def _rope(problem: Problem) -> Mapping[str, Maker]:
    inputs: RopeInputs = problem.inputs

    def make() -> Call:
        flashinfer = _flashinfer()
        q, k, positions = inputs.q.clone(), inputs.k.clone(), inputs.positions.int()

        def call() -> Outputs:
            flashinfer.apply_rope_pos_ids_inplace(q, k, positions, rope_theta=inputs.table.config.base)
            return {"q": q, "k": k}

        return call

    return {"flashinfer": make}


def _append(problem: Problem) -> Mapping[str, Maker]:
    inputs: AppendInputs = problem.inputs
    if inputs.rope is not None or inputs.kv.format != "bf16":
        return {}

    def make() -> Call:
        flashinfer, kv, device = _flashinfer(), own_cache(inputs.kv), inputs.k.device
        num_tokens, (_, page_size, *_) = inputs.k.shape[0], kv.k.shape
        requests = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
        assert inputs.batch.table is not None
        pages = inputs.batch.table.flatten()
        indptr, last = int32([0, len(pages)], device), int32([page_size], device)

        def call() -> Outputs:
            where = (requests, positions, (kv.k, kv.v), pages, indptr, last)
            flashinfer.append_paged_kv_cache(inputs.k, inputs.v, *where)
            return {"k": kv.k, "v": kv.v}

        return call

    return {"flashinfer": make}


def _norm(problem: Problem) -> Mapping[str, Maker]:
    inputs: NormInputs = problem.inputs
    if inputs.scale is not None:
        return {}

    def plain() -> Call:
        flashinfer, out = _flashinfer(), torch.empty_like(inputs.x)

        def call() -> Outputs:
            flashinfer.rmsnorm(inputs.x, inputs.weight, inputs.eps, out=out)
            return {"out": out}

        return call

    def fused() -> Call:
        assert inputs.residual is not None
        flashinfer, x, residual = _flashinfer(), inputs.x.clone(), inputs.residual.clone()

        def call() -> Outputs:
            flashinfer.fused_add_rmsnorm(x, residual, inputs.weight, inputs.eps)
            return {"out": x, "residual": residual}

        return call

    return {"flashinfer": plain if inputs.residual is None else fused}


def _gate(name: str) -> Callable[[Problem], Mapping[str, Maker]]:
    def offer(problem: Problem) -> Mapping[str, Maker]:
        inputs: GateInputs = problem.inputs

        def make() -> Call:
            function = getattr(_flashinfer(), name)
            return lambda: {"out": function(inputs.x)}

        return {"flashinfer": make}

    return offer


def _merge(problem: Problem) -> Mapping[str, Maker]:
    inputs: MergeInputs = problem.inputs

    def make() -> Call:
        flashinfer = _flashinfer()
        # FlashInfer wants tokens first, and base-2 logarithms.
        o, lse = inputs.o.transpose(0, 1).contiguous(), (inputs.lse / LN2).transpose(0, 1).contiguous()

        def call() -> Outputs:
            return {"o": flashinfer.merge_states(o, lse)[0]}

        return call

    return {"flashinfer": make}


def _sample(problem: Problem) -> Mapping[str, Maker]:
    """Draws from probabilities, the softmax before it included."""
    inputs: SamplingInputs = problem.inputs

    logits = inputs.logits

    def draws(
        draw: Callable[[ModuleType, torch.Tensor, dict[str, Any]], torch.Tensor], from_logits: bool = False
    ) -> Maker:
        def make() -> Call:
            module, device = _flashinfer().sampling, logits.device
            seed = {
                "seed": torch.tensor([7], device=device),
                "offset": torch.zeros(1, dtype=torch.int64, device=device),
            }
            return lambda: {"drawn": draw(module, logits if from_logits else module.softmax(logits), seed)}

        return make

    calls: dict[str, Callable[[ModuleType, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
        "plain": lambda module, probs, seed: module.sampling_from_probs(probs, **seed),
        "topp.9": lambda module, probs, seed: module.top_p_sampling_from_probs(probs, TOP_P, **seed),
        "topk50": lambda module, probs, seed: module.top_k_sampling_from_probs(probs, TOP_K, **seed),
        "topk50 topp.9": lambda module, probs, seed: module.top_k_top_p_sampling_from_probs(
            probs, TOP_K, TOP_P, filter_apply_order="top_k_first", **seed
        ),
        "topk50 topp.9 joint": lambda module, probs, seed: module.top_k_top_p_sampling_from_probs(
            probs, TOP_K, TOP_P, filter_apply_order="joint", **seed
        ),
        "minp.1": lambda module, probs, seed: module.min_p_sampling_from_probs(probs, MIN_P, **seed),
    }
    found = {"flashinfer": draws(calls[inputs.task])} if inputs.task in calls else {}
    if inputs.task == "plain":
        # By the Gumbel trick, in one kernel.
        found["flashinfer-from-logits"] = draws(
            lambda module, logits, seed: module.sampling_from_logits(logits, **seed), from_logits=True
        )
    return found


def _filter(problem: Problem) -> Mapping[str, Maker]:
    inputs: SamplingInputs = problem.inputs

    def make() -> Call:
        module = _flashinfer().sampling
        calls: dict[str, Call] = {
            "topp.9 renorm": lambda: {"out": module.top_p_renorm_probs(module.softmax(inputs.logits), TOP_P)},
            "topk50 renorm": lambda: {"out": module.top_k_renorm_probs(module.softmax(inputs.logits), TOP_K)},
            "topk50 mask": lambda: {"out": module.top_k_mask_logits(inputs.logits, TOP_K)},
        }
        return calls[inputs.task]

    return {"flashinfer": make}


def _verify(problem: Problem) -> Mapping[str, Maker]:
    """Rejection sampling; it has no verification without the draft's probabilities."""
    inputs: DraftInputs = problem.inputs
    if inputs.draft_probs is None:
        return {}

    def make() -> Call:
        module, tokens = _flashinfer().sampling, inputs.draft_tokens.to(torch.int32)
        seed = {"seed": 7, "offset": 0}

        def call() -> Outputs:
            found = module.chain_speculative_sampling(inputs.draft_probs, tokens, inputs.target_probs, **seed)
            return {"drawn": found[0]}

        return call

    return {"flashinfer": make}


def _top_k(problem: Problem) -> Mapping[str, Maker]:
    inputs: SamplingInputs = problem.inputs
    return {"flashinfer": lambda: lambda: {"values": _flashinfer().top_k(inputs.logits, inputs.k, sorted=True)[0]}}


PEER = Peer(
    "flashinfer",
    _find,
    {
        "attention": _attention,
        "rope": _rope,
        "append_kv": _append,
        "rmsnorm": _norm,
        "add_rmsnorm": _norm,
        "silu_mul": _gate("silu_and_mul"),
        "gelu_mul": _gate("gelu_tanh_and_mul"),
        "merge_states": _merge,
        "sample": _sample,
        "filter_logits": _filter,
        "verify_chain": _verify,
        "top_k": _top_k,
    },
)
