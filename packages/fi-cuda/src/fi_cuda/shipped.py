"""The kernels of common models, which are built ahead of time and checked without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from fi_core.records import AttentionSpec, Capacity
from fi_core.rope import FusedRope

from .kernels.append_kv import AppendShape, spec_for
from .kernels.attention.boxes import tokens_of_box
from .kernels.attention.call import CallForm
from .kernels.attention.decode import decode_spec
from .kernels.attention.mixed_state import short_capacity
from .kernels.attention.order import order_spec
from .kernels.attention.plan import ShortSteps, plan_spec
from .kernels.attention.prefill import prefill_spec
from .kernels.attention.prefill_tuning import built_in_prefill_tuning, prefill_params
from .kernels.attention.prefix import built_in_prefix_tuning, prefix_spec
from .kernels.attention.prefix_plan import prefix_plan_spec
from .kernels.attention.tuning import built_in_tuning, partition_params
from .kernels.copy_pages import CopyPagesSpec
from .kernels.gated_activation import SILU, GatedActivationSpec
from .kernels.merge_states import MergeStatesSpec
from .kernels.rmsnorm import RmsNormSpec
from .kernels.rope import spec_for as rope_spec_for
from .kernels.sampling.filter_logits import FilterLogitsSpec
from .kernels.sampling.forms import kept_for
from .kernels.sampling.geometry import geometry_for
from .kernels.sampling.penalize_logits import PenalizeLogitsSpec
from .kernels.sampling.record_tokens import RecordTokensSpec
from .kernels.sampling.sample import ColumnSampleSpec, SampleSpec, column_form
from .kernels.sampling.top_k import TopKSpec
from .kernels.sampling.verify import VerifySpec, verify_form
from .spec import KernelSpec

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Element types and the KV formats that store them unchanged."""

VECTOR_BYTES = 16
"""What base addresses and strides of these models' tensors align to."""

PAGE_SIZE = 16

VOCABULARIES = (32000, 49152, 128256, 151936, 201088)
"""Tokens of common models' vocabularies; forms of a row's cluster are often the same for several."""

_SAMPLED_ROWS = (1, 256)

_HOPPER_PROCESSORS = 132
_DECODE = Capacity(max_batch=256, max_q_tokens=256, max_q_len=1, max_kv_len=2**17)
_PREFILL = Capacity(max_batch=256, max_q_tokens=8192, max_q_len=8192, max_kv_len=2**17)
_MANY_TOKENS = Capacity(max_batch=64, max_q_tokens=1024, max_q_len=16, max_kv_len=2**17)
_SPECULATIVE = Capacity(max_batch=64, max_q_tokens=256, max_q_len=4, max_kv_len=2**17)


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
    for streaming in (False, True):
        pages = (CopyPagesSpec(index, VECTOR_BYTES, True, streaming) for index in (torch.int32, torch.int64))
        found.update(dict.fromkeys(pages))
    found.update(dict.fromkeys(_attention_specs()))
    found.update(dict.fromkeys(_sampling_specs()))
    return list(found)


def _specs_of(model: ModelShape, dtype: torch.dtype) -> Iterator[KernelSpec]:
    """Append: K and V alone through slots, as for engines that rotate by themselves; and with RoPE through a table."""
    for out_dtype in (dtype, torch.float8_e4m3fn):
        for add, many_rows in ((False, False), (False, True), (True, False)):
            yield RmsNormSpec(dtype, out_dtype, model.hidden_size, VECTOR_BYTES, add, many_rows)
    if model.head_norm:
        for many_rows in (False, True):
            yield RmsNormSpec(dtype, dtype, model.head_dim, VECTOR_BYTES, False, many_rows, nested=True)
    yield GatedActivationSpec(dtype, model.intermediate_size, VECTOR_BYTES, SILU)
    yield MergeStatesSpec(dtype, model.head_dim, VECTOR_BYTES)
    for table_vector in (0, VECTOR_BYTES):
        dims = (model.head_dim, model.head_dim, VECTOR_BYTES)
        for few_tokens in (False, True):
            yield rope_spec_for(dtype, torch.int64, dims, "half", table_vector, few_tokens)
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
            packed=True,
        )
        yield spec_for(plain)
        yield spec_for(plain._replace(few_tokens=True))
        rotated = plain._replace(
            addressing="dense", rotary_dim=model.head_dim, pairs="half", num_q_heads=model.num_q_heads
        )
        yield spec_for(rotated)
        yield spec_for(rotated._replace(table=True))


