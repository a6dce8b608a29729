"""A backend whose attention serves decode alone: the engine takes it for decode steps and another for the rest."""

from __future__ import annotations

import importlib
import io
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fi_core.contract import Between, KernelEntry
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from fi_core.reference.attention import ReferenceAttention, ReferenceState
from fi_core.reference.plugin import RULES
from fi_core.registry import KernelRegistry, registry
from fi_core.rope import RopeConfig, RopeTable
from fi_engine.config import EngineConfig, ModelConfig
from fi_engine.demo import run_demo
from fi_engine.engine import Engine
from fi_engine.model import Layer, Model
from fi_sampling import SamplingParams
from torch import Tensor

NUM_TOKENS = 20
PROMPT_LENGTHS = (5, 16, 17, 61)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SIZES = {"max_batch": 8, "max_step_tokens": 128, "max_model_len": 128, "num_pages": 80}


class OneToken(ReferenceAttention):
    """The reference for requests of one new token, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []
        self.calls = 0

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> ReferenceState:
        assert capacity.max_q_len == 1 and capacity.max_q_tokens == capacity.max_batch
        kernel, state = self, super().plan(spec, capacity, device)
        update, run = state.update, state.run

        def updated(batch: Batch) -> None:
            lens = batch.q_indptr.diff().tolist()
            assert set(lens) <= {0, 1} and len(lens) == len(batch.kv_lens)
            kernel.steps.append(lens)
            update(batch)

        def ran(q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
            kernel.calls += 1
            run(q, kv, layer, out, lse)

        state.update, state.run = updated, ran  # type: ignore[method-assign]
        return state


@pytest.fixture
def one_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneToken]:
    """A registry in which the backend ``one_token`` goes before the reference."""
    kernel = OneToken()
    rules = {**RULES["attention"], "max_q_len": Between(1, 1)}

    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo("one_token", "1.0", "decode alone", priority=90)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        registry.add(KernelEntry("attention", "decode", "one_token", rules, lambda: kernel, devices=("cpu",)))

    made = KernelRegistry(tuple(registry().operations.values()))
    made.discover()
    plugin = types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels)
    made.register_plugin(plugin, "one_token")
    monkeypatch.setattr(importlib.import_module("fi_core.registry"), "_registry", made)
    yield kernel


def random_model(device: torch.device, dtype: torch.dtype) -> Model:
    """A decoder of two layers with the heads of SmolLM2-135M and random weights."""
    torch.manual_seed(3)
    config = ModelConfig(
        architecture="llama",
        num_layers=2,
        hidden_size=192,
        intermediate_size=256,
        num_qo_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=320,
        max_position=128,
        norm_eps=1e-5,
        rope=RopeConfig(64),
        tied_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        eos_ids=frozenset(),
    )

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.3).to(device, dtype)

    def norm() -> Tensor:
        return torch.empty(config.hidden_size).uniform_(0.5, 1.5).to(device, dtype)

    layers = [
        Layer(
            input_norm=norm(),
            qkv=weight(15 * 64, 192),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            attention_out=weight(192, 9 * 64),
            post_norm=norm(),
            gate_up=weight(2 * 256, 192),
            down=weight(192, 256),
        )
        for _ in range(config.num_layers)
    ]
    embedding = weight(config.vocab_size, 192)
    return Model(config, embedding, layers, norm(), embedding, RopeTable.make(config.rope, device, 128))


def answers(model: Model, **config: Any) -> tuple[Engine, Sequence[Sequence[int]]]:
    """Greedy tokens of prompts that all fit into the first step, so that later steps decode all of them."""
    engine = Engine(model, None, EngineConfig(**{**SIZES, **config}))
    prompts = [[(7 * i + 13 * length) % 320 for i in range(length)] for length in PROMPT_LENGTHS]
    outputs = engine.generate(prompts, GREEDY)
    assert [output.error for output in outputs] == [None] * len(prompts)
    assert engine.stats.num_decode_steps == NUM_TOKENS - 1
    return engine, [output.token_ids for output in outputs]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_decode_steps_take_the_kernel_and_others_do_not(one_token: OneToken, cuda_graphs: bool) -> None:
    model = random_model(torch.device("cpu"), torch.float32)
    engine, tokens = answers(model, cuda_graphs=cuda_graphs)
    assert engine._runner.decode_plan.selection.entry.full_name == "one_token.decode"
    assert engine._runner.mixed_plan.selection.entry.full_name == "reference.attention"
    # One update and one call a layer for each step that decodes: the prefill took the other kernel.
    assert one_token.steps == [[1] * len(PROMPT_LENGTHS)] * (NUM_TOKENS - 1)
    assert one_token.calls == 2 * (NUM_TOKENS - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("fi_core.registry"), "_registry", None)
        assert answers(model)[1] == tokens


@pytest.mark.model
def test_the_table_of_the_demo_names_both_kernels(one_token: OneToken, model_path: Path) -> None:
    out = io.StringIO()
    run_demo(model_path, "cpu", out)
    shown = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("attention ")]
    assert sorted(shown) == ["one_token.decode", "reference.attention"] and one_token.calls > 0


@pytest.mark.gpu
def test_decode_steps_replay_the_cuda_kernel_as_direct_steps_run_it() -> None:
    model = random_model(torch.device("cuda", 0), torch.bfloat16)
    # A batch that is a bucket of its own: both run the same kernels on the same shapes.
    (replayed, tokens), (direct, directly) = (answers(model, cuda_graphs=graphs) for graphs in (True, False))
    assert tokens == directly
    for engine in (replayed, direct):
        runner = engine._runner
        assert runner.decode_plan.selection.entry.full_name == "cuda.attention_decode"
        assert runner.mixed_plan.selection.entry.full_name == "cuda.attention_prefill"
        assert "planner: device" in runner.decode_plan.explain()
    (runner,) = replayed._runner._graphs.values()
    assert "4: CUDA graph" in runner.describe() and direct._runner._graphs == {}
    # Two sets of graphs and padded buckets after one another over one plan.
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True)
    first, again = ([output.token_ids for output in replayed.generate([[5, 6], [7], [8]], params)] for _ in range(2))
    assert first == again and len(replayed._runner._graphs) == 2
    assert answers(model)[1] == tokens
