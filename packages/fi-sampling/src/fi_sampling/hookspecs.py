"""Hooks of fi_sampling. A plugin of the entry-point group ``fi`` implements them with
``fi_core.hookimpl(optionalhook=True)`` (optional, because fi_core checks plugins before fi_sampling is imported)."""

from __future__ import annotations

from collections.abc import Sequence

from fi_core.hookspecs import hookspec

from .pipeline import FusionRule, LogitsOp


@hookspec
def fi_logits_ops() -> Sequence[LogitsOp]:
    """Operations that pipelines may name. Called by ``logits_ops``; names must be new. Must not touch a GPU."""
    raise AssertionError  # pragma: no cover - pluggy never calls a specification


@hookspec
def fi_fusion_rules() -> Sequence[FusionRule]:
    """Rules tried before the built-in ones. Called by ``fusion_rules``, once a pipeline made by ``pipeline_of``."""
    raise AssertionError  # pragma: no cover - pluggy never calls a specification
