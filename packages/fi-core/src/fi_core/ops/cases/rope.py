"""Conformance cases of ``rope``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Tolerance, Trial
from ...reference.rope import apply_rope
from ...rope import LinearScaling, Llama3Scaling, RopeConfig, RopePairs, RopeTable, YarnScaling
from ...tolerances import ROUNDED
from . import Guarded, guarded, name_of, normal

_ANGLE_ERROR = 2.0**-24
"""Relative rounding of an angle computed in float32; the position times this is an absolute error in radians."""


@dataclass(frozen=True)
class RopeCase:
    """One rope case. ``num_k_heads`` 0: k is None; ``after``: foreign elements after each head; ``max_position``: the
    largest position drawn plus 1 and the table's length."""

    name: str
    config: RopeConfig
    table: bool = True
    dtype: torch.dtype = torch.bfloat16
    num_tokens: int = 17
    num_q_heads: int = 8
    num_k_heads: int = 2
    head_dim: int = 128
    after: int = 0
    max_position: int = 4096
    position_dtype: torch.dtype = torch.int64
    in_place: bool = False

    @property
    def values(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "rotary_dim": self.config.rotary_dim,
            "pairs": self.config.pairs,
            "source": "table" if self.table else "computed",
        }

    @property
    def tolerance(self) -> Tolerance:
        rounded = ROUNDED[self.dtype]
        if self.table or self.dtype == torch.float64:
            return rounded
        # The frequency is float32 already; one more rounding of the product and half a step in each of its parts.
        radians = 2.0 * self.max_position * _ANGLE_ERROR
        return Tolerance(rounded.rel_rmse + radians, rounded.max_abs + 8.0 * radians)


def _shapes(base: RopeCase) -> Iterator[RopeCase]:
    """Variations of heads, tokens and layout."""
    yield replace(base, name="one_token", num_tokens=1)
    yield replace(base, name="many_tokens", num_tokens=301, num_q_heads=4, num_k_heads=1)
    yield replace(base, name="no_k", num_k_heads=0)
    yield replace(base, name="more_k_heads", num_q_heads=3, num_k_heads=5)
    yield replace(base, name="one_head", num_q_heads=1, num_k_heads=1)
    yield replace(base, name="strided", after=128)
    yield replace(base, name="unaligned", after=3)
    yield replace(base, name="int32", position_dtype=torch.int32)
    yield replace(base, name="int32_computed", position_dtype=torch.int32, table=False)
    yield replace(base, name="in_place", in_place=True)
    yield replace(base, name="in_place_strided", in_place=True, after=64)
    yield replace(base, name="in_place_no_k", in_place=True, num_k_heads=0)
    yield replace(base, name="in_place_interleaved", in_place=True, config=replace(base.config, pairs="interleaved"))
    yield replace(base, name="long_context", max_position=131072, config=replace(base.config, base=500000.0))
    yield replace(base, name="long_context_computed", max_position=131072, table=False)


_PAIRS: tuple[RopePairs, ...] = ("half", "interleaved")
_DIMS = ((64, 64), (80, 80), (96, 96), (256, 256), (2, 2), (128, 64), (80, 32), (100, 26), (576, 64))
_SCALINGS: dict[str, LinearScaling | Llama3Scaling | YarnScaling] = {
    "linear": LinearScaling(4.0),
    "llama3": Llama3Scaling(),
    "yarn": YarnScaling(4.0, 1024),
    "yarn_factor": YarnScaling(40.0, 512, attention_factor=1.5),
}


def _rope_cases() -> Iterator[RopeCase]:
    plain = RopeConfig(128)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for pairs in _PAIRS:
            for table in (True, False):
                config = replace(plain, pairs=pairs)
                source = "table" if table else "computed"
                yield RopeCase(f"{pairs}_{source}_{name_of(dtype)}", config, table, dtype)
    for head_dim, rotary_dim in _DIMS:
        for pairs in _PAIRS:
            name = f"d{head_dim}_r{rotary_dim}_{pairs}"
            yield RopeCase(name, RopeConfig(rotary_dim, pairs=pairs), head_dim=head_dim, in_place=rotary_dim == 32)
            if rotary_dim < head_dim:
                yield RopeCase(f"{name}_computed", RopeConfig(rotary_dim, pairs=pairs), table=False, head_dim=head_dim)
    for name, scaling in _SCALINGS.items():
        for table in (True, False):
            config = RopeConfig(128, base=500000.0, scaling=scaling)
            yield RopeCase(f"{name}_{'table' if table else 'computed'}_fp32", config, table, torch.float32)
    yield from _shapes(RopeCase("base", plain))


def _build(case: RopeCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, case.max_position, (case.num_tokens,), generator=generator)
    positions[0], positions[-1] = 0, case.max_position - 1
    positions = positions.to(device=device, dtype=case.position_dtype)
    table = RopeTable.make(case.config, device, case.max_position if case.table else None)
    shapes = {"q": (case.num_tokens, case.num_q_heads, case.head_dim)}
    if case.num_k_heads:
        shapes["k"] = (case.num_tokens, case.num_k_heads, case.head_dim)
    contents = {name: normal(shape, case.dtype, device, generator) for name, shape in shapes.items()}

    def buffer(name: str, content: Tensor | None = None) -> Guarded:
        return guarded(shapes[name], case.dtype, device, after=case.after, content=content)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        inputs = {name: buffer(name, content) for name, content in contents.items()}
        outputs = inputs if case.in_place else {name: buffer(name) for name in contents}
        k, k_out = (inputs["k"].view, outputs["k"].view) if "k" in inputs else (None, None)
        kernel(inputs["q"].view, k, positions, table, outputs["q"].view, k_out)
        found = {f"{name}_out": item.view for name, item in outputs.items()}
        found |= {f"{name}_rest": item.rest() for name, item in outputs.items()}
        return found if case.in_place else {**found, **{name: item.view for name, item in inputs.items()}}

    def expected() -> Mapping[str, Tensor]:
        wanted = {f"{name}_rest": buffer(name).rest() for name in contents}
        for name, content in contents.items():
            wanted[f"{name}_out"] = apply_rope(content, positions, table, torch.float64)
        return wanted if case.in_place else {**wanted, **contents}

    tolerance = {f"{name}_out": case.tolerance for name in contents} | {f"{name}_rest": EXACT for name in contents}
    return Trial(run, expected, tolerance if case.in_place else {**tolerance, **dict.fromkeys(contents, EXACT)})


def cases() -> Iterator[Case]:
    """Every case of ``rope``."""
    for case in _rope_cases():
        hostile = case.after % 2 or case.max_position > 4096
        yield Case(case.name, case.values, partial(_build, case), frozenset({"hostile"} if hostile else ()))
