"""Every case, and the choice among them by operation, group or name."""

from __future__ import annotations

from collections.abc import Sequence

from .attention_cases import (
    append_cases,
    decode_cases,
    prefill_cases,
    prefill_feature_cases,
    prefill_fp8_cases,
    rotated_cases,
    verify_cases,
)
from .memory_cases import memory_cases
from .prefix_cases import prefix_cases
from .problem import Case
from .sampling_cases import sampling_cases
from .speculation_cases import speculation_cases

GROUPS = ("memory", "decode", "prefill", "prefill_fp8", "prefill_features", "append", "mixed", "prefix", "sampling")


def all_cases() -> list[Case]:
    """In the order they run."""
    decode = (*decode_cases(), *rotated_cases(), *verify_cases())
    prefill = (*prefill_cases(), *prefill_fp8_cases(), *prefill_feature_cases())
    sampling = (*sampling_cases(), *speculation_cases())
    return [*memory_cases(), *decode, *prefill, *append_cases(), *prefix_cases(), *sampling]


def choose(ops: Sequence[str], names: Sequence[str]) -> list[Case]:
    """Cases of the operations or groups ``ops`` (empty: all) that have one of ``names`` (empty: all), exactly or, where
    no case is called so, as a part. Raises ValueError naming what matches nothing."""
    cases = all_cases()
    known = {case.op for case in cases} | set(GROUPS)
    unknown = sorted(set(ops) - known)
    if unknown:
        raise ValueError(f"unknown operation or group {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if ops:
        cases = [case for case in cases if case.op in ops or case.group in ops]
    if not names:
        return cases
    chosen: list[Case] = []
    for name in names:
        found = [case for case in cases if case.name == name] or [case for case in cases if name in case.name]
        if not found:
            raise ValueError(f"no case matches {name!r}; --list shows them")
        chosen += [case for case in found if case not in chosen]
    return chosen
