"""The prefill kernel: spec of ``fi/kernels/attention_prefill.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fi_core.records import AttentionSpec

from ...params import ParamsLayout
from ...spec import KernelSpec, join_constants
from .call import STRIDE_PARAMS, TENSOR_PARAMS, CallForm, call_fields
from .decode import ROPE_PAIRS
from .prefill_tuning import COPY_ORDERS, HeadBytes, PrefillTuning, box_tokens, prefill_shared_bytes, run_tokens

_WARPGROUP_THREADS = 128
_REGISTERS = {1: (56, 256), 2: (40, 232), 3: (32, 160)}
_REGISTERS_FOR_ROWS = {1: (56, 256), 2: (56, 224), 3: (32, 160)}
"""Of a producer's and of a consumer's thread, by warpgroups of consumers: producers that copy rows themselves need more."""
_REGISTERS_FOR_LONG_STEPS, _FITTING = (24, 240), 320
"""The same where two warpgroups' output and scores, of so many columns together, do not fit."""


@dataclass(frozen=True)
class PrefillSpec(KernelSpec):
    """What is compiled into a prefill kernel: element types, head shape, addressing and RoPE as for decode, tile (``consumers``
    warpgroups of 64 packed rows, ``tokens`` keys a step, ``edge_tokens`` the unit of an item's first step, ``box_tokens``
    of a copy), rings, ``in_pieces`` (the order may have pieces of tiles), ``dense_tiles`` as in PrefillTuning, and the features
    of the call. ``after_decode``: it is launched behind the decode kernel, which serves batches of short queries."""

    dtype: torch.dtype
    query: torch.dtype
    stored: torch.dtype
    head_dim: int
    head_dim_vo: int
    group_size: int
    page_size: int
    table: int
    table_row: bool
    consumers: int
    tokens: int
    edge_tokens: int
    box_tokens: int
    key_stages: int
    value_stages: int
    query_stages: int
    landing_stages: int
    copy_order: int
    ping_pong: bool
    overlap: bool
    in_pieces: bool
    parts: int
    causal: bool
    windowed: bool
    soft_cap: bool
    alibi: bool
    sinks: bool
    mask: int
    rotary_dim: int
    rope_pairs: int
    dense_tiles: int
    q_scales: bool
    k_scales: bool
    v_scales: bool
    lse: bool
    signed_scale: bool = False
    levels: bool = False
    after_decode: bool = False

    stem: ClassVar = "attention_prefill"
    overlapping: ClassVar = True
    tensor_maps: ClassVar[tuple[str, ...]] = ("queries",)
    layout: ClassVar = ParamsLayout(
        (
            ("k", "pointer"),
            ("v", "pointer"),
            ("starts", "pointer"),
            ("items", "pointer"),
            ("order_items", "pointer"),
            ("order", "output"),
            ("arrivals", "output"),
            ("partials", "output"),
            ("partial_rows", "output"),
            ("dense", "output"),
            ("dense_records", "output"),
            *TENSOR_PARAMS,
            ("inv_freq", "pointer"),
            ("q_scales", "pointer"),
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            *STRIDE_PARAMS,
            ("q_scale_stride", "int32"),
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("num_kv_heads", "int32"),
            ("dense_steps", "int32"),
            ("window", "int32"),
            ("scale", "float"),
            ("soft_cap", "float"),
            ("v_scale", "float"),
            ("rope_factor", "float"),
        )
    )

    @property
    def num_threads(self) -> int:
        return _WARPGROUP_THREADS * (1 + self.consumers)

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    @property
    def shared_bytes(self) -> int:
        rings = (self.key_stages, self.value_stages, self.query_stages)
        landing = self.landing_stages
        tuning = PrefillTuning(
            self.consumers, self.tokens, self.edge_tokens, *rings, True, True, 1, "apart", 1, 1, 1, landing
        )
        return prefill_shared_bytes(tuning, HeadBytes(self.head_dim, self.head_dim_vo, self.query.itemsize))

    @property
    def has_boxes(self) -> bool:
        """Whether tensor maps bring all of K and V, not only pages of one token that follow each other in memory."""
        return len(self.tensor_maps) > 1 and self.page_size != 1

    def config_lines(self) -> list[str]:
        """As ever, with the registers of producers and consumers and the block's shared memory."""
        producer, consumer = (_REGISTERS if self.has_boxes else _REGISTERS_FOR_ROWS)[self.consumers]
        if self.has_boxes and self.overlap and self.head_dim_vo + self.tokens > _FITTING:
            producer, consumer = _REGISTERS_FOR_LONG_STEPS
        head = (
            f"static constexpr int kProducerRegisters = {producer}, kConsumerRegisters = {consumer}, "
            f"kSharedBytes = {self.shared_bytes};"
        )
        boxes = f"static constexpr bool kBoxes = {str(self.has_boxes).lower()};"
        return join_constants([head, *super().config_lines(), boxes])


@dataclass(frozen=True)
class BoxPrefillSpec(PrefillSpec):
    """The same with K and V copied as boxes of tensor maps; of pages of one token, those that follow each other in memory."""

    tensor_maps: ClassVar = ("queries", "keys", "values")


def prefill_spec(spec: AttentionSpec, tuning: PrefillTuning, form: CallForm, after_decode: bool = False) -> PrefillSpec:
    """The kernel of a call; ``after_decode`` as in PrefillSpec."""
    fields = prefill_fields(spec, tuning, form)
    return (BoxPrefillSpec if form.boxes else PrefillSpec)(**fields, after_decode=after_decode)


def prefill_fields(spec: AttentionSpec, tuning: PrefillTuning, form: CallForm) -> dict[str, Any]:
    """The fields of a call's spec, by name."""
    rope = spec.rope
    landing_stages = tuning.landing_stages if spec.q_is_fp8 or form.boxes else 0
    tokens = box_tokens(spec.page_size, tuning.tokens)
    in_boxes = form.boxes and tokens is not None and not landing_stages
    copy_order = "in order" if tuning.copy_order == "apart" and not in_boxes else tuning.copy_order
    return dict(
        **call_fields(spec, form),
        query=spec.q_dtype,
        rotary_dim=0 if rope is None else rope.rotary_dim,
        rope_pairs=ROPE_PAIRS[None if rope is None else rope.pairs],
        q_scales=form.q_scales,
        consumers=tuning.consumers,
        tokens=tuning.tokens,
        edge_tokens=tuning.edge_tokens,
        box_tokens=(tokens or run_tokens(spec, tuning) or 0) if form.boxes else 0,
        key_stages=tuning.key_stages,
        value_stages=tuning.value_stages,
        query_stages=tuning.query_stages,
        landing_stages=landing_stages,
        copy_order=COPY_ORDERS.index(copy_order),
        ping_pong=tuning.ping_pong,
        overlap=tuning.overlap,
        parts=tuning.parts,
        in_pieces=tuning.pieces > 1,
        dense_tiles=0 if form.windowed else tuning.dense_tiles,
        signed_scale=form.signed_scale,
    )
