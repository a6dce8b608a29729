"""Random-weight models for the engines: folders with a config and weights, which vLLM, SGLang and transformers load alike.

usage: python models.py KIND FOLDER [--size tiny|small|8b] [--config-only]
KIND: llama, qwen3, gemma2 (soft-cap, every other layer a window, head_dim 256), gpt_oss (dense Llama layers with head_dim 64,
to which the plugin in gpt_oss_attention gives sinks and windows). "tiny" runs on a CPU, "small" is for correctness on a GPU, "8b"
is Llama-3.1-8B's shape (with --config-only for engines that make weights themselves). Weights are drawn wide (standard deviation
0.2 where tiny), so that greedy choices are far apart and tokens can be compared.
"""

from __future__ import annotations

import argparse
from typing import Any

KINDS = ("llama", "qwen3", "gemma2", "gpt_oss")

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    },
    "small": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.06,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
    },
}

_HEAD_DIMS = {
    "tiny": {"llama": 32, "qwen3": 32, "gemma2": 32, "gpt_oss": 32},
    "small": {"llama": 128, "qwen3": 128, "gemma2": 256, "gpt_oss": 64},
    "8b": {"llama": 128, "qwen3": 128, "gemma2": 256, "gpt_oss": 64},
}
_WINDOWS = {"tiny": 24, "small": 128, "8b": 4096}


def config_of(kind: str, size: str) -> Any:
    """The transformers config of ``kind`` in ``size``."""
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config

    common = {**_SIZES[size], "head_dim": _HEAD_DIMS[size][kind], "tie_word_embeddings": False, "dtype": "bfloat16"}
    if kind in ("llama", "gpt_oss"):
        return LlamaConfig(**common)
    if kind == "qwen3":
        return Qwen3Config(**common)
    gelu = "gelu_pytorch_tanh"
    own = {"tie_word_embeddings": True, "hidden_activation": gelu, "hidden_act": gelu}  # SGLang reads the older name
    scalar = common["head_dim"]
    return Gemma2Config(**{**common, **own}, sliding_window=_WINDOWS[size], query_pre_attn_scalar=scalar)


def write(kind: str, folder: str, size: str = "tiny", config_only: bool = False) -> None:
    """Write the model to ``folder``, its weights drawn with seed 0."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(kind, size)
    if config_only:
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(folder)
        return
    torch.manual_seed(0)
    dtype = torch.float32 if size == "tiny" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=sorted(_SIZES), default="tiny")
    parser.add_argument("--config-only", action="store_true")
    options = parser.parse_args()
    write(options.kind, options.folder, options.size, options.config_only)


if __name__ == "__main__":
    main()
