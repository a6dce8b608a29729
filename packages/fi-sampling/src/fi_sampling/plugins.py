"""Operations and fusion rules of installed plugins, and pipelines built of names."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy
from fi_core import ArgumentError, PluginError
from fi_core.registry import registry

from . import hookspecs
from .builtin import BUILTIN_OPS, BUILTIN_RULES
from .pipeline import FusionRule, LogitsOp, Pipeline


def _hooks() -> pluggy.HookRelay:
    """The hooks of the process's plugins; adds this package's specifications to a registry that lacks them."""
    manager = registry().manager
    known = getattr(manager.hook, "fi_logits_ops", None)
    if known is None or not known.has_spec():
        manager.add_hookspecs(hookspecs)
    return manager.hook


def logits_ops() -> dict[str, LogitsOp]:
    """Every operation by name, built-in and of plugins; raises PluginError for a name used twice."""
    found = dict(BUILTIN_OPS)
    for ops in _hooks().fi_logits_ops():
        for op in ops:
            if op.name in found:
                raise PluginError(f"logits operation {op.name!r} is already defined")
            found[op.name] = op
    return found


def fusion_rules() -> tuple[FusionRule, ...]:
    """The rules of plugins, then the built-in ones."""
    return (*(rule for rules in _hooks().fi_fusion_rules() for rule in rules), *BUILTIN_RULES)


def pipeline_of(ops: Sequence[LogitsOp | str]) -> Pipeline:
    """A pipeline of operations and names of operations, under every installed rule; raises ArgumentError for an unknown
    name and PipelineTypeError for operations that do not fit."""
    known = logits_ops() if any(isinstance(op, str) for op in ops) else {}
    chosen = []
    for op in ops:
        if isinstance(op, str):
            if op not in known:
                raise ArgumentError("ops", f"operations among {sorted(known)}", repr(op))
            op = known[op]
        chosen.append(op)
    return Pipeline(chosen, fusion_rules())
