"""Forks: shared pages are copied when one of the two writes, and both go on as if they were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fi_core.errors import ArgumentError
from fi_engine import Engine, RequestHandle
from fi_sampling import SamplingParams

NUM_TOKENS = 20
PROMPT = [(5 * i) % 320 for i in range(21)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)


def _engine(loaded: Any, **config: Any) -> Engine:
    engine: Engine = loaded.engine(**{"max_batch": 8, "max_model_len": 128, "num_pages": 200, **config})
    # What a page held before must not matter, and a page that was not copied must be seen.
    for cache in engine._runner.caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    return engine


def _run(engine: Engine, handle: RequestHandle, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.step()
    assert not handle.finished


def _greedy(oracle: Any, prompt: Sequence[int], generated: Sequence[int]) -> list[int]:
    choices: list[int] = oracle([*prompt, *generated[:-1]])[len(prompt) - 1 :].argmax(dim=-1).tolist()
    return choices


@pytest.mark.parametrize("config", [{}, {"prefix_cache": False}, {"num_pages": 4}, {"max_batch": 1}])
def test_greedy_forks_go_the_way_of_their_origin(tiny: Any, tiny_loaded: Any, config: dict[str, Any]) -> None:
    engine = _engine(tiny_loaded, **config)
    origin = engine.submit(PROMPT, GREEDY)
    _run(engine, origin, 4)
    forks = [engine.fork(origin), engine.fork(origin)]
    assert [fork.token_ids for fork in forks] == [origin.token_ids] * 2 and len(origin.token_ids) == 4
    list(engine.stream([origin, *forks]))
    engine.check_integrity()
    assert origin.token_ids == _greedy(tiny[1], PROMPT, origin.token_ids)
    for fork in forks:
        assert fork.token_ids == origin.token_ids and fork.finish_reason == "length"
    assert len({handle.request_id for handle in (origin, *forks)}) == 3


def test_sampled_forks_equal_a_request_that_was_alone(tiny_loaded: Any) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=2.0, repetition_penalty=1.3, seed=seed, max_tokens=NUM_TOKENS, logprobs=1)

    engine = _engine(tiny_loaded)
    origin = engine.submit(PROMPT, params(3))
    _run(engine, origin, 6)
    begun = list(origin.token_ids)
    same, other = engine.fork(origin, seed=3), engine.fork(origin, seed=4)
    list(engine.stream([origin, same, other]))
    (alone,) = _engine(tiny_loaded).generate([PROMPT], params(3))
    assert tuple(origin.token_ids) == tuple(same.token_ids) == alone.token_ids
    assert other.token_ids[:6] == begun and other.token_ids != origin.token_ids
    assert len(other.logprobs) == len(other.token_ids) == NUM_TOKENS


def test_a_fork_outlives_its_origin_and_of_one_that_waits_too(tiny: Any, tiny_loaded: Any) -> None:
    engine = _engine(tiny_loaded, max_batch=2)
    origin = engine.submit(PROMPT, GREEDY)
    _run(engine, origin, 3)
    fork = engine.fork(origin)
    waiting = engine.submit(PROMPT[:7], GREEDY)
    of_waiting = engine.fork(waiting)
    engine.step()
    engine.abort(origin)
    engine.abort(waiting)
    list(engine.stream([fork, of_waiting]))
    for prompt, handle in ((PROMPT, fork), (PROMPT[:7], of_waiting)):
        assert handle.token_ids == _greedy(tiny[1], prompt, handle.token_ids) and len(handle.token_ids) == NUM_TOKENS
    assert waiting.token_ids == []


def test_a_prompt_that_is_not_finished_can_be_forked(tiny: Any, tiny_loaded: Any) -> None:
    engine = _engine(tiny_loaded, max_batch=4, max_step_tokens=5, prefix_cache=False)
    origin = engine.submit(PROMPT, GREEDY)
    _run(engine, origin, 2)
    fork = engine.fork(origin)
    list(engine.stream([origin, fork]))
    assert origin.token_ids == fork.token_ids == _greedy(tiny[1], PROMPT, fork.token_ids)
    assert origin.num_cached_tokens == fork.num_cached_tokens == 0


def test_forks_that_cannot_be_are_refused(tiny_loaded: Any) -> None:
    engine, other = _engine(tiny_loaded), _engine(tiny_loaded)
    handle = engine.submit(PROMPT, GREEDY)
    with pytest.raises(ArgumentError, match="another"):
        other.fork(handle)
    with pytest.raises(ArgumentError, match="seed"):
        engine.fork(handle, seed=1 << 70)
    list(engine.stream([handle]))
    with pytest.raises(ArgumentError, match="not finished"):
        engine.fork(handle)
    assert engine.num_unfinished == 0


@pytest.mark.model
def test_text_and_stop_strings_go_on_in_a_fork(smol: Any) -> None:
    engine = smol.engine()
    origin = engine.submit("The capital of France is", SamplingParams(temperature=0.0, max_tokens=24, stop=("answer",)))
    for _ in range(3):
        engine.step()
    fork = engine.fork(origin)
    list(engine.stream([origin, fork]))
    assert origin.text == fork.text == " Paris.\n\nThe " and fork.finish_reason == "stop"
    assert origin.token_ids == fork.token_ids
