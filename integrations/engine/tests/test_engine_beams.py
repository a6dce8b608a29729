"""Beam search against the same search without a cache, and forks that take another last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fi_core.errors import ArgumentError, CapacityError
from fi_engine import Engine, EngineConfig, beam_search
from fi_sampling import SamplingParams
from fi_scheduler.sharing import ALWAYS

PROMPT = [(5 * i) % 320 for i in range(21)]


def _engine(loaded: Any, eos: frozenset[int] = frozenset(), **config: Any) -> Engine:
    model = replace(loaded.model, config=replace(loaded.model.config, eos_ids=eos))
    engine = Engine(model, None, EngineConfig(**{"max_batch": 8, "max_model_len": 64, "num_pages": 80, **config}))
    for cache in engine._runner.caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    return engine


def _search(
    oracle: Any, width: int, max_tokens: int, eos: frozenset[int], penalty: float
) -> list[tuple[float, list[int]]]:
    """Beam search that computes every prefix anew."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    done = []
    for step in range(max_tokens):
        offers = []
        for total, tokens in beams:
            logprobs = torch.log_softmax(oracle([*PROMPT, *tokens])[-1].double(), dim=-1)
            best = logprobs.topk(2 * width)
            offers += [(total + float(value), [*tokens, int(token)]) for value, token in zip(*best, strict=True)]
        offers = sorted(offers, key=lambda offer: -offer[0])[: 2 * width]
        done += [offer for offer in offers if offer[1][-1] in eos]
        beams = [offer for offer in offers if offer[1][-1] not in eos][:width]
        done += beams if step + 1 == max_tokens else []
    return sorted(((total / len(tokens) ** penalty, tokens) for total, tokens in done), key=lambda item: -item[0])[
        :width
    ]


@pytest.mark.parametrize("config", [{}, {"sharing_rates": ALWAYS}, {"prefix_cache": False, "max_batch": 3}])
def test_beams_are_those_of_a_search_without_a_cache(tiny: Any, tiny_loaded: Any, config: dict[str, Any]) -> None:
    for width, eos, penalty in ((3, frozenset(), 1.0), (2, frozenset(range(0, 320, 3)), 0.5)):
        engine = _engine(tiny_loaded, eos, **config)
        found = beam_search(engine, PROMPT, width, 6, length_penalty=penalty)
        expected = _search(tiny[1], width, 6, eos, penalty)
        assert [list(beam.token_ids) for beam in found] == [tokens for _, tokens in expected]
        assert [beam.score for beam in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
        assert all((beam.finish_reason == "stop") == (beam.token_ids[-1] in eos) for beam in found)
        assert engine.num_unfinished == 0
        engine.check_integrity()


def _greedy(oracle: Any, begun: Sequence[int], count: int) -> list[int]:
    tokens = list(begun)
    for _ in range(count):
        tokens.append(int(oracle([*PROMPT, *tokens])[-1].argmax()))
    return tokens


def test_a_fork_can_take_another_last_token(tiny: Any, tiny_loaded: Any) -> None:
    engine = _engine(tiny_loaded)
    origin = engine.submit(PROMPT, SamplingParams(temperature=0.0, max_tokens=12, logprobs=1))
    for _ in range(4):
        engine.step()
    begun = list(origin.token_ids)
    other = (begun[-1] + 1) % 320
    fork = engine.fork(origin, token=other)
    assert fork.token_ids == [*begun[:-1], other] and origin.token_ids == begun and len(fork.logprobs) == 3
    list(engine.stream([origin, fork]))
    assert fork.token_ids == _greedy(tiny[1], [*begun[:-1], other], 8)
    assert origin.token_ids == _greedy(tiny[1], begun, 8)


def test_tokens_that_cannot_stand_there_are_refused(tiny_loaded: Any) -> None:
    engine = _engine(tiny_loaded)
    origin = engine.submit(PROMPT, SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=(7,)))
    with pytest.raises(ArgumentError, match="after a token was drawn"):
        engine.fork(origin, token=3)
    engine.step()
    for token, text in ((320, "vocabulary"), (7, "does not end")):
        with pytest.raises(ArgumentError, match=text):
            engine.fork(origin, token=token)
    for width, length in ((0, 3), (2, 0)):
        with pytest.raises(ArgumentError):
            beam_search(engine, PROMPT, width, length)
    list(engine.stream([origin]))
    with pytest.raises(CapacityError, match="max_batch"):
        beam_search(engine, PROMPT, 9, 3)
    with pytest.raises(CapacityError, match="room at once"):
        beam_search(_engine(tiny_loaded, num_pages=4), PROMPT, 3, 20)
    assert engine.num_unfinished == 0
