"""Registration with ``torch.library``: how torch.compile and export see the operations.

Every operation is registered in one form: it writes outputs that its caller allocated and returns nothing, so the fake
kernel is empty and shapes are decided in plain, traceable Python. Eager code calls the implementation directly, which
saves the dispatcher's time; compiled code goes through ``torch.ops.fi``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .records import KVCache, KVFormat, KVLayout

_LIBRARY = torch.library.Library("fi", "DEF")


def register(schema: str, run: Callable[..., None]) -> Callable[..., None]:
    """Define ``torch.ops.fi.<name>`` and return it.

    ``schema`` is a torch operator schema that returns ``()`` and marks each tensor that ``run`` writes, such as
    ``"silu_mul(Tensor x, Tensor(a!) out) -> ()"``; ``run`` takes the same arguments. A public function ends with::

        (_OP if torch.compiler.is_compiling() else _run)(x, out)
    """
    if not schema.endswith("-> ()"):
        raise ValueError(f"an operation writes its outputs and returns nothing: {schema}")
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fi::{name}", _no_output, lib=_LIBRARY)
    operator: Callable[..., None] = getattr(torch.ops.fi, name).default
    return operator


def _no_output(*arguments: Any, **named: Any) -> None:
    """The fake kernel: nothing is allocated and no metadata changes."""


def cache_details(kv: KVCache) -> tuple[KVLayout, str, list[Tensor | None], list[float]]:
    """What an operator needs of ``kv`` besides K and V: layout, format, scales that are tensors, scales that are not."""
    scales = (kv.k_scale, kv.v_scale)
    tensors = [scale if isinstance(scale, Tensor) else None for scale in scales]
    values = [float(scale) if isinstance(scale, (int, float)) else 1.0 for scale in scales]
    return kv.layout, kv.format or "", tensors, values


def cache_of(
    k: Tensor, v: Tensor, layout: KVLayout, kv_format: KVFormat, scales: list[Tensor | None], values: list[float]
) -> KVCache:
    """The record that ``cache_details`` took apart."""
    is_fp8 = kv_format.startswith("fp8")
    k_scale, v_scale = (value if scale is None else scale for scale, value in zip(scales, values, strict=True))
    return KVCache(k, v, layout, kv_format, k_scale if is_fp8 else None, v_scale if is_fp8 else None)
