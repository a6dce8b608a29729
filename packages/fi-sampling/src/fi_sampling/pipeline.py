"""A typed pipeline of logits operations, with fusion rules that replace runs of operations by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from fi_core import ArgumentError, DrawKeys, FiError, FilterParams, PenaltyParams
from fi_core.sampling import FILTERS
from torch import Tensor


class Kind(Enum):
    """What flows between operations: ``LOGITS`` floating [N, V]; ``PROBS`` float32 [N, V]; ``TOKENS`` int64 [N]."""

    LOGITS = "logits"
    PROBS = "probs"
    TOKENS = "tokens"


class PipelineTypeError(FiError, TypeError):
    """Operations of a pipeline do not fit each other."""


class ProcessorError(FiError):
    """A user's operation raised, or returned something of another kind than it declared; names the operation."""


@dataclass(frozen=True)
class Step:
    """The parameters of one step; None members are not used by any row. Row n of the batch uses row ``slots[n]`` of
    ``filters``, ``penalties`` and ``keys`` (int64 [N]; below 0: none), or row n where there are no ``slots``; as in
    ``fi_core.sample``, ``keys.position``, ``penalties.step_allowed`` and ``penalties.rows`` always have a row for each of
    the batch."""

    filters: FilterParams
    penalties: PenaltyParams
    keys: DrawKeys
    slots: Tensor | None = None

    def rows_of(self, filters: FilterParams) -> FilterParams:
        """``filters`` (which are among these) with one row a row of the batch: a gather a column, or themselves."""
        if self.slots is None:
            return filters
        places = self.slots.clamp(min=0)
        columns = {name: getattr(filters, name) for name in ("temperature", *FILTERS)}
        return FilterParams(
            **{name: None if column is None else column[places] for name, column in columns.items()},
            order=filters.order,
        )

    @property
    def row_keys(self) -> DrawKeys:
        """``keys`` with one row a row of the batch."""
        if self.slots is None:
            return self.keys
        places = self.slots.clamp(min=0)
        return DrawKeys(self.keys.seed[places], self.keys.sample[places], self.keys.position)


@dataclass(frozen=True)
class LogitsOp:
    """One operation: ``run(tensor, step)`` turns a tensor of kind ``takes`` into one of kind ``gives``. It may write to
    its input unless the pipeline's caller keeps using the logits; it must not synchronise with the host to stay legal
    in CUDA graphs. ``launches(logits, step)``, if given, says in a line each what it would launch."""

    name: str
    takes: Kind
    gives: Kind
    run: Callable[[Tensor, Step], Tensor]
    builtin: bool = False
    launches: Callable[[Tensor, Step], Sequence[str]] | None = None


def logits_op(
    name: str, takes: Kind = Kind.LOGITS, gives: Kind = Kind.LOGITS
) -> Callable[[Callable[[Tensor, Step], Tensor]], LogitsOp]:
    """A decorator that makes an operation of a function ``(tensor, step) -> tensor``."""
    return lambda run: LogitsOp(name, takes, gives, run)


@dataclass(frozen=True)
class FusionRule:
    """``match(ops)`` says how many operations at the head of ``ops`` it replaces (below 2: none); ``fuse(matched)``
    makes the operation that replaces them, which must give the same result."""

    name: str
    match: Callable[[Sequence[LogitsOp]], int]
    fuse: Callable[[Sequence[LogitsOp]], LogitsOp]


@dataclass(frozen=True)
class _Stage:
    op: LogitsOp
    fused: tuple[LogitsOp, ...]
    rule: str | None


class Pipeline:
    """Operations checked against each other and fused once; calling it runs them.

    The first operation takes logits and each takes what the previous one gives, else PipelineTypeError. Rules are tried
    in order at each place from the front, so earlier rules win; a rule sees only operations that are not fused yet.
    """

    def __init__(self, ops: Sequence[LogitsOp], rules: Sequence[FusionRule] = ()) -> None:
        if not ops:
            raise ArgumentError("ops", "at least one operation", "none")
        self.ops = tuple(ops)
        self.rules = tuple(rules)
        _check_kinds(self.ops)
        self._stages = _fused(self.ops, self.rules)
        _check_kinds([stage.op for stage in self._stages])

    @property
    def stages(self) -> tuple[LogitsOp, ...]:
        """The operations that run, after fusion."""
        return tuple(stage.op for stage in self._stages)

    def __call__(self, logits: Tensor, step: Step) -> Tensor:
        """Run every stage on logits [N, V]; raises ProcessorError for a failing user operation."""
        tensor = logits
        for stage in self._stages:
            op = stage.op
            tensor = op.run(tensor, step) if op.builtin else _run_user_op(op, tensor, step)
        return tensor

    def launches(self, logits: Tensor, step: Step) -> list[str]:
        """What a call launches, a line each, for logits of this dtype, device and vocabulary (their rows do not matter)
        and a step with these parameters."""
        lines: list[str] = []
        for op in self.stages:
            lines += [f"{op.name}: as it likes"] if op.launches is None else op.launches(logits, step)
        return lines

    def explain(self) -> str:
        """One line a stage: its kinds, and which operations a rule fused into it."""
        lines = []
        for stage in self._stages:
            line = f"{stage.op.name}: {stage.op.takes.value} -> {stage.op.gives.value}"
            if stage.rule is not None:
                line += f" (rule {stage.rule} fused {' + '.join(op.name for op in stage.fused)})"
            lines.append(line)
        return "\n".join(lines)


def _check_kinds(ops: Sequence[LogitsOp]) -> None:
    kind, source = Kind.LOGITS, "the pipeline's input"
    for op in ops:
        if op.takes is not kind:
            raise PipelineTypeError(f"operation {op.name!r} takes {op.takes.value}, but {source} gives {kind.value}")
        kind, source = op.gives, f"operation {op.name!r}"


def _fused(ops: tuple[LogitsOp, ...], rules: Sequence[FusionRule]) -> tuple[_Stage, ...]:
    stages: list[_Stage] = []
    start = 0
    while start < len(ops):
        stage = _Stage(ops[start], (ops[start],), None)
        for rule in rules:
            count = rule.match(ops[start:])
            if count >= 2:
                matched = ops[start : start + count]
                stage = _Stage(rule.fuse(matched), matched, rule.name)
                break
        stages.append(stage)
        start += len(stage.fused)
    return tuple(stages)


def _run_user_op(op: LogitsOp, tensor: Tensor, step: Step) -> Tensor:
    try:
        result = op.run(tensor, step)
    except Exception as error:
        raise ProcessorError(f"logits operation {op.name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor):
        raise ProcessorError(f"logits operation {op.name!r} returned {type(result).__name__}, not a tensor")
    shape = tensor.shape[:1] if op.gives is Kind.TOKENS else tensor.shape
    fits = result.dtype == torch.int64 if op.gives is Kind.TOKENS else result.dtype.is_floating_point
    if op.gives is Kind.PROBS:
        fits = result.dtype == torch.float32
    if result.shape != shape or result.device != tensor.device or not fits:
        found = f"{result.dtype} {tuple(result.shape)} on {result.device}"
        expected = f"{op.gives.value} of shape {tuple(shape)} on {tensor.device}"
        raise ProcessorError(f"logits operation {op.name!r} returned {found}, expected {expected}")
    return result
