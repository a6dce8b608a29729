"""What a model looks like and how an engine is sized."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fi_core.errors import ArgumentError
from fi_core.rope import RopeConfig
from fi_scheduler.sharing import SharingRates

Architecture = Literal["llama", "qwen2", "qwen3"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: pre-norm blocks of grouped-query attention with RoPE (half pairs) and SwiGLU.

    ``qkv_bias``: q, k and v projections have a bias (Qwen2). ``qk_norm``: RMSNorm over each head of q and k before RoPE
    (Qwen3). ``tied_embeddings``: the output projection is the embedding. ``eos_ids`` end a generation.
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class EngineConfig:
    """Capacities of an engine; all memory is allocated when it is made.

    ``max_batch``: requests that run at once. ``max_step_tokens``: tokens of one step over all requests (longer prompts
    are prefilled in chunks). ``max_model_len``: prompt and output tokens of one request (None: what the model was
    trained for, at most 8192). ``num_pages`` pages of ``page_size`` tokens hold keys and values (None: enough for
    ``max_batch`` full requests, within 512 MiB on a CPU and half of the free memory on a GPU). ``prefix_cache`` keeps the
    pages of finished prompts for requests that begin alike. ``cuda_graphs``: replay decode steps as CUDA graphs.
    ``shared_prefixes``: attend to pages that several running requests share once for all of them, where the kernel in use
    can and it pays by ``sharing_rates`` (None: those measured on this device; without any, no prefix is shared so).
    ``Engine.explain_sharing`` says what is done and why.
    """

    max_batch: int = 32
    max_step_tokens: int = 512
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    prefix_cache: bool = True
    cuda_graphs: bool = True
    shared_prefixes: bool = True
    sharing_rates: SharingRates | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sharing_rates, (SharingRates, type(None))):
            raise ArgumentError("config.sharing_rates", "SharingRates or None", repr(self.sharing_rates))
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "sharing_rates":
                continue
            if isinstance(value, bool) != (item.type == "bool"):
                raise ArgumentError(f"config.{item.name}", str(item.type), value)
            if item.type != "bool" and value is not None and (not isinstance(value, int) or value <= 0):
                raise ArgumentError(f"config.{item.name}", "a positive int", value)
        if self.max_step_tokens < self.max_batch:
            expected = f"at least max_batch={self.max_batch} (a decode step has a token of each)"
            raise ArgumentError("config.max_step_tokens", expected, self.max_step_tokens)
