"""Device columns of the requests in flight: one place for each parameter, fixed addresses, no work per step on the
host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from fi_core import ArgumentError, CapacityError, TokenHistory
from torch import Tensor

from .params import SamplingParams

FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence")
INTS = ("top_k", "sample")

_LARGEST_INT = 2**31 - 1

_FILTERS_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
_PENALTIES_OFF = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


def features_of(params: SamplingParams, stop_tokens: frozenset[int]) -> frozenset[str]:
    """The columns that a request needs: filters, penalty parts, "min_tokens" and "logprobs"."""
    needed = {name for name, off in _FILTERS_OFF.items() if getattr(params, name) != off}
    needed -= {"top_k"} if params.top_k < 0 else set()
    needed |= {name.removesuffix("_penalty") for name, off in _PENALTIES_OFF.items() if getattr(params, name) != off}
    if params.allowed_token_ids is not None:
        needed.add("allowed")
    if params.logit_bias:
        needed.add("bias")
    if params.min_tokens and stop_tokens:
        needed |= {"bias", "min_tokens"}
    if params.logprobs is not None:
        needed.add("logprobs")
    return frozenset(needed)


@dataclass(frozen=True)
class SamplingLimits:
    """Room that each request in flight has: ``max_bias`` biased (and, with min_tokens, stop) tokens, and ``max_distinct``
    distinct tokens of output if it has a frequency or presence penalty; one that has told more draws -1 from then on."""

    max_bias: int = 32
    max_distinct: int = 4096

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise ArgumentError(f"limits.{item.name}", "at least 1", getattr(self, item.name))


DEFAULT_LIMITS = SamplingLimits()


class Columns:
    """Tensors with a place for each of ``capacity`` slots.

    ``floats`` [len(FLOATS), slots] float32, ``ints`` [len(INTS), slots] int32 and ``seeds`` int64 [slots] always exist.
    Tables that some requests need are made when the first of them comes, and stay: ``allowed`` int32 [slots, words],
    ``bias_tokens`` and ``bias_until`` int32 and ``bias_values`` float32 [slots, max_bias], and the ``history`` of every
    slot, with room for ``max_distinct`` distinct tokens of output.
    """

    def __init__(self, capacity: int, vocab_size: int, limits: SamplingLimits, device: torch.device) -> None:
        self.capacity, self.vocab_size, self.device = capacity, vocab_size, device
        self.max_bias, self.max_distinct = limits.max_bias, min(limits.max_distinct, vocab_size)
        self.floats = torch.tensor(_float_values(SamplingParams()), dtype=torch.float32).unsqueeze(1)
        self.floats = self.floats.repeat(1, capacity).to(device)
        self.ints = torch.zeros((len(INTS), capacity), dtype=torch.int32, device=device)
        self.seeds = torch.zeros(capacity, dtype=torch.int64, device=device)
        # Every slot has max_bias entries, padded with token -1, so shapes never depend on the requests.
        self.bias_indptr = torch.arange(capacity + 1, dtype=torch.int32, device=device) * self.max_bias
        self.allowed: Tensor | None = None
        self.bias_tokens: Tensor | None = None
        self.bias_values: Tensor | None = None
        self.bias_until: Tensor | None = None
        self.history: TokenHistory | None = None

    def write(self, slot: int, params: SamplingParams, seed: int, sample: int) -> None:
        """Fill the columns that always exist."""
        self.floats[:, slot] = torch.tensor(_float_values(params), dtype=torch.float32)
        top_k = min(max(params.top_k, 0), self.vocab_size)
        self.ints[:, slot] = torch.tensor([top_k, sample], dtype=torch.int32)
        self.seeds[slot] = seed

    def write_allowed(self, slot: int, tokens: Sequence[int] | None) -> None:
        """Fill the slot's bitmask; None allows every token."""
        words = (self.vocab_size + 31) // 32
        if self.allowed is None:
            if tokens is None:
                return
            self.allowed = torch.full((self.capacity, words), -1, dtype=torch.int32, device=self.device)
        if tokens is None:
            self.allowed[slot] = -1
            return
        bits = torch.zeros(words * 32, dtype=torch.int64)
        bits[list(tokens)] = 1
        packed = (bits.view(words, 32) << torch.arange(32)).sum(dim=1)
        self.allowed[slot] = packed.to(torch.int32)

    def write_bias(self, slot: int, params: SamplingParams, stop_tokens: frozenset[int]) -> None:
        """Fill the slot's bias entries: the request's own, and its stop tokens, which are held back before min_tokens."""
        early = stop_tokens if params.min_tokens else frozenset()
        tokens = sorted(early.union(params.logit_bias))
        if len(tokens) > self.max_bias:
            raise CapacityError(
                "params.logit_bias", f"at most limits.max_bias={self.max_bias} biased and stop tokens", len(tokens)
            )
        if self.bias_tokens is None or self.bias_values is None or self.bias_until is None:
            if not tokens:
                return
            shape = (self.capacity, self.max_bias)
            self.bias_tokens = torch.full(shape, -1, dtype=torch.int32, device=self.device)
            self.bias_values = torch.zeros(shape, device=self.device)
            self.bias_until = torch.zeros(shape, dtype=torch.int32, device=self.device)
        least = min(params.min_tokens, _LARGEST_INT)
        padding = self.max_bias - len(tokens)
        values = [float(params.logit_bias.get(token, 0.0)) for token in tokens]
        until = [least if token in early else 0 for token in tokens]
        self.bias_tokens[slot] = torch.tensor(tokens + [-1] * padding, dtype=torch.int32)
        self.bias_values[slot] = torch.tensor(values + [0.0] * padding)
        self.bias_until[slot] = torch.tensor(until + [0] * padding, dtype=torch.int32)

    def write_history(self, slot: int, prompt: Sequence[int], output: Sequence[int], needed: bool) -> None:
        """Fill the slot's history; makes the table if ``needed``. Copies to the device; nothing waits for it."""
        if self.history is None:
            if not needed:
                return
            self.history = TokenHistory.empty(self.capacity, self.vocab_size, self.max_distinct, self.device)
        counts = Counter(output)
        entries = torch.zeros((self.max_distinct, 2), dtype=torch.int32)
        held = list(counts.items())[: self.max_distinct]
        entries[: len(held)] = torch.tensor(held, dtype=torch.int32).view(-1, 2)
        seen = torch.zeros(self.history.seen.shape[1] * 32, dtype=torch.int64)
        seen[[*prompt, *output]] = 1
        bits = (seen.view(-1, 32) << torch.arange(32)).sum(dim=1)
        self.history.seen[slot] = bits.to(torch.int32)
        self.history.entries[slot] = entries
        self.history.num_entries[slot] = min(len(counts), self.max_distinct + 1)
        self.history.num_output[slot] = len(output)


def _float_values(params: SamplingParams) -> list[float]:
    """Values in the order of FLOATS."""
    filters = [params.temperature, params.top_p, params.min_p, params.typical_p]
    return [*filters, params.repetition_penalty, params.frequency_penalty, params.presence_penalty]


def check_tokens(argument: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise ArgumentError naming the first of ``tokens`` outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ArgumentError(argument, f"tokens from 0 to {vocab_size - 1}", token)
