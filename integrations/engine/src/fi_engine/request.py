"""Requests as their callers see them: handles, streamed chunks and final outputs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from fi_core.errors import FiError
from fi_sampling import SamplingParams, StopChecker

from .tokenizer import TextStream

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one generated token: its own, and (token, value) of the most likely ones, descending."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """What a step added to one request: new ``text`` (may be empty) and ``token_ids``; ``finish_reason`` ends it."""

    request: RequestHandle
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class SampleOutput:
    """One finished sample of a prompt, ``index`` of its ``params.n``. ``text`` has neither special tokens nor the stop string;
    ``error`` is set exactly when ``finish_reason`` is "error". ``logprobs`` has an entry a token if they were asked for, else
    none."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    error: FiError | None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' log-probabilities, by which the best of some samples is found; None if none were asked for."""
        return sum(each.chosen for each in self.logprobs) if self.logprobs else None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt's finished samples, in order: one output each (names as in vLLM). ``request_id`` and ``num_cached_tokens``, those
    of the prompt's tokens that came from the prefix cache, are of the first sample; so are ``text``, ``token_ids``, ``logprobs``,
    ``finish_reason`` and ``error``."""

    request_id: int
    prompt_ids: tuple[int, ...]
    num_cached_tokens: int
    outputs: tuple[SampleOutput, ...]

    @classmethod
    def of(cls, samples: Sequence[RequestHandle]) -> RequestOutput:
        """The result of all samples of one prompt, which are finished."""
        first = samples[0]
        outputs = tuple(handle.output() for handle in samples)
        return cls(first.request_id, first.prompt_ids, first.num_cached_tokens, outputs)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def error(self) -> FiError | None:
        return self.outputs[0].error


@dataclass(eq=False)
class RequestHandle:
    """A request on its way through an engine; read it between steps, write it never.

    ``params`` has the seed and the number of tokens filled in; ``sample`` is which of the prompt's ``params.n`` samples this is.
    ``text`` is what may be shown so far. ``stream`` is None when the model has no tokeniser. ``started``: a step has run some
    of its tokens.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sample: int
    checker: StopChecker
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    num_cached_tokens: int = 0
    started: bool = False
    finish_reason: FinishReason | None = None
    error: FiError | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def fork(self, request_id: int, params: SamplingParams) -> RequestHandle:
        """A handle that has what this one has so far and goes on by itself."""
        return replace(
            self,
            request_id=request_id,
            params=params,
            checker=copy(self.checker),
            stream=None if self.stream is None else self.stream.fork(),
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
        )

    def replace_last(self, token: int) -> None:
        """Put ``token`` in the place of the last one and form the text anew."""
        tokens = [*self.token_ids[:-1], token]
        self.checker = self.checker.anew()
        self.stream = None if self.stream is None else self.stream.anew()
        self.token_ids, self.text, self.logprobs = [], "", self.logprobs[: len(tokens) - 1]
        for each in tokens:
            self.take(each)

    def take(self, token: int) -> str:
        """Add a drawn token; returns the text that may be shown now and sets ``finish_reason`` if it was the last."""
        self.token_ids.append(token)
        event = self.checker.push(token, "" if self.stream is None else self.stream.push(token))
        self.finish_reason = event.reason
        tail = self.stream.finish() if event.reason == "length" and self.stream is not None else ""
        self.text += event.text + tail
        return event.text + tail

    def end(self, reason: FinishReason, error: FiError | None = None) -> str:
        """End without a token; returns the text that was held back."""
        self.finish_reason, self.error = reason, error
        held = self.checker.flush()
        self.text += held
        return held

    def output(self) -> SampleOutput:
        """The result; only of a finished request."""
        assert self.finish_reason is not None, "the request is still running"
        return SampleOutput(
            self.sample, tuple(self.token_ids), self.text, self.finish_reason, tuple(self.logprobs), self.error
        )
