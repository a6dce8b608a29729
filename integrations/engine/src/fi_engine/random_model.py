"""Models of a known shape with random weights: what speed is measured on where the weights themselves do not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from fi_core.rope import Llama3Scaling, RopeConfig
from torch import Tensor

from .checkpoint import Checkpoint, Progress
from .config import ModelConfig
from .model import Model, load_model

_LLAMA_8B = ModelConfig(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_qo_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
    norm_eps=1e-5,
    rope=RopeConfig(128, base=500000.0, scaling=Llama3Scaling()),
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    eos_ids=frozenset({128001, 128009}),
)
SHAPES: Mapping[str, ModelConfig] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.2-1b": replace(
        _LLAMA_8B,
        num_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        head_dim=64,
        rope=RopeConfig(64, base=500000.0, scaling=Llama3Scaling(factor=32.0)),
        tied_embeddings=True,
    ),
    "smollm2-135m": replace(
        _LLAMA_8B,
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_qo_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position=8192,
        rope=RopeConfig(64, base=100000.0),
        tied_embeddings=True,
        eos_ids=frozenset({0, 2}),
    ),
}
"""Shapes by name, from the models' published configurations."""

_SEED = 0


def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, max_position: int, progress: Progress
) -> Model:
    """A model of that shape, equal every time: norms of ones, other weights normal with a deviation of 1 / sqrt(inputs), so
    that activations keep their size. Made on ``device``; ``max_position`` as in load_model."""
    generator = torch.Generator(device).manual_seed(_SEED)
    rows = _rows_of(config)

    def read(name: str) -> Tensor:
        shape = rows[name.split(".")[-2]]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        weights = torch.empty(shape, dtype=dtype, device=device)
        return weights.normal_(0.0, shape[1] ** -0.5, generator=generator)

    return load_model(Checkpoint(Path("random weights"), config, read, None), device, dtype, max_position, progress)


def _rows_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by the last part of their module's name; models with biases are not among SHAPES."""
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_qo_heads * dim, config.num_kv_heads * dim
    return {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (q_rows, hidden),
        "k_proj": (kv_rows, hidden),
        "v_proj": (kv_rows, hidden),
        "o_proj": (hidden, q_rows),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), (hidden,)),
    }
