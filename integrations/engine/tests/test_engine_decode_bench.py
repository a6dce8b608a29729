"""Models of random weights, and the measurements of steady decode and of the time to a prompt's first token."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from fi_core.errors import ArgumentError
from fi_core.rope import RopeConfig
from fi_engine import prompt_bench
from fi_engine.cli import main
from fi_engine.decode_bench import Workload, run_decode_bench, steady_speed
from fi_engine.prompt_bench import Prompt, run_prompt_bench
from fi_engine.random_model import SHAPES, random_model

TINY = replace(
    SHAPES["llama-3.1-8b"], num_layers=2, hidden_size=64, intermediate_size=96, num_qo_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=100, max_position=256, rope=RopeConfig(16), eos_ids=frozenset(),
)  # fmt: skip


def quiet(line: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, torch.device("cpu"), torch.float32, TINY.max_position, quiet)


def test_a_random_model_has_its_shape_and_is_the_same_every_time(model):
    again = random_model(TINY, torch.device("cpu"), torch.float32, TINY.max_position, quiet)
    assert model.layers[1].qkv.shape == (128, 64) and model.layers[1].gate_up.shape == (192, 64)
    assert model.output.shape == (100, 64) and model.output is not model.embedding
    assert torch.equal(model.layers[1].down, again.layers[1].down)
    assert not torch.equal(model.layers[0].down, model.layers[1].down)
    assert (model.final_norm == 1).all()
    assert model.layers[0].down.std() == pytest.approx(96**-0.5, rel=0.1)


def test_every_shape_has_a_weight_for_each_name():
    for config in SHAPES.values():
        small = replace(config, num_layers=1, hidden_size=32, intermediate_size=48, vocab_size=50, max_position=8)
        assert random_model(small, torch.device("cpu"), torch.float32, 8, quiet).layers[0].qkv.shape[1] == 32


def test_lengths_are_mixed_and_within_their_range():
    prompts = Workload(20, 5, 60).prompts(100)
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) == 5 and max(lengths) == 60 and lengths != sorted(lengths)
    assert prompts == Workload(20, 5, 60).prompts(100)
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)


def test_the_timed_steps_hold_all_requests(model, monkeypatch):
    sizes = []
    from fi_engine import decode_bench

    step = decode_bench.Engine.step

    def counted(engine):
        chunks = step(engine)
        sizes.append(len(chunks))
        return chunks

    monkeypatch.setattr(decode_bench.Engine, "step", counted)
    speed = steady_speed(model, Workload(6, 3, 40), 10, None)
    assert sizes[-18:] == [6] * 18
    assert speed.tokens_per_second == pytest.approx(6 / speed.step_seconds)
    assert speed.kernel_seconds is None and speed.attention_seconds is None


def test_each_backend_has_a_line(model):
    out = io.StringIO()
    found = run_decode_bench(model, Workload(2, 3, 9), 3, ["default", "reference"], out, quiet)
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == list(found) == ["default", "reference"]


@pytest.mark.parametrize("numbers", [(0, 1, 2), (1, 0, 2), (1, 3, 2)])
def test_wrong_workloads_are_named(numbers):
    with pytest.raises(ArgumentError, match="^(num_requests|shortest): "):
        Workload(*numbers)


def test_the_command_names_what_is_wrong(capsys):
    assert main(["bench-decode", "--random", "llama-3.1-8b", "--batch", "0", "--device", "cpu"]) == 1
    assert "num_requests: expected at least 1" in capsys.readouterr().err


# Prompts


@pytest.mark.parametrize(("chunk", "steps"), [(None, 1), (40, 3), (100, 1)])
def test_a_prompt_takes_its_steps_until_the_first_token(model, monkeypatch, chunk, steps):
    taken, made = [], []
    engine_of = prompt_bench.Engine

    class Counted(engine_of):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def step(self):
            taken.append(self.num_unfinished)
            return super().step()

    monkeypatch.setattr(prompt_bench, "Engine", Counted)
    assert prompt_bench.seconds_to_first_token(model, Prompt(100, chunk), None) > 0
    assert len(made) == 1 and len(taken) == 4 * steps == 4 * Prompt(100, chunk).num_steps


def test_each_prompt_and_backend_has_a_line(model):
    out = io.StringIO()
    found = run_prompt_bench(model, [Prompt(30), Prompt(30, 16)], ["default", "reference"], out, quiet)
    names = [
        f"{backend}, 30 tokens {how}"
        for how in ("in one step", "in 2 steps of 16")
        for backend in ("default", "reference")
    ]
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == list(found) == names
    assert all(milliseconds > 0 for milliseconds in found.values())


@pytest.mark.parametrize(("numbers", "name"), [((0,), "length"), ((9, 0), "chunk")])
def test_wrong_prompts_are_named(numbers, name):
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        Prompt(*numbers)


def test_the_prompt_command_names_what_is_wrong(capsys):
    assert main(["bench-prompt", "--random", "llama-3.1-8b", "--length", "0", "--device", "cpu"]) == 1
    assert "length: expected at least 1" in capsys.readouterr().err