def _sampling_specs() -> Iterator[KernelSpec]:
    """float32 logits: one and many rows of each vocabulary with the usual filters; the rarer kernels for one vocabulary."""
    dtype, usual = torch.float32, frozenset({"top_k", "top_p"})
    for vocab_size in VOCABULARIES:
        for num_rows in _SAMPLED_ROWS:
            yield SampleSpec.of(dtype, VECTOR_BYTES, geometry_for(vocab_size, num_rows, kept=kept_for(usual)), usual)
    every = frozenset({"top_k", "top_p", "min_p"})
    for num_rows in _SAMPLED_ROWS:
        for filters in (frozenset[str](), frozenset({"top_p"})):
            form = geometry_for(128256, num_rows, kept=kept_for(filters))
            yield SampleSpec.of(dtype, VECTOR_BYTES, form, filters)
        for filters, penalties in (
            (usual, True),
            (usual, False),
            (frozenset[str](), True),
            (every | {"typical_p"}, True),
        ):
            form, typical = column_form(128256, num_rows, filters, penalties), "typical_p" in filters
            yield ColumnSampleSpec.of(dtype, VECTOR_BYTES, form, filters, typical, penalties)
        form = geometry_for(128256, num_rows, kept=kept_for(every))
        yield SampleSpec.of(torch.bfloat16, VECTOR_BYTES, form, every)
        form = geometry_for(128256, num_rows, kept=kept_for(every).without_pairs())
        for probs in (False, True):
            yield FilterLogitsSpec.of(dtype, VECTOR_BYTES, form, every, VECTOR_BYTES, probs)
        form = geometry_for(128256, num_rows)
        for logprobs in (False, True):
            yield TopKSpec(dtype, VECTOR_BYTES, *form, 0, logprobs)
        for tree in (False, True):
            yield VerifySpec(dtype, VECTOR_BYTES, *verify_form(128256, num_rows, False), tree=tree, proposals=False)
        yield VerifySpec(dtype, VECTOR_BYTES, *verify_form(128256, num_rows, True), tree=False, proposals=True)
    yield TopKSpec(dtype, VECTOR_BYTES, *geometry_for(131072, 1), 512, False)
    for dense in (False, True):
        yield PenalizeLogitsSpec.of(dtype, VECTOR_BYTES, 128256, dense)
    yield RecordTokensSpec()


def _attention_specs() -> Iterator[KernelSpec]:
    """Decode of these models on a Hopper GPU, and of models with other head dims and features: sinks and windows,
    soft caps, FP8 queries, RoPE on the way; steps of speculative decoding, with a tree's mask and with many tokens."""
    eight = AttentionSpec(32, 8, 128)
    # For K and V that no tensor map describes.
    yield decode_spec(eight, built_in_tuning(eight, _DECODE), CallForm())
    for model in MODELS.values():
        heads = (model.num_q_heads, model.num_kv_heads, model.head_dim)
        # With rows of the table in any order, as engines pass them that keep a row for each of their slots.
        for in_any_order in (False, True):
            yield from _decode_specs(AttentionSpec(*heads), _DECODE, CallForm(table_row=in_any_order))
    yield from _decode_specs(replace(eight, dtype=torch.float16, kv_format="fp16"), _DECODE, CallForm())
    yield from _decode_specs(replace(eight, kv_format="fp8_e4m3"), _DECODE, CallForm(k_scales=True, v_scales=True))
    all_fp8 = replace(eight, kv_format="fp8_e4m3", q_format="fp8_e4m3")
    yield from _decode_specs(all_fp8, _DECODE, CallForm(q_scales=True, k_scales=True, v_scales=True))
    for keys in (False, True):
        yield from _decode_specs(replace(eight, rope=FusedRope(128, keys=keys)), _DECODE, CallForm())
    yield from _decode_specs(eight, _MANY_TOKENS, CallForm())
    yield from _decode_specs(replace(eight, batch_invariant=True), _DECODE, CallForm())
    yield from _decode_specs(replace(eight, features=frozenset({"mask"})), _SPECULATIVE, CallForm(mask_columns="new"))
    sinks = AttentionSpec(64, 8, 64, windows=(None, 128), features=frozenset({"sinks"}))
    for window in sinks.windows:
        yield from _decode_specs(sinks, _DECODE, CallForm(windowed=window is not None), window)
    capped = AttentionSpec(16, 8, 256, windows=(None, 4096), features=frozenset({"soft_cap"}))
    for window in capped.windows:
        yield from _decode_specs(capped, _DECODE, CallForm(windowed=window is not None), window)
    yield from _all_prefill_specs(eight, sinks)
    yield from _prefix_specs(eight)


