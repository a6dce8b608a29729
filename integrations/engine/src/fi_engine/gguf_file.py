"""Llama-family models from GGUF files, through the ``gguf`` library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fi_core.rope import LinearScaling, RopeConfig, YarnScaling
from gguf import GGUFReader, ReaderField
from gguf.quants import dequantize
from torch import Tensor

from .checkpoint import Checkpoint, Progress, positive_int, positive_number, token_id
from .config import ARCHITECTURES, ModelConfig
from .errors import ModelFileError
from .tokenizer import TextCodec
from .tokenizer_build import build_bpe

_GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class _NamingReader(GGUFReader):
    """The library's reader, whose errors for a file that is cut short or no GGUF say how far it came."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            super().__init__(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            # What numpy views that end early and unknown type codes raise.
            last = next(reversed(self.fields)) if getattr(self, "fields", None) else "the beginning"
            problem = f"not a complete GGUF file of {path.stat().st_size} bytes ({error})"
            raise ModelFileError(path, f"metadata after {last}", problem) from error

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        built = []
        for item in fields:
            try:
                super()._build_tensors(start_offs, [item])
            except (ValueError, IndexError) as error:
                problem = f"cut short, the file ends at {self._path.stat().st_size} bytes ({error})"
                raise ModelFileError(self._path, f"tensor {bytes(item.parts[1]).decode()}", problem) from error
            built += self.tensors
        self.tensors = built


class _Fields:
    """Typed access to the metadata; errors name the file and the field."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self._path = path
        self._values = reader.fields
        self.architecture = ""
        self.architecture = str(self.get("general.architecture"))

    def name(self, key: str) -> str:
        """``key`` with the architecture in the place of "{arch}"."""
        return key.replace("{arch}", self.architecture)

    def find(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        found = self._values.get(self.name(key))
        return default if found is None else found.contents()

    def get(self, key: str) -> Any:
        value = self.find(key)
        if value is None:
            raise ModelFileError(self._path, f"field {self.name(key)}", "missing")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key) if default is None else self.find(key, default)
        return positive_int(self._path, self.name(key), value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key) if default is None else self.find(key, default)
        return positive_number(self._path, self.name(key), value)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """The token called ``name`` (bos, eos ...), or None if the file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.find(key)
        return None if value is None else token_id(self._path, key, value, vocab_size)


def open_gguf(path: Path, progress: Progress) -> Checkpoint:
    """Open a GGUF file: metadata and tokeniser now, each tensor when it is read. Raises ModelFileError."""
    progress(f"reading {path.name}")
    reader = _NamingReader(path)
    fields = _Fields(path, reader)
    if fields.architecture not in ARCHITECTURES:
        problem = f"{fields.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        raise ModelFileError(path, "field general.architecture", problem)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, fields, tensors)
    divisors = tensors.get("rope_freqs.weight")
    return Checkpoint(
        path,
        config,
        _Reader(config, tensors),
        _codec(path, fields, config),
        None if divisors is None else _float32(divisors),
    )


def _config(path: Path, fields: _Fields, tensors: Mapping[str, Any]) -> ModelConfig:
    num_heads = fields.count("{arch}.attention.head_count")
    hidden_size = fields.count("{arch}.embedding_length")
    head_dim = fields.count("{arch}.attention.key_length", hidden_size // num_heads)
    if "token_embd.weight" not in tensors:
        raise ModelFileError(path, "tensor token_embd.weight", "missing")
    rope = _rope(path, fields, head_dim)
    if fields.architecture == "llama" and rope.rotary_dim != head_dim:
        # The rows of q and k are stored permuted over whole heads, which undoes only if whole heads rotate.
        problem = f"{rope.rotary_dim} is not the head dim {head_dim}"
        raise ModelFileError(path, "field llama.rope.dimension_count", problem)
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    eos = [fields.token_id(name, vocab_size) for name in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=fields.architecture,  # type: ignore[arg-type]
        num_layers=fields.count("{arch}.block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("{arch}.feed_forward_length"),
        num_qo_heads=num_heads,
        num_kv_heads=fields.count("{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position=fields.count("{arch}.context_length"),
        norm_eps=fields.number("{arch}.attention.layer_norm_rms_epsilon"),
        rope=rope,
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_ids=frozenset(item for item in eos if item is not None),
    )


def _rope(path: Path, fields: _Fields, head_dim: int) -> RopeConfig:
    rotary_dim = fields.count("{arch}.rope.dimension_count", head_dim)
    base = fields.number("{arch}.rope.freq_base", 10000.0)
    kind = fields.find("{arch}.rope.scaling.type", "none")
    scaling: LinearScaling | YarnScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(fields.number("{arch}.rope.scaling.factor"))
    elif kind == "yarn":
        original = fields.count("{arch}.rope.scaling.original_context_length")
        scaling = YarnScaling(fields.number("{arch}.rope.scaling.factor"), original)
    elif kind != "none":
        raise ModelFileError(path, "field rope.scaling.type", f"{kind!r} is not one of none, linear, yarn")
    return RopeConfig(rotary_dim, base, "half", scaling)


def _codec(path: Path, fields: _Fields, config: ModelConfig) -> TextCodec:
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        problem = f"{model!r} is not served; byte-level BPE ('gpt2') is"
        raise ModelFileError(path, "field tokenizer.ggml.model", problem)
    tokens = fields.get("tokenizer.ggml.tokens")
    pre_tokenizer = str(fields.find("tokenizer.ggml.pre", "gpt-2"))
    tokenizer = build_bpe(
        path,
        tokens,
        fields.get("tokenizer.ggml.merges"),
        fields.find("tokenizer.ggml.token_type", []),
        pre_tokenizer,
    )
    bos, eos = (fields.token_id(name, len(tokens)) for name in ("bos", "eos"))
    # Files of Llama 3 begin prompts with BOS without saying so.
    with_bos = fields.find("tokenizer.ggml.add_bos_token", pre_tokenizer == "llama-bpe")
    return TextCodec(
        tokenizer,
        prefix_ids=(bos,) if bos is not None and with_bos else (),
        chat_template=fields.find("tokenizer.chat_template"),
        special_texts={
            name: tokens[special] for name, special in (("bos_token", bos), ("eos_token", eos)) if special is not None
        },
    )


def _float32(stored: Any) -> Tensor:
    # Unquantised tensors come as read-only views of the mapped file, which torch must not be given: copied, others not.
    values: Tensor = torch.from_numpy(np.require(dequantize(stored.data, stored.tensor_type), requirements="W"))
    return values


class _Reader:
    """Reads tensors under their Hugging Face names, dequantised to float32."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Any]) -> None:
        self._config = config
        self._tensors = tensors

    def __call__(self, name: str) -> Tensor:
        stored = self._tensors[_stored_name(name)]
        values = _float32(stored)
        if self._config.architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            return self._unpermute(values)
        return values

    def _unpermute(self, rows: Tensor) -> Tensor:
        """Files of the llama architecture store the rows of q and k so that RoPE pairs are neighbours: bring them back to
        half pairs (i, i + rotary_dim / 2), the order of every other source."""
        half = self._config.head_dim // 2
        halves: Tensor = rows.unflatten(0, (-1, half, 2)).transpose(1, 2)
        return halves.reshape(rows.shape)


def _stored_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    stem, _, kind = name.rpartition(".")
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"
