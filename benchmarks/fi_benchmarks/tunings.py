"""Our kernels with other tunings than their own, beside them: what a ``fi_tuning`` hook would answer, from the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry

from .problem import Call, Case, Maker, Problem


@dataclass(frozen=True)
class GivenTuning:
    """A plugin that answers ``fi_tuning`` for ``op`` with ``values``; ``text`` names it in rows."""

    op: str
    values: Mapping[str, Any]
    text: str

    @classmethod
    def parse(cls, text: str) -> GivenTuning:
        """From "attention_decode:num_stages=2,item_cost=8"; ValueError for anything else."""
        op, _, pairs = text.partition(":")
        values = {}
        for pair in pairs.split(","):
            name, _, value = pair.partition("=")
            if not op or not name.isidentifier() or not value:
                raise ValueError(f"{text!r} is not OP:NAME=VALUE,...")
            try:
                values[name] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                raise ValueError(f"{value!r}, the value of {name}, is no number, string or bool of Python") from None
        return cls(op, values, pairs)

    @hookimpl
    def fi_tuning(self, op: str) -> Mapping[str, Any] | None:
        return self.values if op == self.op else None

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Plans made meanwhile have the tuning."""
        manager = registry().manager
        manager.register(self)
        try:
            yield
        finally:
            manager.unregister(self)


def with_tunings(case: Case, tunings: list[GivenTuning]) -> Case:
    """``case`` with each of our calls also made under each of ``tunings``, as variants named after them."""
    return replace(case, build=partial(_problem, case, tunings)) if tunings else case


def _problem(case: Case, tunings: list[GivenTuning], device: torch.device) -> Problem:
    problem = case.build(device)
    tuned = {
        f"{variant}+{tuning.text}": partial(_made, make, tuning)
        for variant, make in problem.ours.items()
        for tuning in tunings
    }
    return replace(problem, ours={**problem.ours, **tuned})


def _made(make: Maker, tuning: GivenTuning) -> Call:
    with tuning.in_effect():
        return make()
