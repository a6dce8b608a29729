"""Shared prefixes: parameters and specs of ``fi/kernels/attention_prefix.cuh``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from fi_core.contract import target_of
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec
from fi_core.registry import registry

from ...params import ParamsLayout
from ...spec import join_constants
from .call import STRIDE_PARAMS, TENSOR_PARAMS, CallForm
from .decode import DecodeSpec
from .prefill import PrefillSpec, prefill_fields
from .prefill_tuning import PrefillTuning, built_in_prefill_tuning, prefill_tuning_for

TUNED_OP = "attention_prefix"
"""What ``fi_tuning`` is asked for."""


@dataclass(frozen=True)
class PrefixTuning:
    """``tiles`` as of prefill. ``choose``: nodes that do not pay are left out, and batches left to the decode kernel that are
    through sooner there; else nodes are used as they are given. What planning counts with, in hundreds of clocks of a
    multiprocessor: a tile of a request's own keys, a tile of a node (whose rows pass through memory as parts), a step of one
    warpgroup's rows, those of a further one."""

    tiles: PrefillTuning
    choose: bool = True
    item_cost: int = 15
    node_item_cost: int = 40
    step_cost: int = 20
    group_cost: int = 6

    def __post_init__(self) -> None:
        if not isinstance(self.choose, bool):
            raise ArgumentError("tuning.choose", "True or False", self.choose)
        for name in ("item_cost", "node_item_cost", "step_cost", "group_cost"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < (name != "group_cost"):
                raise ArgumentError(f"tuning.{name}", "an int above 0", getattr(self, name))


def prefix_tuning_for(spec: AttentionSpec, device: torch.device) -> PrefixTuning:
    """The parameters for a plan: the prefill kernel's tiles, and what ``fi_tuning`` returns for "attention_prefix". Raises
    ArgumentError for unknown names or values."""
    built_in = PrefixTuning(prefill_tuning_for(spec, device, levels=True))
    given: Mapping[str, Any] | None = registry().manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    names = [item.name for item in fields(PrefixTuning)][1:]
    unknown = set(given or ()) - set(names)
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
    return replace(built_in, **given) if given else built_in


def built_in_prefix_tuning(spec: AttentionSpec) -> PrefixTuning:
    """The same without overrides, for Hopper."""
    return PrefixTuning(built_in_prefill_tuning(spec, levels=True))


@dataclass(frozen=True)
class PrefixSpec(PrefillSpec):
    """A prefill kernel whose tiles are nodes' and requests' (``levels``). With ``decode_num_warps`` it has the code of the decode
    kernel too, which serves batches without a list; ``decode_rows`` and the like are its tile, as in DecodeSpec, and
    ``decode_boxes`` whether K and V have tensor maps there."""

    decode_num_warps: int = 0
    decode_row_warps: int = 0
    decode_head_warps: int = 0
    decode_rows: int = 0
    decode_chunk_tokens: int = 0
    decode_stages: int = 0
    decode_boxes: bool = False
    decode_bytes: int = 0

    stem: ClassVar = "attention_prefix"
    cooperative: ClassVar = True  # rows are merged once every block has left its parts
    layout: ClassVar = ParamsLayout(
        (
            ("starts", "pointer"),  # to the header: what blocks read first, in one line of constants
            ("items", "pointer"),
            ("rows", "pointer"),
            ("tokens", "pointer"),
            ("segments", "pointer"),
            ("header", "output"),
            ("barrier", "output"),
            ("parts", "output"),
            ("part_logs", "output"),
            ("partials", "output"),
            ("partial_rows", "output"),
            *TENSOR_PARAMS,
            ("inv_freq", "pointer"),
            ("positions", "pointer"),
            ("q_scales", "pointer"),
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            ("k", "pointer"),
            ("v", "pointer"),
            ("q", "pointer"),
            *STRIDE_PARAMS,
            ("q_stride_token", "int64"),
            ("q_stride_head", "int64"),
            ("q_scale_stride", "int32"),
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("num_kv_heads", "int32"),
            ("window", "int32"),
            ("max_segments", "int32"),
            ("scale", "float"),
            ("soft_cap", "float"),
            ("v_scale", "float"),
            ("rope_factor", "float"),
        )
    )

    @property
    def shared_bytes(self) -> int:
        return max(super().shared_bytes, self.decode_bytes)

    def config_lines(self) -> list[str]:
        """As ever, in few lines."""
        return join_constants(sorted(super().config_lines()))


@dataclass(frozen=True)
class BoxPrefixSpec(PrefixSpec):
    """The same with K and V copied as boxes of tensor maps."""

    tensor_maps: ClassVar = ("queries", "keys", "values")


@dataclass(frozen=True)
class BoxesPrefixSpec(PrefixSpec):
    """The same where the decode kernel's code has boxes of its own."""

    tensor_maps: ClassVar = ("queries", "keys", "values", "decode_keys", "decode_values")


def prefix_spec(
    spec: AttentionSpec, tuning: PrefixTuning, form: CallForm, decode: DecodeSpec | None = None
) -> PrefixSpec:
    """The kernel of a call, with ``decode`` also that kernel's code; K and V come in boxes there only if they do here."""
    tiles = replace(tuning.tiles, copy_order="keys ahead", pieces=1, dense_tiles=0)  # as its loader works
    made = dict(prefill_fields(spec, tiles, form), levels=True)
    if decode is not None:
        names = ("num_warps", "row_warps", "head_warps", "rows", "chunk_tokens", "stages")
        made |= {f"decode_{name}": getattr(decode, name) for name in names}
        made |= {"decode_boxes": bool(decode.tensor_maps), "decode_bytes": decode.shared_bytes}
        if decode.tensor_maps:
            return BoxesPrefixSpec(**made)
    return (BoxPrefixSpec if form.boxes else PrefixSpec)(**made)
