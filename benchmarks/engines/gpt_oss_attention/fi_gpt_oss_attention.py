"""A plugin for vLLM and SGLang: Llama's layers with gpt-oss's attention, sinks everywhere and a window in every other layer.

Put this folder on PYTHONPATH, whatever the attention backend. With it a dense model shows the attention of gpt-oss where the
engine's libraries for mixtures of experts are missing. The sinks are the same numbers in every process.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

WINDOW = 128


def sinks_of(layer: int, num_heads: int) -> torch.Tensor:
    """bfloat16 [num_heads] on torch's default device."""
    generator = torch.Generator().manual_seed(100 + layer)
    return torch.randn(num_heads, generator=generator, device="cpu").to(torch.get_default_device()).to(torch.bfloat16)


def patch_vllm() -> None:
    """The entry point of vLLM."""
    import vllm.model_executor.models.llama as llama
    from vllm.model_executor.models.utils import extract_layer_index

    engine_class = llama.Attention
    if isinstance(engine_class, functools.partial) or engine_class.__name__ == "attention":
        return

    def attention(num_heads: int, *arguments: Any, prefix: str = "", **named: Any) -> Any:
        layer = extract_layer_index(prefix)
        named["per_layer_sliding_window"] = WINDOW if layer % 2 == 0 else None
        return engine_class(num_heads, *arguments, prefix=prefix, sinks=sinks_of(layer, num_heads), **named)

    llama.Attention = attention


def patch_sglang() -> None:
    """The entry point of SGLang, whose window counts the tokens before the query."""
    import sglang.srt.models.llama as llama

    engine_class = llama.RadixAttention
    if engine_class.__name__ == "SinkAttention":
        return

    class SinkAttention(engine_class):  # type: ignore[misc, valid-type]
        def __init__(self, num_heads: int, *arguments: Any, layer_id: int, **named: Any) -> None:
            named["sliding_window_size"] = WINDOW - 1 if layer_id % 2 == 0 else -1
            super().__init__(num_heads, *arguments, layer_id=layer_id, **named)
            self.register_buffer("sinks", sinks_of(layer_id, num_heads), persistent=False)

        def forward(self, *arguments: Any, **named: Any) -> Any:
            return super().forward(*arguments, sinks=self.sinks, **named)

    llama.RadixAttention = SinkAttention
    llama.LlamaForCausalLM.get_attention_sliding_window_size = lambda self: WINDOW - 1
