"""Sampling parameters of one request."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any

from fi_core import ArgumentError

_PENALTY_LIMIT = 2.0
_LARGEST_FLOAT = 3.4028234663852886e38
"""Of float32, as which parameters reach the device."""
_SMALLEST_FLOAT = 1.1754943508222875e-38
_LARGEST_INT = 2**31 - 1
_BIAS_LIMIT = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples; names and defaults are those of vLLM where it has them. A bad value raises ArgumentError
    naming the field.

    Filters: ``temperature`` >= 0 (0: greedy), ``top_k`` (0 or -1: off), ``top_p`` in (0, 1] (1: off), ``min_p`` in [0,
    1] (0: off), ``typical_p`` in (0, 1] (1: off). Penalties: ``repetition_penalty`` > 0 (1: off), ``presence_penalty``
    and ``frequency_penalty`` in [-2, 2] (0: off), ``logit_bias`` token -> value in [-100, 100], ``allowed_token_ids``
    (None: all). Ending: ``stop`` strings, ``stop_token_ids``, ``max_tokens`` (None: no limit), ``min_tokens`` (before
    it no stop token is drawn and no stop string looked for), ``ignore_eos`` (the model's end tokens are ordinary
    tokens). ``seed`` (None: a random one for each request), ``n`` samples of the prompt; ``logprobs`` most likely
    tokens to report (None: no log-probabilities; 0: the drawn token's only).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, -1)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _number("presence_penalty", self.presence_penalty, -_PENALTY_LIMIT, _PENALTY_LIMIT)
        _number("frequency_penalty", self.frequency_penalty, -_PENALTY_LIMIT, _PENALTY_LIMIT)
        self._check_tokens()
        if not isinstance(self.stop, (str, Sequence)) or isinstance(self.stop, bytes):
            raise ArgumentError("stop", "a string or a sequence of strings", repr(self.stop))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ArgumentError("stop", "strings that are not empty", repr(text))
        object.__setattr__(self, "stop", stop)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _integer("n", self.n, 1, _LARGEST_INT)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0)
        if not isinstance(self.ignore_eos, bool):
            raise ArgumentError("ignore_eos", "a bool", repr(self.ignore_eos))

    def _check_tokens(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError("logit_bias", "a mapping of token to value", repr(self.logit_bias))
        for token, value in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", value, -_BIAS_LIMIT, _BIAS_LIMIT)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        for name in ("allowed_token_ids", "stop_token_ids"):
            tokens = getattr(self, name)
            if tokens is None and name == "allowed_token_ids":
                continue
            if not isinstance(tokens, Collection) or isinstance(tokens, (str, bytes, Mapping)):
                raise ArgumentError(name, "a collection of token ids", repr(tokens))
            for token in tokens:
                _integer(name, token, 0)
            object.__setattr__(self, name, tuple(tokens))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ArgumentError("allowed_token_ids", "at least one token, or None for all", "none")

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view of a dict can be neither copied nor sent to another process, so the dict is.
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return partial(SamplingParams, **{**values, "logit_bias": dict(self.logit_bias)}), ()

    def stop_tokens(self, eos_token_ids: Collection[int] = ()) -> frozenset[int]:
        """The tokens that end this request, given the model's end tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    """Raise ArgumentError unless ``value`` is a number from ``low`` to ``high`` that float32 has (``above``: and not 0)."""
    least, most = max(low, _SMALLEST_FLOAT) if above else low, min(high, _LARGEST_FLOAT)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not least <= value <= most:  # type: ignore[operator]
        lowest = f"above {low:g}" if above else f"at least {low:g}"
        highest = " in float32" if high == math.inf else f" and at most {high:g}"
        raise ArgumentError(name, f"a number {lowest}{highest}", repr(value))


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ArgumentError unless ``value`` is an int from ``low`` to ``high`` (None: no limit)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        highest = "" if high is None else f" and at most {high}"
        raise ArgumentError(name, f"an int of at least {low}{highest}", repr(value))
