"""Choices of the kernels that filter rows of logits, which the hook ``fi_tuning`` may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
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

    ``bracket``: where top_p stands alone it finds the last token that it keeps by an estimate and one exact pass around it
    (fi/sampling/bracket_search.cuh) instead of two levels of histograms; ``double_sums``: masses are added up in double instead
    of two limbs, and a joint top_p beside a small top_k is decided on the short list, with one such sum; ``whole_rounds``: a
    warp's part of a row is a multiple of 128 tokens where that makes it little larger.
    """

    bracket: bool = False
    double_sums: bool = True
    whole_rounds: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            if not isinstance(getattr(self, item.name), bool):
                raise ArgumentError(f"tuning.{item.name}", "a bool", getattr(self, item.name))


BUILT_IN = SamplingTuning()
"""What is chosen where no plugin says otherwise."""


def sampling_tuning_for(device: torch.device) -> SamplingTuning:
    """The choices for a device, asked for once until plugins change. Raises ArgumentError for unknown names or values in
    what ``fi_tuning`` returns."""
    current = registry()
    return _asked(current, current.generation, device)


@lru_cache(maxsize=64)
def _asked(current: KernelRegistry, generation: int, device: torch.device) -> SamplingTuning:
    given: Mapping[str, Any] | None = current.manager.hook.fi_tuning(op=TUNED_OP, target=target_of(device))
    names = [item.name for item in fields(SamplingTuning)]
    unknown = set(given or ()) - set(names)
    if unknown:
        raise ArgumentError("fi_tuning", f"names among {names}", sorted(unknown))
    return SamplingTuning(**(given or {}))
