"""Samples of one prompt: it is computed once, they share its pages, and each is what it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fi_core.errors import ArgumentError
from fi_engine import Engine
from fi_engine.runner import StepInput
from fi_sampling import SamplingParams
from fi_scheduler.sharing import ALWAYS

NUM_TOKENS = 20
PROMPT = [(5 * i) % 320 for i in range(37)]
DRAWN = SamplingParams(temperature=1.5, seed=11, n=4, max_tokens=NUM_TOKENS)


def _engine(loaded: Any, **config: Any) -> Engine:
    engine: Engine = loaded.engine(**{"max_batch": 8, "max_model_len": 128, "num_pages": 200, **config})
    # What a page held before must not matter, and a page that was not copied must be seen.
    for cache in engine._runner.caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    return engine


def _steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[StepInput]:
    """The steps that the engine runs from now on."""
    seen: list[StepInput] = []
    run = engine._runner.run

    def recorded(step: StepInput) -> Any:
        seen.append(step)
        return run(step)

    monkeypatch.setattr(engine._runner, "run", recorded)
    return seen


def _alone(loaded: Any, prompt: Sequence[int], params: SamplingParams) -> list[tuple[int, ...]]:
    """What each sample is as a request of its own."""
    found = []
    for sample in range(params.n):
        engine = _engine(loaded)
        handle = engine.submit(prompt, params, sample=sample)
        list(engine.stream([handle]))
        found.append(tuple(handle.token_ids))
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sharing_rates": ALWAYS},
        {"prefix_cache": False, "sharing_rates": ALWAYS},
        {"num_pages": 6, "sharing_rates": ALWAYS},
        {"max_batch": 1},
        {"max_batch": 3, "max_step_tokens": 16, "sharing_rates": ALWAYS},
    ],
)
def test_samples_are_what_they_are_alone(tiny_loaded: Any, config: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("FI_CHECK", "1")
    engine = _engine(tiny_loaded, **config)
    output, other = engine.generate([PROMPT, PROMPT[:9]], DRAWN)
    expected = _alone(tiny_loaded, PROMPT, DRAWN)
    assert [sample.token_ids for sample in output.outputs] == expected and len(set(expected)) == 4
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert [sample.token_ids for sample in other.outputs] == _alone(tiny_loaded, PROMPT[:9], DRAWN)
    assert output.token_ids == expected[0] and output.finish_reason == "length" and output.error is None


def test_the_best_of_some_samples_is_found_by_its_logprobs(tiny_loaded: Any, tiny: Any) -> None:
    (output,) = _engine(tiny_loaded).generate([PROMPT], replace(DRAWN, logprobs=0))
    for sample in output.outputs:
        logits = tiny[1]([*PROMPT, *sample.token_ids[:-1]])[len(PROMPT) - 1 :]
        chosen = logits.double().log_softmax(dim=-1).gather(1, torch.tensor([sample.token_ids]).T)
        assert sample.cumulative_logprob == pytest.approx(float(chosen.sum()), abs=1e-3)
    (output,) = _engine(tiny_loaded).generate([PROMPT], DRAWN)
    assert output.outputs[0].cumulative_logprob is None


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("length", [32, 33, 37, 1])
def test_the_prompt_is_computed_once(tiny_loaded: Any, monkeypatch: Any, prefix_cache: bool, length: int) -> None:
    engine = _engine(tiny_loaded, prefix_cache=prefix_cache)
    steps = _steps(engine, monkeypatch)
    engine.generate([PROMPT[:length]], DRAWN)
    # The others compute the prompt's last token, each for its own draw.
    assert sum(len(step.tokens) for step in steps) == length + 3 + 4 * (NUM_TOKENS - 1)
    assert engine.num_unfinished == 0


def test_running_samples_are_read_once_and_later_ones_join_them(tiny_loaded: Any, monkeypatch: Any) -> None:
    engine = _engine(tiny_loaded, sharing_rates=ALWAYS)
    steps = _steps(engine, monkeypatch)
    samples = engine.submit_samples(PROMPT, DRAWN)
    for _ in range(5):
        engine.step()
    assert steps[0].levels == () and steps[3].levels == ((0, 4, 0, 32),)
    late = engine.submit([*PROMPT[:20], 7, 8], SamplingParams(temperature=0.0, max_tokens=3))
    engine.abort(samples[1])
    engine.step()
    engine.step()
    # Three samples share 32 tokens, all four requests 16.
    assert steps[-1].levels == ((0, 4, 0, 16), (0, 3, 16, 32)) or steps[-1].levels == ((0, 4, 0, 16), (1, 4, 16, 32))
    lines = engine.explain_sharing()
    assert any("2 shared prefixes" in line for line in lines) and any(
        "decode steps: reference" in line for line in lines
    )
    list(engine.stream([*samples, late]))
    (alone,) = _engine(tiny_loaded).generate([late.prompt_ids], replace(late.params, seed=None))
    assert tuple(late.token_ids) == alone.token_ids
    assert [tuple(samples[index].token_ids) for index in (0, 2, 3)] == [
        _alone(tiny_loaded, PROMPT, DRAWN)[index] for index in (0, 2, 3)
    ]


def test_samples_outlive_the_first_one_whenever_it_ends(tiny_loaded: Any) -> None:
    for num_steps in (0, 1, 3, 6):
        engine = _engine(tiny_loaded, max_batch=3, max_step_tokens=16, prefix_cache=False)
        samples = engine.submit_samples(PROMPT, DRAWN)
        for _ in range(num_steps):
            engine.step()
        engine.abort(samples[0])
        engine.abort(samples[2])
        list(engine.stream(samples))
        expected = _alone(tiny_loaded, PROMPT, DRAWN)
        assert [tuple(samples[index].token_ids) for index in (1, 3)] == [expected[index] for index in (1, 3)]
        assert samples[0].finish_reason == samples[2].finish_reason == "abort"


def test_sharing_can_be_off_and_says_why(tiny_loaded: Any) -> None:
    assert "no rates are known for reference on cpu" in _engine(tiny_loaded).explain_sharing()[0]
    off = _engine(tiny_loaded, shared_prefixes=False, sharing_rates=ALWAYS)
    off.generate([PROMPT], DRAWN)
    assert off.explain_sharing() == ["shared prefixes: off by config.shared_prefixes"]
    with pytest.raises(ArgumentError, match=r"config\.sharing_rates"):
        _engine(tiny_loaded, sharing_rates=1.0)


def test_one_seed_and_one_refusal_for_all_samples(tiny_loaded: Any) -> None:
    engine = _engine(tiny_loaded)
    unseeded = engine.submit_samples(PROMPT, replace(DRAWN, seed=None))
    assert len({handle.params.seed for handle in unseeded}) == 1
    list(engine.stream(unseeded))
    assert len({tuple(handle.token_ids) for handle in unseeded}) == 4
    (refused,) = engine.generate([[]], DRAWN)
    assert len(refused.outputs) == 1 and isinstance(refused.error, ArgumentError)
