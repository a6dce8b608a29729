"""When a request ends: stop strings over incremental text, stop tokens and length."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .params import SamplingParams


@dataclass(frozen=True)
class StopEvent:
    """What a token led to: ``text`` that may be shown now; ``reason`` "stop" or "length" when the request has ended,
    else None; ``matched``: the stop string or stop token that ended it."""

    text: str
    reason: Literal["stop", "length"] | None = None
    matched: str | int | None = None


class StopChecker:
    """Follows one request's output. Text that may be the beginning of a stop string is held back until it is decided.

    Stop strings and tokens are looked for from the token after ``min_tokens`` on; the text before it is shown at once.
    A stop string and what follows it, and a stop token's text, are never shown.
    """

    def __init__(self, params: SamplingParams, eos_token_ids: Collection[int] = ()) -> None:
        self._params = params
        self._stop_tokens = params.stop_tokens(eos_token_ids)
        self._held = ""
        self.num_tokens = 0

    def anew(self) -> StopChecker:
        """A checker of the same request that has seen nothing."""
        fresh = StopChecker(self._params)
        fresh._stop_tokens = self._stop_tokens
        return fresh

    def push(self, token: int, text: str) -> StopEvent:
        """Take one token and the text that it added (perhaps none); the event of the token that ends the request is the
        last."""
        self.num_tokens += 1
        params = self._params
        checked = self.num_tokens > params.min_tokens
        if checked and token in self._stop_tokens:
            return StopEvent(self.flush(), "stop", token)
        self._held += text
        looked_for = checked and params.stop
        found = self._first_stop() if looked_for else None
        if found is not None:
            start, matched = found
            shown, self._held = self._held[:start], ""
            return StopEvent(shown, "stop", matched)
        if params.max_tokens is not None and self.num_tokens >= params.max_tokens:
            return StopEvent(self.flush(), "length")
        keep = self._undecided() if looked_for else 0
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return StopEvent(shown)

    def flush(self) -> str:
        """The text held back so far, given up (when the request ends for another reason)."""
        shown, self._held = self._held, ""
        return shown

    def _first_stop(self) -> tuple[int, str] | None:
        """Place and text of the stop string that begins first (of several, the longest)."""
        places = [(self._held.find(text), -len(text), text) for text in self._params.stop]
        found = [item for item in places if item[0] >= 0]
        return (min(found)[0], min(found)[2]) if found else None

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(len(text) for text in self._params.stop) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._params.stop):
                return length
        return 0