def _all_prefill_specs(eight: AttentionSpec, sinks: AttentionSpec) -> Iterator[KernelSpec]:
    """Prefill and mixed batches of the same models; ragged K and V, pages of one token and FP8 for one of them."""
    for model in MODELS.values():
        yield from _prefill_specs(AttentionSpec(model.num_q_heads, model.num_kv_heads, model.head_dim), CallForm())
    ragged = replace(eight, page_size=None, table="ragged")
    for spec in (ragged, replace(ragged, causal=False), replace(eight, dtype=torch.float16, kv_format="fp16")):
        yield from _prefill_specs(spec, CallForm())
    yield from _prefill_specs(replace(eight, page_size=1), CallForm())
    yield from _prefill_specs(replace(eight, kv_format="fp8_e4m3"), CallForm(k_scales=True, v_scales=True))
    yield from _prefill_specs(replace(eight, rope=FusedRope(128)), CallForm())
    all_fp8 = replace(eight, kv_format="fp8_e4m3", q_format="fp8_e4m3")
    scaled = CallForm(q_scales=True, k_scales=True, v_scales=True)
    for spec in (all_fp8, replace(all_fp8, page_size=None, table="ragged", causal=False)):
        yield from _prefill_specs(spec, scaled)
    yield from _prefill_specs(AttentionSpec(128, 128, 192, 128), CallForm(lse=True))
    for window in sinks.windows:
        yield from _prefill_specs(sinks, CallForm(windowed=window is not None), window)


def _prefix_specs(eight: AttentionSpec) -> Iterator[KernelSpec]:
    """Shared prefixes: groups of 4 and 8 query heads, and FP8 for one of them."""
    scaled = CallForm(k_scales=True, v_scales=True)
    for spec, form in (
        (eight, CallForm(boxes=True)),
        (replace(eight, num_qo_heads=64), CallForm(boxes=True)),
        (replace(eight, kv_format="fp8_e4m3"), scaled._replace(boxes=True)),
    ):
        tuning, decode = built_in_prefix_tuning(spec), built_in_tuning(spec, _DECODE)
        beside = plan_spec(partition_params(spec, _DECODE, decode, None, _HOPPER_PROCESSORS), _DECODE)
        yield prefix_plan_spec(spec, replace(_DECODE, max_prefixes=256), tuning, _HOPPER_PROCESSORS, beside)
        yield prefix_spec(spec, tuning, form, decode_spec(spec, decode, form))


def _decode_specs(
    spec: AttentionSpec, capacity: Capacity, form: CallForm, window: int | None = None, boxes: bool = True
) -> Iterator[KernelSpec]:
    """What a plan launches: the planning kernel and the kernel of its calls."""
    tuning = built_in_tuning(spec, capacity)
    yield plan_spec(partition_params(spec, capacity, tuning, window, _HOPPER_PROCESSORS), capacity)
    yield decode_spec(spec, tuning, form._replace(boxes=boxes))


def _prefill_specs(spec: AttentionSpec, form: CallForm, window: int | None = None) -> Iterator[KernelSpec]:
    tuning = built_in_prefill_tuning(spec)
    params = prefill_params(spec, _PREFILL, tuning, window, _HOPPER_PROCESSORS)
    short = short_capacity(spec, _PREFILL)
    short_boxes = tokens_of_box(spec.page_size, built_in_tuning(spec, short).chunk_tokens) is not None
    yield from _decode_specs(spec, short, form, window, short_boxes)
    yield plan_spec(params, _PREFILL)
    for fast_memory in (False, True):
        yield order_spec(params, _PREFILL, tuning, spec.page_size, ShortSteps(short.max_q_len), fast_memory)
    yield prefill_spec(spec, tuning, form._replace(boxes=True), after_decode=True)
