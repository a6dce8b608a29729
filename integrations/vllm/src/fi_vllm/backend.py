"""The attention backend that vLLM's registry holds in the slot CUSTOM: what it supports, and the memory of its cache."""

from __future__ import annotations

from typing import ClassVar

import fi_core as fi
import torch
from fi_adapters.forms import MAX_PAGE, LayerForm, kv_format_of, refusal
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImplBase, MultipleOf
from vllm.v1.attention.backends.utils import get_kv_cache_layout

from .impl import FiImpl
from .metadata import FiMetadataBuilder

_STRIDE_ORDERS = {
    ("NHD", False): (0, 1, 2, 3, 4),
    ("HND", False): (0, 1, 3, 2, 4),
    ("NHD", True): (1, 0, 2, 3, 4, 5),
    ("HND", True): (1, 2, 4, 0, 3, 5),
}
"""(layout, with a leading dim of layers) -> the order of the logical dims in memory. Pages come first where layers are
included, so that a page of all layers is one piece."""


_SOME_PAGE = 16
_SOME_PROMPT = 256
"""What is asked of fi where vLLM does not say yet: a page, and a request's new tokens in a step."""


class FiBackend(AttentionBackend):
    """Decoder attention of fi. A cache is [pages, 2, tokens, heads, dim]: K and V are views of it, whatever its strides."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in its enum of backends

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        return FiImpl

    @staticmethod
    def get_builder_cls() -> type[FiMetadataBuilder]:
        return FiMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Every size up to fi's largest page; vLLM cuts a larger block into the largest of these that divides it."""
        return list(range(1, MAX_PAGE + 1))

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return _STRIDE_ORDERS[get_kv_cache_layout(), include_num_layers_dimension]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        device_capability: object,
    ) -> str | None:
        """fi's own reasons where no kernel serves such layers; what depends on their number of heads shows when the plans
        are made, before the engine serves."""
        cache_dtype = kv_cache_dtype or "auto"
        if (
            use_mla
            or use_sparse
            or cache_dtype not in cls.supported_kv_cache_dtypes
            or dtype not in cls.supported_dtypes
        ):
            return None  # vLLM has its own words for these
        features = frozenset({"sinks"} if has_sink else ())
        form = LayerForm(1, 1, head_size, kv_format_of(cache_dtype, dtype), features)
        page_size = min(block_size or _SOME_PAGE, MAX_PAGE)
        why_not = refusal(form.spec(dtype, page_size), _SOME_PROMPT, _target(device_capability))
        return None if why_not is None else str(why_not)


def _target(capability: object) -> fi.Target:
    """Where vLLM's platform runs kernels."""
    if current_platform.device_type != "cuda":
        return fi.Target(current_platform.device_type)
    return fi.Target("cuda", (capability.major, capability.minor))  # type: ignore[attr-defined]
