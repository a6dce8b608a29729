"""The decoder: plain torch matmuls, and fi operations for everything between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import fi_core as fi
import torch
from fi_core import Batch, KVCache, Plan, RopeConfig, RopeTable
from torch import Tensor
from torch.nn import functional

from .checkpoint import Checkpoint, Progress
from .config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """Weights of one block, projections that read the same input fused (rows: q then k then v; gate then up)."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Model:
    """A decoder on one device; ``forward`` takes a packed batch of new tokens of any requests."""

    config: ModelConfig
    embedding: Tensor
    layers: Sequence[Layer]
    final_norm: Tensor
    output: Tensor
    rope: RopeTable

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(
        self, tokens: Tensor, batch: Batch, caches: Sequence[KVCache], plan: Plan, rows: Tensor | None
    ) -> Tensor:
        """Logits [N, vocab] of the token rows ``rows`` int [N] (None: all); writes new keys and values into ``caches``.

        ``tokens`` int [T]; ``batch`` says which token belongs to which request, and ``plan`` was updated with it.
        """
        config = self.config
        residual = functional.embedding(tokens, self.embedding)
        x = fi.rmsnorm(residual, self.layers[0].input_norm, config.norm_eps)
        for layer_idx, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = self._attention(x, layer, batch, cache, plan)
            x = fi.add_rmsnorm(x, residual, layer.post_norm, config.norm_eps)
            x = functional.linear(fi.silu_mul(functional.linear(x, layer.gate_up)), layer.down)
            is_last = layer_idx + 1 == len(self.layers)
            next_norm = self.final_norm if is_last else self.layers[layer_idx + 1].input_norm
            x = fi.add_rmsnorm(x, residual, next_norm, config.norm_eps)
        return functional.linear(x if rows is None else x.index_select(0, rows), self.output)

    def _attention(self, x: Tensor, layer: Layer, batch: Batch, cache: KVCache, plan: Plan) -> Tensor:
        config = self.config
        heads = (config.num_qo_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], sum(heads), config.head_dim)
        q, k, v = qkv.split(heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = fi.rmsnorm(q, layer.q_norm, config.norm_eps)
            k = fi.rmsnorm(k, layer.k_norm, config.norm_eps)
        fi.append_kv(k, v, cache, batch, rope=self.rope, q=q)
        attended = fi.attention(q, cache, plan)
        return functional.linear(attended.flatten(1), layer.attention_out)


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, max_position: int, progress: Progress
) -> Model:
    """Read all weights onto ``device`` as ``dtype``; raises ModelFileError naming a tensor that is missing or misshaped.

    ``max_position`` is the number of positions the RoPE table holds.
    """
    config = checkpoint.config
    reader = _WeightReader(checkpoint, device, dtype)
    hidden = config.hidden_size
    embedding = reader.read(("model.embed_tokens.weight", config.vocab_size, hidden))
    layers = []
    for layer_idx in range(config.num_layers):
        progress(f"loading layer {layer_idx + 1} of {config.num_layers}")
        layers.append(_read_layer(reader, config, f"model.layers.{layer_idx}"))
    return Model(
        config,
        embedding,
        layers,
        final_norm=reader.read(("model.norm.weight", hidden)),
        output=embedding if config.tied_embeddings else reader.read(("lm_head.weight", config.vocab_size, hidden)),
        rope=_rope_table(config.rope, checkpoint.rope_divisors, device, max_position),
    )


class _WeightReader:
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype

    def read(self, *parts: tuple[str, *tuple[int, ...]]) -> Tensor:
        """The tensors (name, *shape), concatenated by rows, on the device."""
        found = [self._checkpoint.tensor(name, *shape) for name, *shape in parts]
        joined = found[0] if len(found) == 1 else torch.cat(found)
        return joined.to(device=self._device, dtype=self._dtype)


def _read_layer(reader: _WeightReader, config: ModelConfig, name: str) -> Layer:
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_qo_heads * dim, config.num_kv_heads * dim
    qkv_rows = (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    bias = [(f"{attention}.{part}_proj.bias", rows) for part, rows in qkv_rows]
    return Layer(
        input_norm=reader.read((f"{name}.input_layernorm.weight", hidden)),
        qkv=reader.read(*((f"{attention}.{part}_proj.weight", rows, hidden) for part, rows in qkv_rows)),
        qkv_bias=reader.read(*bias) if config.qkv_bias else None,
        q_norm=reader.read((f"{attention}.q_norm.weight", dim)) if config.qk_norm else None,
        k_norm=reader.read((f"{attention}.k_norm.weight", dim)) if config.qk_norm else None,
        attention_out=reader.read((f"{attention}.o_proj.weight", hidden, q_rows)),
        post_norm=reader.read((f"{name}.post_attention_layernorm.weight", hidden)),
        gate_up=reader.read((f"{mlp}.gate_proj.weight", width, hidden), (f"{mlp}.up_proj.weight", width, hidden)),
        down=reader.read((f"{mlp}.down_proj.weight", hidden, width)),
    )


def _rope_table(config: RopeConfig, divisors: Tensor | None, device: torch.device, max_position: int) -> RopeTable:
    if divisors is None:
        return RopeTable.make(config, device, max_position)
    frequencies = config.inv_freq() / divisors.double()
    angles = torch.outer(torch.arange(max_position, dtype=torch.float64), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=1) * config.attention_factor
    return RopeTable(config, frequencies.to(device, torch.float32), table.to(device, torch.float32))
