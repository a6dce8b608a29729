"""Beam search by forks: beams share the pages of what they have in common, and a page is copied when one of them writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fi_core.errors import ArgumentError, CapacityError
from fi_sampling import SamplingParams

from .engine import Engine, Prompt
from .request import RequestHandle


@dataclass(frozen=True)
class Beam:
    """A continuation of a prompt: its tokens, the sum of their log-probabilities, that sum over length ** length_penalty, and
    whether it ended by itself ("stop": its last token is one of the model's end tokens) or by ``max_tokens``."""

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class _Open:
    """A beam that goes on: a request, and the sum of its tokens' log-probabilities before the last drawn one."""

    handle: RequestHandle
    logprob: float


def beam_search(
    engine: Engine,
    prompt: Prompt,
    width: int,
    max_tokens: int,
    *,
    length_penalty: float = 1.0,
    ignore_eos: bool = False,
) -> list[Beam]:
    """The ``width`` best continuations of a prompt, best first, of at most ``max_tokens`` tokens (1 or more, cut to what the
    model's length leaves).

    At each step every beam offers its 2 * ``width`` most likely tokens; end tokens complete a beam, and of the rest the
    ``width`` most likely go on (Freitag and Al-Onaizan, 2017, section 2; as vLLM searches). Other requests of the engine advance
    meanwhile. Raises ArgumentError, what ``Engine.submit`` raises, a request's error if its step failed, and CapacityError if
    the batch or the page pool cannot hold all beams at once, which must advance together.
    """
    for name, value in (("width", width), ("max_tokens", max_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(name, "a positive int", value)
    if width > engine.config.max_batch:
        raise CapacityError("width", f"at most config.max_batch={engine.config.max_batch}", width)
    offers = min(2 * width, engine.model.config.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens + 1, logprobs=offers, ignore_eos=True)
    beams = [_Open(engine.submit(prompt, params), 0.0)]
    length = min(max_tokens, engine.max_model_len - len(beams[0].handle.prompt_ids))
    ends = frozenset() if ignore_eos else engine.model.config.eos_ids
    done: list[Beam] = []
    try:
        for num_tokens in range(1, length + 1):
            _advance(engine, [beam.handle for beam in beams], num_tokens)
            offered = sorted(_offers(beams), key=lambda offer: -offer[0])[: 2 * width]
            stopped = [offer for offer in offered if offer[2] in ends]
            going = [offer for offer in offered if offer[2] not in ends][:width]
            done += [_finished(*offer, length_penalty, "stop") for offer in stopped]
            if num_tokens == length:
                done += [_finished(*offer, length_penalty, "length") for offer in going]
            else:
                beams = _go_on(engine, beams, going)
    finally:
        for beam in beams:
            engine.abort(beam.handle)
    return sorted(done, key=lambda beam: -beam.score)[:width]


def _advance(engine: Engine, handles: Sequence[RequestHandle], num_tokens: int) -> None:
    """Step until every request has ``num_tokens`` tokens."""
    while any(len(handle.token_ids) < num_tokens for handle in handles):
        engine.step()
        for handle in handles:
            if handle.error is not None:
                raise handle.error
            if len(handle.token_ids) > num_tokens:
                raise CapacityError("width", "beams for which there is room at once", len(handles))


def _offers(beams: Sequence[_Open]) -> list[tuple[float, RequestHandle, int]]:
    """(log-probability of the whole beam, its request, its last token) of each likely last token of each beam."""
    return [
        (beam.logprob + value, beam.handle, token) for beam in beams for token, value in beam.handle.logprobs[-1].top
    ]


def _finished(
    logprob: float, handle: RequestHandle, token: int, length_penalty: float, reason: Literal["stop", "length"]
) -> Beam:
    tokens = (*handle.token_ids[:-1], token)
    return Beam(tokens, logprob, logprob / len(tokens) ** length_penalty, reason)


def _go_on(engine: Engine, beams: Sequence[_Open], offers: Sequence[tuple[float, RequestHandle, int]]) -> list[_Open]:
    """The beams of the next step: a request goes on itself with the token that it drew, and forks take the others."""
    chosen = []
    for logprob, handle, token in offers:
        is_own = token == handle.token_ids[-1]
        chosen.append(_Open(handle if is_own else engine.fork(handle, token=token), logprob))
    kept = {id(beam.handle) for beam in chosen}
    for beam in beams:
        if id(beam.handle) not in kept:
            engine.abort(beam.handle)
    return chosen
