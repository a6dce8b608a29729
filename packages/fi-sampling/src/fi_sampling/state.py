"""The batch compiler: requests come and go on the host, each step is a few calls on the device."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import fi_core as fi
import torch
from fi_core import ArgumentError, DrawKeys, FilterParams, LogprobsOut, PenaltyParams
from torch import Tensor

from .builtin import DEFAULT_OPS
from .columns import FLOATS, INTS, Columns, check_tokens, features_of
from .params import SamplingParams
from .pipeline import Kind, Pipeline, PipelineTypeError, Step
from .plugins import pipeline_of

_FILTER_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_HISTORY = ("repetition", "frequency", "presence")


@dataclass(frozen=True)
class SampleResult:
    """``tokens`` int64 [N] (-1: unusable row) and, if some request in flight asks for them, ``logprobs`` of the logits
    as given (before penalties and filters), with as many alternatives as the request that wants most."""

    tokens: Tensor
    logprobs: LogprobsOut | None


@dataclass(frozen=True)
class Drafted:
    """Rows of a speculative step: ``depth`` int32 [N], how many drafted tokens each row assumes, and ``counts`` int32
    [N, V], how often each token is among them (None: no penalty needs it)."""

    depth: Tensor
    counts: Tensor | None


def _random_seed() -> int:
    return secrets.randbits(63)


class SamplingState:
    """Sampling parameters of up to ``capacity`` requests in flight, by slot.

    ``sample`` costs a gather of the columns, one ``fi_core.sample``, and one ``fi_core.penalize_logits`` only while a
    request in flight needs it; nothing waits for the device. What it runs depends on ``signature`` alone, so a CUDA graph
    captured with one signature serves as long as the signature is the same. Padding rows of a batch use slot -1.
    A token depends on its request's parameters, history, seed, sample and position, not on slot or batch.

    ``max_bias``: most biased (and, with min_tokens, stop) tokens of a request. ``order``: how filters combine.
    ``pipeline``: logits to tokens (None: DEFAULT_OPS under every installed rule). ``eos_token_ids``: the model's.
    Not thread-safe. Tables of vocabulary size (bitmask, histories) are made when a request first needs them.
    """

    def __init__(
        self,
        capacity: int,
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        eos_token_ids: Collection[int] = (),
        max_bias: int = 32,
        order: fi.sampling.FilterOrder = "sequential",
        pipeline: Pipeline | None = None,
        seed_source: Callable[[], int] = _random_seed,
    ) -> None:
        for name, value in (("capacity", capacity), ("vocab_size", vocab_size), ("max_bias", max_bias)):
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
        self.columns = Columns(capacity, vocab_size, max_bias, torch.device(device))
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
        columns.write(slot, params, seed, sample, len(output_ids))
        columns.write_allowed(slot, params.allowed_token_ids)
        prompt, output = (
            torch.tensor(tuple(ids), dtype=torch.int64).to(columns.device) for ids in (prompt_ids, output_ids)
        )
        columns.write_counts(slot, prompt, output, needed=not features.isdisjoint(_HISTORY))
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
        """Count tokens int64 [N] or [N, k] as output of ``slots`` int64 [N]; -1 tokens and -1 slots are skipped. Device
        work only, and none unless a request in flight needs the counts."""
        self._check_rows("slots", slots)
        tokens = tokens.unsqueeze(1) if tokens.dim() == 1 else tokens
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != slots.shape[0]:
            raise ArgumentError(
                "tokens", f"int64 [{slots.shape[0]}] or [{slots.shape[0]}, k]", f"{tokens.dtype} {tokens.shape}"
            )
        if self.active.isdisjoint((*_HISTORY, "min_tokens")):
            return
        columns = self.columns
        places = _places(slots, columns.capacity)
        used = (tokens >= 0).to(torch.int32)
        if columns.output_counts is not None and not self.active.isdisjoint(_HISTORY):
            rows = places.unsqueeze(1).expand_as(tokens)
            columns.output_counts.index_put_((rows, tokens.clamp(min=0)), used, accumulate=True)
        if "min_tokens" in self.active:
            columns.ints[INTS.index("num_output")].index_add_(0, places, used.sum(dim=1, dtype=torch.int32))

    def step(
        self, slots: Tensor, positions: Tensor, allowed: Tensor | None = None, drafted: Drafted | None = None
    ) -> Step:
        """The parameters of a step, gathered on the device: slots int64 [N] (-1: padding), positions int64 [N] of the
        tokens to draw, ``allowed`` int32 [N, ceil(V / 32)] bitmasks of this step (grammars), on top of the
        requests'."""
        self._check_rows("slots", slots)
        self._check_rows("positions", positions)
        columns, active = self.columns, self.active
        places = _places(slots, columns.capacity)
        floats = dict(zip(FLOATS, columns.floats.index_select(1, places), strict=True))
        ints = dict(zip(INTS, columns.ints.index_select(1, places), strict=True))
        values = {**floats, **ints}
        filters = FilterParams(**{name: values[name] for name in _FILTER_NAMES if name in active}, order=self.order)
        penalties: dict[str, Tensor] = {name: floats[name] for name in _HISTORY if name in active}
        if penalties:
            penalties |= self._counts(places, drafted)
        if "bias" in active:
            penalties |= self._bias(places, ints, drafted)
        masks = [allowed] if allowed is not None else []
        if "allowed" in active and columns.allowed is not None:
            masks.append(columns.allowed.index_select(0, places))
        if masks:
            penalties["allowed"] = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        keys = DrawKeys(columns.seeds.index_select(1, places)[0], ints["sample"], positions)
        return Step(filters, PenaltyParams(**penalties), keys)

    def _counts(self, places: Tensor, drafted: Drafted | None) -> dict[str, Tensor]:
        """The histories that the active penalties read."""
        prompt, output = self.columns.prompt_counts, self.columns.output_counts
        assert prompt is not None and output is not None
        found = {"output_counts": output, "prompt_counts": prompt, "rows": places.to(torch.int32)}
        if drafted is not None and drafted.counts is not None:
            found = {
                "output_counts": output.index_select(0, places) + drafted.counts,
                "prompt_counts": prompt.index_select(0, places),
            }
        if "repetition" not in self.active:
            del found["prompt_counts"]
        return found

    def _bias(self, places: Tensor, ints: dict[str, Tensor], drafted: Drafted | None) -> dict[str, Tensor]:
        """Every row has max_bias entries, padded with token -1, so shapes never depend on the requests."""
        columns = self.columns
        assert columns.bias_tokens is not None and columns.bias_values is not None and columns.bias_early is not None
        values = columns.bias_values.index_select(0, places)
        if "min_tokens" in self.active:
            made = ints["num_output"] if drafted is None else ints["num_output"] + drafted.depth
            early = (made < ints["min_tokens"]).unsqueeze(1)
            values = torch.where(early, columns.bias_early.index_select(0, places), values)
        indptr = torch.arange(places.shape[0] + 1, dtype=torch.int32, device=places.device) * columns.max_bias
        tokens = columns.bias_tokens.index_select(0, places).flatten()
        return {"bias_indptr": indptr, "bias_tokens": tokens, "bias_values": values.flatten()}

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


def _places(slots: Tensor, capacity: int) -> Tensor:
    """Columns of slots; padding (-1) goes to the scratch slot."""
    return torch.where(slots < 0, capacity, slots)
