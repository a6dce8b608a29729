"""An engine's layers and limits as fi's specs and capacities, and the reasons against what fi does not serve fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import fi_core as fi
import torch
from fi_core.plan import attention_values
from fi_core.records import KVFormat, QFormat, format_of
from fi_core.registry import registry
from fi_core.settings import settings

KV_FORMATS: dict[str, KVFormat] = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
"""The engines' names of cache dtypes, without "auto", which is the model's dtype."""

REFERENCE = "reference"
"""The backend of fi that reads lengths on the host: for CPUs and for tests."""

MAX_PAGE = 256
"""Tokens of fi's largest page."""


def kv_format_of(cache_dtype: str, dtype: torch.dtype) -> KVFormat:
    """The storage format that the engines call ``cache_dtype``; ArgumentError for one that fi does not have."""
    if cache_dtype == "auto":
        return format_of(dtype)
    if cache_dtype not in KV_FORMATS:
        raise fi.ArgumentError("kv_cache_dtype", f"auto or one of {sorted(KV_FORMATS)}", cache_dtype)
    return KV_FORMATS[cache_dtype]


@dataclass(frozen=True)
class LayerForm:
    """What must be equal for layers to share a plan, apart from what the whole engine has in common. The window is left out,
    since a plan serves several; ``features`` as in AttentionSpec."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    kv_format: KVFormat
    features: frozenset[str] = frozenset()
    head_dim_vo: int | None = None
    q_format: QFormat = "same"

    def spec(
        self,
        dtype: torch.dtype,
        page_size: int,
        windows: Iterable[int | None] = (None,),
        batch_invariant: bool = False,
    ) -> fi.AttentionSpec:
        """The spec of such layers: causal, over a paged cache with a dense table."""
        return fi.AttentionSpec(
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim_vo,
            dtype,
            self.kv_format,
            page_size,
            windows=tuple(dict.fromkeys(windows)),
            features=self.features,
            batch_invariant=batch_invariant,
            q_format=self.q_format,
        )


@dataclass(frozen=True)
class Limits:
    """Upper bounds of an engine's steps.

    ``max_batch`` requests, ``max_tokens`` new tokens a step, ``max_kv_len`` tokens a request; ``decode_len``: most new
    tokens of a request in a step that only decodes (1, and with speculation the drafted ones).
    """

    max_batch: int
    max_tokens: int
    max_kv_len: int
    decode_len: int = 1

    def capacity(self, decode: bool, max_prefixes: int = 0, max_depth: int = 1) -> fi.Capacity:
        """Of the plan for steps that only decode, or of the one for every step. ``max_prefixes``: shared prefixes in a step, of
        which ``max_depth`` lie within one another."""
        longest = min(self.decode_len if decode else self.max_tokens, self.max_kv_len)
        tokens = self.max_batch * longest if decode else self.max_tokens
        return fi.Capacity(self.max_batch, tokens, longest, self.max_kv_len, max_prefixes, max_prefix_depth=max_depth)


def refusal(
    spec: fi.AttentionSpec, max_q_len: int, target: fi.Target, levels: bool = False
) -> fi.UnsupportedError | None:
    """Why fi does not serve ``spec`` (with ``levels``: in batches that share prefixes) at ``target`` fast, None where it does.

    On a GPU the torch reference does not count, unless FI_BACKEND asks for it: it would be slow and wait for the device.
    """
    request = registry().operations["attention"].request(target, **attention_values(spec, max_q_len, levels))
    try:
        chosen = registry().select(request)
    except fi.UnsupportedError as error:
        return error
    if chosen.entry.backend != REFERENCE or target.device_type == "cpu" or wants_reference():
        return None
    only_if = f"reads lengths on the host, so FI_BACKEND={REFERENCE} must ask for it"
    return fi.UnsupportedError(request, (*chosen.rejected, (chosen.entry.full_name, (only_if,))))


def wants_reference() -> bool:
    """Whether the user's FI_BACKEND names the torch reference."""
    return settings().backend == REFERENCE


def is_captured(device_type: str) -> bool:
    """Whether steps may be captured into CUDA graphs: kernels plan on the device, and nobody compares them call by call.

    A replayed graph calls no Python, so FI_SHADOW would see nothing; the reference reads lengths on the host.
    """
    return device_type == "cuda" and not wants_reference() and settings().shadow == 0
