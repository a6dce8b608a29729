"""The prefill kernel: spec of ``fi/kernels/attention_prefill.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fi_core.records import AttentionSpec

from ...params import ParamsLayout
from ...spec import KernelSpec, join_constants
from .call import STRIDE_PARAMS, TENSOR_PARAMS, CallForm, call_fields
from .prefill_tuning import PrefillTuning, box_tokens, prefill_shared_bytes

_WARPGROUP_THREADS = 128
_REGISTERS = {1: (56, 256), 2: (40, 232), 3: (32, 160), 4: (32, 112)}
_REGISTERS_FOR_ROWS = {1: (56, 256), 2: (56, 224), 3: (32, 160), 4: (32, 112)}
"""Of a producer's and of a consumer's thread, by warpgroups of consumers: producers that copy rows themselves need more."""


@dataclass(frozen=True)
class PrefillSpec(KernelSpec):
    """What is compiled into a prefill kernel: element type, head shape, addressing as for decode, tile (``consumers``
    warpgroups of 64 packed rows, ``tokens`` keys a step, ``edge_tokens`` the unit of an item's first step, ``box_tokens``
    of a copy), rings, ``in_pieces`` (the order may have pieces of tiles), and the features of the call."""

    dtype: torch.dtype
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
    ping_pong: bool
    overlap: bool
    parts: int
    polynomials: int
    keys_ahead: bool
    in_pieces: bool
    causal: bool
    windowed: bool
    soft_cap: bool
    alibi: bool
    sinks: bool
    mask: int
    k_scales: bool
    v_scales: bool
    lse: bool
    signed_scale: bool = False
    levels: bool = False

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
            *TENSOR_PARAMS,
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            *STRIDE_PARAMS,
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("num_kv_heads", "int32"),
            ("window", "int32"),
            ("scale", "float"),
            ("soft_cap", "float"),
            ("v_scale", "float"),
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
        tuning = PrefillTuning(self.consumers, self.tokens, self.edge_tokens, *rings, True, True, 1, 0, True, 1, 1, 1)
        return prefill_shared_bytes(tuning, self.head_dim, self.head_dim_vo, self.dtype.itemsize)

    def config_lines(self) -> list[str]:
        """As ever, with the registers of producers and consumers and the block's shared memory."""
        has_boxes = len(self.tensor_maps) > 1
        producer, consumer = (_REGISTERS if has_boxes else _REGISTERS_FOR_ROWS)[self.consumers]
        head = (
            f"static constexpr int kProducerRegisters = {producer}, kConsumerRegisters = {consumer}, "
            f"kSharedBytes = {self.shared_bytes};"
        )
        boxes = f"static constexpr bool kBoxes = {str(has_boxes).lower()};"
        return join_constants([head, *super().config_lines(), boxes])


@dataclass(frozen=True)
class BoxPrefillSpec(PrefillSpec):
    """The same with K and V copied as boxes of tensor maps."""

    tensor_maps: ClassVar = ("queries", "keys", "values")


def prefill_spec(spec: AttentionSpec, tuning: PrefillTuning, form: CallForm) -> PrefillSpec:
    """The kernel of a call."""
    return (BoxPrefillSpec if form.boxes else PrefillSpec)(**prefill_fields(spec, tuning, form))


def prefill_fields(spec: AttentionSpec, tuning: PrefillTuning, form: CallForm) -> dict[str, Any]:
    """The fields of a call's spec, by name."""
    return dict(
        **call_fields(spec, form),
        consumers=tuning.consumers,
        tokens=tuning.tokens,
        edge_tokens=tuning.edge_tokens,
        box_tokens=(box_tokens(spec.page_size, tuning.tokens) or 0) if form.boxes else 0,
        key_stages=tuning.key_stages,
        value_stages=tuning.value_stages,
        query_stages=tuning.query_stages,
        ping_pong=tuning.ping_pong,
        overlap=tuning.overlap,
        parts=tuning.parts,
        polynomials=tuning.polynomials,
        keys_ahead=tuning.keys_ahead,
        in_pieces=tuning.pieces > 1,
        signed_scale=form.signed_scale,
    )
