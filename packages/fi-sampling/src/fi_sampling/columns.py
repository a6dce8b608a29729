"""Device columns of the requests in flight: one place for each parameter, fixed addresses, no work per step on the
host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fi_core import ArgumentError, CapacityError
from torch import Tensor

from .params import SamplingParams

FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence")
INTS = ("top_k", "sample", "min_tokens", "num_output")

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


class Columns:
    """Tensors with a place for each of ``capacity`` slots and one more, the scratch slot that padding rows use.

    ``floats`` [len(FLOATS), slots] float32, ``ints`` [len(INTS), slots] int32 and ``seeds`` [1, slots] int64 always
    exist. Tables that some requests need are made when the first of them comes, and stay: ``allowed`` int32 [slots,
    words], ``bias_tokens`` int32 and ``bias_values``, ``bias_early`` float32 [slots, max_bias] (early: before
    min_tokens), ``prompt_counts`` and ``output_counts`` int32 [slots, vocab_size].
    """

    def __init__(self, capacity: int, vocab_size: int, max_bias: int, device: torch.device) -> None:
        self.capacity, self.vocab_size, self.max_bias, self.device = capacity, vocab_size, max_bias, device
        slots = capacity + 1
        self.floats = torch.tensor(_float_values(SamplingParams()), dtype=torch.float32).unsqueeze(1).repeat(1, slots)
        self.floats = self.floats.to(device)
        self.ints = torch.zeros((len(INTS), slots), dtype=torch.int32, device=device)
        self.seeds = torch.zeros((1, slots), dtype=torch.int64, device=device)
        self.allowed: Tensor | None = None
        self.bias_tokens: Tensor | None = None
        self.bias_values: Tensor | None = None
        self.bias_early: Tensor | None = None
        self.prompt_counts: Tensor | None = None
        self.output_counts: Tensor | None = None

    def write(self, slot: int, params: SamplingParams, seed: int, sample: int, num_output: int) -> None:
        """Fill the columns that always exist."""
        self.floats[:, slot] = torch.tensor(_float_values(params), dtype=torch.float32)
        top_k = min(max(params.top_k, 0), self.vocab_size)
        min_tokens = min(params.min_tokens, 2**31 - 1)
        self.ints[:, slot] = torch.tensor([top_k, sample, min_tokens, num_output], dtype=torch.int32)
        self.seeds[:, slot] = seed

    def write_allowed(self, slot: int, tokens: Sequence[int] | None) -> None:
        """Fill the slot's bitmask; None allows every token."""
        words = (self.vocab_size + 31) // 32
        if self.allowed is None:
            if tokens is None:
                return
            self.allowed = torch.full((self.capacity + 1, words), -1, dtype=torch.int32, device=self.device)
        if tokens is None:
            self.allowed[slot] = -1
            return
        bits = torch.zeros(words * 32, dtype=torch.int64)
        bits[list(tokens)] = 1
        packed = (bits.view(words, 32) << torch.arange(32)).sum(dim=1)
        self.allowed[slot] = packed.to(torch.int32)

    def write_bias(self, slot: int, params: SamplingParams, stop_tokens: frozenset[int]) -> None:
        """Fill the slot's bias entries: the request's own, and -inf on its stop tokens before min_tokens."""
        early = stop_tokens if params.min_tokens else frozenset()
        tokens = sorted(early.union(params.logit_bias))
        if len(tokens) > self.max_bias:
            raise CapacityError(
                "params.logit_bias", f"at most max_bias={self.max_bias} biased and stop tokens", len(tokens)
            )
        if self.bias_tokens is None or self.bias_values is None or self.bias_early is None:
            if not tokens:
                return
            shape = (self.capacity + 1, self.max_bias)
            self.bias_tokens = torch.full(shape, -1, dtype=torch.int32, device=self.device)
            self.bias_values = torch.zeros(shape, device=self.device)
            self.bias_early = torch.zeros(shape, device=self.device)
        values = [float(params.logit_bias.get(token, 0.0)) for token in tokens]
        held = [-torch.inf if token in early else value for token, value in zip(tokens, values, strict=True)]
        padding = self.max_bias - len(tokens)
        self.bias_tokens[slot] = torch.tensor(tokens + [-1] * padding, dtype=torch.int32)
        self.bias_values[slot] = torch.tensor(values + [0.0] * padding)
        self.bias_early[slot] = torch.tensor(held + [0.0] * padding)

    def write_counts(self, slot: int, prompt: Tensor, output: Tensor, needed: bool) -> None:
        """Fill the slot's histories from token ids int64 on the columns' device; makes them if ``needed``."""
        if self.prompt_counts is None or self.output_counts is None:
            if not needed:
                return
            shape = (self.capacity + 1, self.vocab_size)
            self.prompt_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        for counts, tokens in ((self.prompt_counts, prompt), (self.output_counts, output)):
            counts[slot] = 0
            counts[slot].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))


def _float_values(params: SamplingParams) -> list[float]:
    """Values in the order of FLOATS."""
    filters = [params.temperature, params.top_p, params.min_p, params.typical_p]
    return [*filters, params.repetition_penalty, params.frequency_penalty, params.presence_penalty]


def check_tokens(argument: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise ArgumentError naming the first of ``tokens`` outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ArgumentError(argument, f"tokens from 0 to {vocab_size - 1}", token)
