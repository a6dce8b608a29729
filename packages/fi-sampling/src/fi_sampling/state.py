"""The batch compiler: requests come and go on the host, each step is a few calls on the device."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import fi_core as fi
import torch
from fi_core import ArgumentError, DrawKeys, FilterParams, LogprobsOut, PenaltyParams, TokenHistory
from fi_core.dispatch import select_for
from torch import Tensor

from .builtin import DEFAULT_OPS
from .columns import DEFAULT_LIMITS, FLOATS, INTS, Columns, SamplingLimits, check_tokens, features_of
from .params import SamplingParams
from .pipeline import Kind, Pipeline, PipelineTypeError, Step
from .plugins import pipeline_of

_FILTER_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_HISTORY = ("repetition", "frequency", "presence")
_RECORDED = frozenset({*_HISTORY, "min_tokens"})
"""Features for which drawn tokens are recorded."""


@dataclass(frozen=True)
class SampleResult:
    """``tokens`` int64 [N] (-1: unusable row) and, if some request in flight asks for them, ``logprobs`` of the logits
    as given (before penalties and filters), with as many alternatives as the request that wants most."""

    tokens: Tensor
    logprobs: LogprobsOut | None


def _random_seed() -> int:
    return secrets.randbits(63)


class SamplingState:
    """Sampling parameters of up to ``capacity`` requests in flight, by slot.

    Parameters lie in columns on the device, written when a request comes; ``sample`` is one ``fi_core.sample`` that picks
    from them by slot, where a kernel is preferred that does all of it (``explain`` says what is launched), and
    ``record`` one ``fi_core.record_tokens`` while a request in flight needs its history. Nothing waits for the device or
    loops over rows. What a step runs depends on ``signature`` alone, so a CUDA graph captured with one signature serves
    as long as the signature is the same. Padding rows of a batch use slot -1 and give token -1. A token depends on its
    request's parameters, history, seed, sample and position, not on slot or batch.

    ``limits``: room that each request has for its bias and its output's distinct tokens. ``order``: how filters combine.
    ``pipeline``: logits to tokens (None: DEFAULT_OPS under every installed rule). ``eos_token_ids``:
    the model's. Not thread-safe. Bitmasks, bias and histories are made when a request first needs them.
    """

    def __init__(
        self,
        capacity: int,
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        eos_token_ids: Collection[int] = (),
        limits: SamplingLimits = DEFAULT_LIMITS,
        order: fi.sampling.FilterOrder = "sequential",
        pipeline: Pipeline | None = None,
        seed_source: Callable[[], int] = _random_seed,
    ) -> None:
        for name, value in (("capacity", capacity), ("vocab_size", vocab_size)):
            if value < 1:
                raise ArgumentError(name, "at least 1", value)
        if order not in ("sequential", "joint"):
            raise ArgumentError("order", "'sequential' or 'joint'", repr(order))
        check_tokens("eos_token_ids", tuple(eos_token_ids), vocab_size)
        self.pipeline = pipeline_of(DEFAULT_OPS) if pipeline is None else pipeline
        if self.pipeline.stages[-1].gives is not Kind.TOKENS:
            raise PipelineTypeError(
                f"a pipeline that samples ends in tokens, not {self.pipeline.stages[-1].gives.value}"
            )
        self.columns = Columns(capacity, vocab_size, limits, torch.device(device))
        self.order = order
        self.active: frozenset[str] = frozenset()
        self._top_n = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed_source = seed_source
        self._requests: dict[int, tuple[SamplingParams, int, frozenset[str]]] = {}

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        sample: int = 0,
        output_ids: Sequence[int] = (),
    ) -> int:
        """Put a request into a free slot; returns its seed. ``sample``: which of the prompt's ``params.n`` samples it
        is; ``output_ids``: tokens it has made already (a request that resumes)."""
        columns = self.columns
        if not 0 <= slot < columns.capacity:
            raise ArgumentError("slot", f"from 0 to {columns.capacity - 1}", slot)
        if slot in self._requests:
            raise ArgumentError("slot", "a free slot", f"{slot}, which holds a request")
        if not 0 <= sample < params.n:
            raise ArgumentError("sample", f"from 0 to params.n - 1 = {params.n - 1}", sample)
        stop_tokens = params.stop_tokens(self._eos_token_ids)
        self._check_request(params, prompt_ids, output_ids)
        features = features_of(params, stop_tokens)
        seed = self._seed_source() if params.seed is None else params.seed
        columns.write_bias(slot, params, stop_tokens)
        columns.write(slot, params, seed, sample)
        columns.write_allowed(slot, params.allowed_token_ids)
        columns.write_history(slot, prompt_ids, output_ids, needed=not features.isdisjoint(_RECORDED))
        self._requests[slot] = (params, seed, features)
        self._refresh()
        return seed

    def _check_request(self, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        named = {
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            "params.logit_bias": tuple(params.logit_bias),
            "params.allowed_token_ids": params.allowed_token_ids or (),
            "params.stop_token_ids": params.stop_token_ids,
        }
        for argument, tokens in named.items():
            check_tokens(argument, tokens, self.columns.vocab_size)
        if params.logprobs is not None and params.logprobs > self.columns.vocab_size:
            raise ArgumentError(
                "params.logprobs", f"at most the vocabulary's {self.columns.vocab_size}", params.logprobs
            )

    def remove(self, slot: int) -> None:
        """Free a slot; touches no tensor."""
        if slot not in self._requests:
            raise ArgumentError("slot", "a slot that holds a request", slot)
        del self._requests[slot]
        self._refresh()

    @property
    def signature(self) -> tuple[frozenset[str], int]:
        """``active``, and the most log-probabilities that a request in flight reports."""
        return self.active, self._top_n

    def _refresh(self) -> None:
        held = self._requests.values()
        self.active = frozenset().union(*(features for _, _, features in held))
        self._top_n = max((params.logprobs or 0 for params, _, _ in held), default=0)

    def record(self, slots: Tensor, tokens: Tensor) -> None:
        """Count tokens int64 [N] or [N, k] as output of ``slots`` int64 [N], each at most once; -1 tokens and -1 slots are
        skipped. Device work only, and none unless a request in flight needs its history."""
        self._check_rows("slots", slots)
        if tokens.dtype != torch.int64 or tokens.dim() not in (1, 2) or tokens.shape[0] != slots.shape[0]:
            raise ArgumentError(
                "tokens", f"int64 [{slots.shape[0]}] or [{slots.shape[0]}, k]", f"{tokens.dtype} {tokens.shape}"
            )
        if self.columns.history is not None and not self.active.isdisjoint(_RECORDED):
            fi.record_tokens(self.columns.history, tokens, slots=slots)

    def step(
        self, slots: Tensor, positions: Tensor, allowed: Tensor | None = None, drafted: Tensor | None = None
    ) -> Step:
        """The parameters of a step: slots int64 [N] (-1: padding), positions int64 [N] of the tokens to draw, ``allowed``
        int32 [N, ceil(V / 32)] bitmasks of this step (grammars), on top of the requests', ``drafted`` int64 [N, n] tokens
        that each row assumes its request has told since the last ``record`` (-1: none). No device work, but copies of the
        histories if some are drafted."""
        self._check_rows("slots", slots)
        self._check_rows("positions", positions)
        columns, active = self.columns, self.active
        floats, ints = dict(zip(FLOATS, columns.floats, strict=True)), dict(zip(INTS, columns.ints, strict=True))
        values = {**floats, **ints}
        filters = FilterParams(**{name: values[name] for name in _FILTER_NAMES if name in active}, order=self.order)
        penalties: dict[str, Any] = {name: floats[name] for name in _HISTORY if name in active}
        if not active.isdisjoint(_RECORDED):
            penalties |= self._histories(slots, drafted)
        if "bias" in active and columns.bias_tokens is not None and columns.bias_values is not None:
            penalties["bias_indptr"] = columns.bias_indptr
            penalties |= {"bias_tokens": columns.bias_tokens.view(-1), "bias_values": columns.bias_values.view(-1)}
            if "min_tokens" in active and columns.bias_until is not None:
                penalties["bias_until"] = columns.bias_until.view(-1)
        if "allowed" in active:
            penalties["allowed"] = columns.allowed
        if allowed is not None:
            penalties["step_allowed"] = allowed
        keys = DrawKeys(columns.seeds, ints["sample"], positions)
        return Step(filters, PenaltyParams(**penalties), keys, slots)

    def _histories(self, slots: Tensor, drafted: Tensor | None) -> dict[str, Any]:
        """The histories that penalties and min_tokens read, with what each row assumes."""
        history = self.columns.history
        assert history is not None
        if drafted is None:
            return {"history": history}
        places = slots.clamp(min=0)
        assumed = TokenHistory(*(tensor.index_select(0, places) for tensor in history.tensors))
        fi.record_tokens(assumed, drafted)
        return {"history": assumed, "rows": torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)}

    def explain(self, dtype: torch.dtype = torch.float32) -> str:
        """What ``sample`` and ``record`` launch for logits of ``dtype`` with the requests in flight, a line each."""
        columns = self.columns
        nothing = torch.empty(0, dtype=torch.int64, device=columns.device)
        logits = torch.empty((0, columns.vocab_size), dtype=dtype, device=columns.device)
        lines = self.pipeline.launches(logits, self.step(nothing, nothing))
        if "logprobs" in self.active:
            values = {"dtype": dtype, "vocab_size": columns.vocab_size, "top_n": self._top_n}
            lines.append(select_for("logprobs", columns.device, **values).entry.full_name)
        if columns.history is not None and not self.active.isdisjoint(_RECORDED):
            chosen = select_for("record_tokens", columns.device, capacity=columns.max_distinct)
            lines.append(f"{chosen.entry.full_name} (after the draw)")
        return "\n".join(lines)

    def sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, *, allowed: Tensor | None = None
    ) -> SampleResult:
        """Draw the next token of each row of logits [N, V]; see ``step`` for the other arguments. ``record`` the tokens
        afterwards. The logits are not changed (unless a user's operation does)."""
        if logits.dim() != 2 or logits.shape[1] != self.columns.vocab_size or logits.shape[0] != slots.shape[0]:
            expected = f"shape ({slots.shape[0]}, {self.columns.vocab_size})"
            raise ArgumentError("logits", expected, tuple(logits.shape))
        tokens = self.pipeline(logits, self.step(slots, positions, allowed))
        found = fi.logprobs(logits, tokens, self._top_n) if "logprobs" in self.active else None
        return SampleResult(tokens, found)

    def _check_rows(self, argument: str, tensor: Tensor) -> None:
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise ArgumentError(argument, "an int64 tensor of one dim", f"{tensor.dtype} {tuple(tensor.shape)}")
