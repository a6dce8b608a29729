"""The decode kernel: spec of ``fi/kernels/attention_decode.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fi_core.records import AttentionSpec

from ...params import ParamsLayout
from ...spec import KernelSpec, join_constants
from .call import STRIDE_PARAMS, TENSOR_PARAMS, CallForm, call_fields
from .tuning import DecodeTuning, HeadForm, shared_bytes

ROPE_PAIRS = {None: 0, "half": 1, "interleaved": 2}


@dataclass(frozen=True)
class DecodeSpec(KernelSpec):
    """What is compiled into a decode kernel: element types (``query`` of Q, ``dtype`` of the output), head shape, addressing
    (``page_size`` 0: ragged; ``table``, ``mask`` and ``rope_pairs`` numbered as in TABLE_FORMS, MASK_FORMS and
    ROPE_PAIRS), tile, and the features of the call. ``q_scales``, ``k_scales`` and ``v_scales``: scales are in memory."""

    dtype: torch.dtype
    query: torch.dtype
    stored: torch.dtype
    head_dim: int
    head_dim_vo: int
    group_size: int
    page_size: int
    table: int
    table_row: bool
    rows: int
    chunk_tokens: int
    num_warps: int
    row_warps: int
    head_warps: int
    stages: int
    causal: bool
    windowed: bool
    soft_cap: bool
    alibi: bool
    sinks: bool
    mask: int
    rotary_dim: int
    rope_pairs: int
    rope_keys: bool
    q_scales: bool
    k_scales: bool
    v_scales: bool
    lse: bool
    batch_invariant: bool

    stem: ClassVar = "attention_decode"
    overlapping: ClassVar = True
    cooperative: ClassVar = True  # workers wait for the pieces of a tile that they merge
    layout: ClassVar = ParamsLayout(
        (
            ("starts", "pointer"),
            ("items", "pointer"),
            ("partials", "output"),
            ("partial_rows", "output"),
            ("q", "pointer"),
            ("k", "pointer"),
            ("v", "pointer"),
            *TENSOR_PARAMS,
            ("inv_freq", "pointer"),
            ("q_scales", "pointer"),
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            ("q_stride_token", "int64"),
            ("q_stride_head", "int64"),
            *STRIDE_PARAMS,
            ("q_scale_stride", "int32"),
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("window", "int32"),
            ("scale", "float"),
            ("soft_cap", "float"),
            ("v_scale", "float"),
            ("rope_factor", "float"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Shared memory holds one block, so a thread may have all the registers it wants."""
        return 1

    @property
    def shared_bytes(self) -> int:
        tuning = DecodeTuning(
            self.rows, self.chunk_tokens, self.num_warps, self.stages, 1, 1, 1, self.row_warps, self.head_warps
        )
        in_half = self.stored.itemsize == 1 and self.rope_pairs == ROPE_PAIRS["half"]
        rotated = (self.rotary_dim, self.rope_keys, in_half)
        return shared_bytes(tuning, HeadForm(self.head_dim, self.head_dim_vo, self.stored.itemsize, *rotated))

    def config_lines(self) -> list[str]:
        """As ever, with neighbours of one type on one line."""
        boxes = f"static constexpr bool kBoxes = {str(bool(self.tensor_maps)).lower()};"
        return join_constants([boxes, *super().config_lines()])


@dataclass(frozen=True)
class BoxDecodeSpec(DecodeSpec):
    """The same with K and V copied as boxes of tensor maps."""

    tensor_maps: ClassVar = ("keys", "values")


def decode_spec(spec: AttentionSpec, tuning: DecodeTuning, form: CallForm) -> DecodeSpec:
    """The kernel of a call."""
    rope = spec.rope
    return (BoxDecodeSpec if form.boxes else DecodeSpec)(
        **call_fields(spec, form),
        query=spec.q_dtype,
        rows=tuning.rows,
        chunk_tokens=tuning.chunk_tokens,
        num_warps=tuning.num_warps,
        row_warps=tuning.row_warps,
        head_warps=tuning.head_warps,
        stages=tuning.num_stages,
        rotary_dim=0 if rope is None else rope.rotary_dim,
        rope_pairs=ROPE_PAIRS[None if rope is None else rope.pairs],
        rope_keys=rope is not None and rope.keys,
        q_scales=form.q_scales,
        batch_invariant=spec.batch_invariant,
    )
