"""Choices of the kernels that filter rows of logits, which the hook ``fi_tuning`` may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from fi_core.contract import target_of
from fi_core.errors import ArgumentError
from fi_core.registry import KernelRegistry, registry

TUNED_OP = "sampling"
"""What ``fi_tuning`` is asked for."""


@dataclass(frozen=True)
class SamplingTuning:
    """Results are the same whatever is chosen (docs/kernels/sampling.md).

    ``bracket``: top_p finds the last token that it keeps by an estimate and one exact pass around it
    (fi/sampling/bracket_search.cuh) instead of two levels of histograms, and decides on the short list of a small top_k where it
    is joint; ``double_sums``: masses are added up in double instead of two limbs; ``whole_rounds``: a warp's part of a row is a
    multiple of 128 tokens.
    """

    bracket: bool = False
    double_sums: bool = False
    whole_rounds: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            if not isinstance(getattr(self, item.name), bool):
                raise ArgumentError(f"tuning.{item.name}", "a bool", getattr(self, item.name))


BUILT_IN = SamplingTuning()
"""What has run on a GPU."""

_found: tuple[KernelRegistry | None, int, dict[torch.device, SamplingTuning]] = (None, 0, {})


def sampling_tuning_for(device: torch.device) -> SamplingTuning:
    """The choices for a device, asked for once a registry. Raises ArgumentError for unknown names or values in what
    ``fi_tuning`` returns."""
    global _found
    current = registry()
    owner, generation, found = _found
    if owner is not current or generation != current.generation:
        found = {}
        _found = (current, current.generation, found)
    if device not in found:
        given: Mapping[str, Any] | None = current.manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
        names = [item.name for item in fields(SamplingTuning)]
        unknown = set(given or ()) - set(names)
        if unknown:
            raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
        found[device] = SamplingTuning(**(given or {}))
    return found[device]
