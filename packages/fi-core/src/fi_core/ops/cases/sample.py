"""Conformance cases of ``sample``: tokens must be equal. ``filter_logits`` uses the same rows and filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import sample
from ...sampling import PENALTIES
from . import guarded, name_of, poisoned
from .penalty_inputs import map_penalties
from .sampling_inputs import (
    DrawCase,
    draw_inputs,
    flat,
    hostile,
    huge,
    masked,
    noise,
    on_device,
    single,
    tied,
    unusable,
)

_EVERY_FILTER: dict[str, tuple[float, ...]] = {
    "temperature": (1.0, 0.0, 0.7, 1.6),
    "top_k": (0, 20, 5, 1, 200),
    "top_p": (1.0, 0.83, 0.51),
    "min_p": (0.0, 0.013),
    "typical_p": (1.0, 0.72, 1.0, 0.91, 0.37),
}

FILTERS: dict[str, dict[str, tuple[float, ...]]] = {
    "plain": {},
    "temperature": {"temperature": (0.6, 1.0, 1.7)},
    "greedy": {"temperature": (0.0,)},
    "mixed_greedy": {"temperature": (0.0, 1.2, 0.4)},
    "top_k": {"top_k": (1, 3, 0, 17, 5000)},
    "top_p": {"top_p": (0.9, 0.31, 1.0, 0.0, 0.71)},
    "min_p": {"min_p": (0.053, 0.0, 0.41, 1.0)},
    "typical_p": {"typical_p": (0.63, 1.0, 0.22, 0.0)},
    "top_k_top_p": {"temperature": (0.8, 1.1), "top_k": (12, 0, 40), "top_p": (0.9, 0.73, 1.0, 0.62)},
    "top_k_typical_p": {"top_k": (2, 3, 9), "typical_p": (0.11, 0.52)},
    "out_of_range": {
        "temperature": (1.0, 0.7, -0.5, 1.0, float("nan"), 0.0),
        "top_k": (5, -1, 3),
        "top_p": (0.9, 0.8, 0.7, 1.5, 0.6, 0.0, float("nan")),
        "min_p": (0.0, 0.1, -0.1, 1.5, float("nan"), 0.0, 0.0, 0.0),
        "typical_p": (1.0, 0.9, 0.9, 0.9, 0.9, -0.5, 0.9, 2.0, 0.9, float("nan"), 0.9),
    },
    "every": _EVERY_FILTER,
}
"""Filter values by the name they have in cases."""


def draw_cases() -> Iterator[DrawCase]:
    """Rows and filters, cheap ones first."""
    for name, columns in FILTERS.items():
        yield DrawCase(name, columns=columns)
        if len(set(columns) - {"temperature"}) > 1:
            yield DrawCase(f"{name}_joint", columns=columns, order="joint")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield DrawCase(f"every_{name_of(dtype)}", columns=_EVERY_FILTER, dtype=dtype)
    for vocab_size in (1, 2, 3, 31, 256, 511):
        yield DrawCase(f"v{vocab_size}", columns=FILTERS["top_k_top_p"], vocab_size=vocab_size, make=tied)
    for maker in (flat, tied, masked, single, huge, unusable, hostile):
        yield DrawCase(f"{maker.__name__}_plain", make=maker, vocab_size=130)
        yield DrawCase(f"{maker.__name__}_every", make=maker, columns=_EVERY_FILTER, vocab_size=130, num_rows=30)
    yield DrawCase("hostile_greedy", make=hostile, columns=FILTERS["greedy"], num_rows=14)
    yield DrawCase("top_p_out_of_range", num_rows=12, columns={"top_p": (0.9, 0.0, 1.5, float("nan"), 1.0)})
    yield DrawCase("one_row", num_rows=1, columns=FILTERS["top_k_top_p"])
    yield DrawCase("strided", after=31, columns=FILTERS["top_k_top_p"])
    yield DrawCase("strided_bf16", after=8, vocab_size=128, columns=FILTERS["mixed_greedy"], dtype=torch.bfloat16)
    yield DrawCase(
        "v4096", vocab_size=4096, num_rows=3, columns={"top_k": (50, 0, 1000), "top_p": (0.91, 0.62)}, make=noise
    )


def sample_cases() -> Iterator[DrawCase]:
    """``draw_cases`` and those that map outputs to rows."""
    yield from draw_cases()
    yield DrawCase("rows", num_rows=4, repeats=5, columns=FILTERS["plain"])
    yield DrawCase("rows_every", num_rows=7, repeats=4, columns=_EVERY_FILTER, make=hostile, after=3)
    yield DrawCase("rows_one", num_rows=1, repeats=40, columns=FILTERS["top_p"])
    yield DrawCase("slots", slotted=True, num_rows=20, columns=FILTERS["top_k_top_p"])
    yield DrawCase("slots_plain", slotted=True, num_rows=20)
    yield DrawCase("slots_every", slotted=True, num_rows=20, columns=_EVERY_FILTER, make=hostile)
    yield DrawCase("slots_rows", num_rows=4, repeats=5, slotted=True, columns=FILTERS["top_k_top_p"])
    for part in PENALTIES:
        yield DrawCase(f"penalties_{part}", parts=(part,), num_rows=9)
    for name in ("plain", "greedy", "top_k", "top_p", "top_k_top_p", "every"):
        yield DrawCase(f"penalties_{name}", parts=PENALTIES, columns=FILTERS[name])
    for dtype in (torch.float16, torch.bfloat16):
        yield DrawCase(f"penalties_{name_of(dtype)}", parts=PENALTIES, dtype=dtype, columns=FILTERS["top_k_top_p"])
    for vocab_size, slotted in ((1, False), (31, False), (33, False), (5003, True)):
        name, filters = f"penalties_v{vocab_size}", FILTERS["top_k"]
        yield DrawCase(name, 4, vocab_size, columns=filters, parts=PENALTIES, slotted=slotted)
    yield DrawCase("penalties_slots", parts=PENALTIES, slotted=True, num_rows=20, columns=FILTERS["top_k_top_p"])
    yield DrawCase("penalties_slots_rows", parts=PENALTIES, slotted=True, num_rows=4, repeats=5, after=3)
    yield DrawCase("penalties_hostile", parts=PENALTIES, make=hostile, num_rows=21, columns=FILTERS["mixed_greedy"])


def _build(case: DrawCase, device: torch.device, seed: int) -> Trial:
    inputs = draw_inputs(case, seed)
    content, filters, keys = inputs.logits.to(device), on_device(inputs.filters, device), on_device(inputs.keys, device)
    rows = None if inputs.rows is None else inputs.rows.to(device)
    penalties = map_penalties(inputs.penalties, lambda tensor: tensor.to(device))
    slots = None if inputs.slots is None else inputs.slots.to(device)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        logits = guarded(content.shape, case.dtype, device, after=case.after, content=content)
        tokens = poisoned((case.num_outputs,), torch.int64, device)
        kernel(logits.view, filters, keys, rows, tokens, penalties, slots)
        return {"tokens": tokens, "logits": logits.view.contiguous()}

    def expected() -> Mapping[str, Tensor]:
        tokens = torch.empty(case.num_outputs, dtype=torch.int64)
        given = (inputs.logits, inputs.filters, inputs.keys, inputs.rows)
        sample(*given, tokens, inputs.penalties, inputs.slots)
        return {"tokens": tokens, "logits": inputs.logits}

    return Trial(run, expected, {"tokens": EXACT, "logits": EXACT})


def cases() -> Iterator[Case]:
    """Every case of ``sample``."""
    for case in sample_cases():
        values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "filters": case.filters, "order": case.order}
        values |= {"penalties": frozenset(case.parts), "slots": case.slotted}
        yield Case(case.name, values, partial(_build, case), case.tags)
