"""What a RadixAttention layer asks for, as fi's form, window and arguments, and its part of SGLang's KV pool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import fi_core as fi
import torch
from fi_adapters.forms import LayerForm
from fi_core.records import format_of
from torch import Tensor


def window_of(layer: Any) -> int | None:
    """fi's window counts the query's own token, SGLang's ``sliding_window_size`` the tokens before it (-1: no window)."""
    size = layer.sliding_window_size
    return None if size is None or size < 0 else size + 1


def geometry_of(layer: Any) -> tuple[int, int, int, int]:
    """(query heads, KV heads, K dim, V dim) of this rank."""
    return layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim


def windows_of(layers: Iterable[Any]) -> dict[tuple[int, int, int, int], list[int | None]]:
    """The windows of the layers of each geometry: a plan must know them all when it is made."""
    found: dict[tuple[int, int, int, int], list[int | None]] = {}
    for layer in layers:
        windows = found.setdefault(geometry_of(layer), [])
        if window_of(layer) not in windows:
            windows.append(window_of(layer))
    return found


def check_layer(layer: Any) -> None:
    """Raise NotImplementedError for what fi's attention does not compute for SGLang."""
    kind = getattr(layer.attn_type, "value", layer.attn_type)
    for is_asked, what in (
        (layer.is_cross_attention, "cross attention"),
        (kind != "decoder", f"attention of type {kind}"),
        (layer.logit_cap and layer.logit_capping_method != "tanh", f"logit capping by {layer.logit_capping_method}"),
        (layer.xai_temperature_len > 0, "a temperature that depends on the position"),
    ):
        if is_asked:
            raise NotImplementedError(f"fi-sglang, layer {layer.layer_id}: {what}")


@dataclass(eq=False)
class BoundLayer:
    """A layer with its cache. ``sinks`` is what the model passes, of any float type; kernels read the float32 copy in
    ``arguments``, which follows it when weights are loaded anew."""

    form: LayerForm
    cache: fi.KVCache
    arguments: fi.LayerArgs
    sinks: Tensor | None
    version: int

    @classmethod
    def of(cls, layer: Any, keys: Tensor, values: Tensor, sinks: Tensor | None) -> BoundLayer:
        """``keys`` [slots, Hkv, D] and ``values`` [slots, Hkv, Dv] of the pool: pages of one token."""
        check_layer(layer)
        kv_format = format_of(keys.dtype)
        asked = {"soft_cap": layer.logit_cap, "sinks": sinks is not None}
        heads, kv_heads, head_dim, head_dim_vo = geometry_of(layer)
        features = frozenset(name for name, value in asked.items() if value)
        form = LayerForm(heads, kv_heads, head_dim, kv_format, features, head_dim_vo)
        scales = (_scale(layer, "k"), _scale(layer, "v")) if kv_format.startswith("fp8") else (None, None)
        cache = fi.KVCache(keys.unsqueeze(1), values.unsqueeze(1), "NHD", kv_format, *scales)
        copy = None if sinks is None else sinks.detach().to(torch.float32, copy=True).contiguous()
        arguments = fi.LayerArgs(float(layer.scaling), layer.logit_cap or None, window_of(layer), copy)
        return cls(form, cache, arguments, sinks, _version(sinks))

    def follow(self, sinks: Tensor | None) -> None:
        """Take over sinks that were loaded since, into the tensor that captured graphs read."""
        if sinks is None or (sinks is self.sinks and _version(sinks) == self.version):
            return
        if self.arguments.sinks is None:
            raise NotImplementedError("fi-sglang: a layer that passes sinks in some calls only")
        self.arguments.sinks.copy_(sinks)
        self.sinks, self.version = sinks, _version(sinks)


def _scale(layer: Any, name: str) -> float | Tensor | None:
    """An FP8 scale: a number where SGLang has it on the host."""
    number = getattr(layer, f"{name}_scale_float")
    return number if number is not None else getattr(layer, f"{name}_scale")


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
