"""Sampling from logits at the peers' batch sizes and vocabularies, a case for each thing that can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from fi_core.contract import EXACT, Cost, Tolerance
from fi_core.ops import filter_logits, logprobs, sample, top_k
from fi_core.reference.sampling.boundary import boundary_distance
from fi_core.reference.sampling.draw import filter_logits as reference_filter
from fi_core.reference.sampling.draw import sample as reference_sample
from fi_core.reference.sampling.penalties import penalize_logits as reference_penalties
from fi_core.sampling import NO_PENALTIES, DrawKeys, FilterParams, PenaltyParams
from torch import Tensor

from .ceilings import copies, reads
from .numerics import Accuracy, checker
from .problem import Case, Outputs, Problem, generator_on
from .sampling_penalties import penalties_of

BATCHES, VOCABULARIES = (1, 16, 64, 256, 512), (128256, 32000)
MORE_BATCHES, MORE_VOCABULARIES = (1, 64, 256), (151936, 201088)
TOP_K, TOP_P, MIN_P, TEMPERATURE = 50, 0.9, 0.1, 0.8
TOP_N = 20
"""Whose log-probabilities are asked for beside the drawn token's."""
LONG_ROWS, LONG_TOP_K = 524288, 2048
"""Of an indexer that picks tokens of a long context for attention."""
EXPONENTIAL_ERROR = 2.0**-19
"""Relative error of any backend's exponential, by which a draw may be another than the reference's."""
MAX_BOUNDARY_ROWS = 0.01
"""Share of the rows that may draw a token beyond a filter's limit, with generators other than ours; and of typical_p's."""
_LOGPROBS = Tolerance(1e-5, 2e-5)
_PROBS = Tolerance(5e-3, 1e-4)
"""Admits a token more or less at a filter's limit; the conformance suite holds our kernels to the exact set."""


@dataclass(frozen=True)
class SamplingInputs:
    """``task``, float32 logits [B, V], their softmax, and the filters, keys and penalties of each row."""

    task: str
    logits: Tensor
    probs: Tensor
    filters: FilterParams
    keys: DrawKeys
    penalties: PenaltyParams = NO_PENALTIES
    k: int = TOP_K


def _filters(task: str, num_rows: int, device: torch.device) -> FilterParams:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    return FilterParams(
        temperature=column(TEMPERATURE, torch.float32) if "temperature" in task else None,
        top_k=column(TOP_K, torch.int32) if "topk" in task else None,
        top_p=column(TOP_P, torch.float32) if "topp" in task else None,
        min_p=column(MIN_P, torch.float32) if "minp" in task else None,
        typical_p=column(TOP_P, torch.float32) if "typicalp" in task else None,
        order="joint" if "joint" in task else "sequential",
    )


SPREADS = {"": 3.0, "bf16": 3.0, "flat": 0.01, "peaked": 10.0}
"""What a case's name may end with -> the standard deviation of its logits, which with "bf16" are bfloat16."""


def _inputs(device: torch.device, task: str, num_rows: int, vocab_size: int, kind: str = "") -> SamplingInputs:
    shape = (num_rows, vocab_size)
    logits = torch.randn(shape, device=device, generator=generator_on(device)) * SPREADS[kind]
    if kind == "bf16":
        logits = logits.to(torch.bfloat16)
    seeds = torch.arange(num_rows, device=device)
    keys = DrawKeys(seeds, torch.zeros_like(seeds, dtype=torch.int32), torch.full_like(seeds, 100))
    penalties = penalties_of(num_rows, vocab_size, device) if "penalised" in task else NO_PENALTIES
    return SamplingInputs(task, logits, logits.float().softmax(-1), _filters(task, num_rows, device), keys, penalties)


def _draw_check(inputs: SamplingInputs) -> Callable[[Outputs], Accuracy]:
    """Tokens as the reference draws them ("tokens"), or drawn from what the filters keep ("drawn", other generators)."""
    logits, kept = torch.empty_like(inputs.logits), torch.empty_like(inputs.probs)
    reference_penalties(inputs.logits, inputs.penalties, logits)
    logits = logits.float()
    reference_filter(logits, inputs.filters, "probs", kept)
    expected = torch.empty_like(inputs.keys.seed)
    reference_sample(logits, inputs.filters, inputs.keys, None, expected)

    def check(outputs: Outputs) -> Accuracy:
        ((name, tokens),) = outputs.items()
        tokens = tokens.flatten().long()
        if tokens.shape != expected.shape or bool(((tokens < 0) | (tokens >= kept.shape[1])).any()):
            return Accuracy(f"{name}: no token in the vocabulary for each row")
        num_filtered = int((kept.gather(1, tokens.unsqueeze(1)) == 0).sum())
        num_other = int((tokens != expected).sum()) if name == "tokens" else 0
        if num_other and inputs.filters.typical_p is None:
            distance = boundary_distance(tokens, logits, inputs.filters, inputs.keys, EXPONENTIAL_ERROR)
            num_other = int((distance > 1).sum())
            if num_other:
                return Accuracy(f"{num_other} tokens that no rounding of the exponential explains")
        allowed = MAX_BOUNDARY_ROWS * tokens.shape[0]
        if num_filtered > allowed or num_other > allowed:
            return Accuracy(f"{num_filtered} tokens that the filters drop, {num_other} other than the reference's")
        return Accuracy(None)

    return check


def _sample(device: torch.device, task: str, num_rows: int, vocab_size: int, kind: str = "") -> Problem:
    inputs = _inputs(device, task, num_rows, vocab_size, kind)
    out = torch.empty_like(inputs.keys.seed)
    request: dict[str, Hashable] = {"dtype": inputs.logits.dtype, "vocab_size": vocab_size}
    request |= {"filters": inputs.filters.active, "order": inputs.filters.order}
    request |= {"penalties": inputs.penalties.active, "slots": False}

    def call() -> Outputs:
        penalties = inputs.penalties
        return {"tokens": sample.sample(inputs.logits, inputs.filters, inputs.keys, penalties=penalties, out=out)}

    return Problem(
        request,
        inputs,
        {"": lambda: call},
        _draw_check(inputs),
        sample.cost(num_rows, vocab_size, inputs.logits.dtype),
        reads(inputs.logits),
    )


def _filter(device: torch.device, task: str, num_rows: int, vocab_size: int, kind: str) -> Problem:
    inputs = _inputs(device, task, num_rows, vocab_size)
    out = torch.empty_like(inputs.logits)
    request: dict[str, Hashable] = {"dtype": torch.float32, "vocab_size": vocab_size, "kind": kind}
    request |= {"filters": inputs.filters.active, "order": inputs.filters.order}
    expected = torch.empty_like(inputs.logits)
    reference_filter(inputs.logits, inputs.filters, kind, expected)
    cost = filter_logits.cost(num_rows, vocab_size, torch.float32)
    return Problem(
        request,
        inputs,
        {"": lambda: lambda: {"out": filter_logits.filter_logits(inputs.logits, inputs.filters, kind, out=out)}},
        _filter_check(expected, kind),
        cost,
        copies(cost, device),
    )


def _filter_check(expected: Tensor, kind: str) -> Callable[[Outputs], Accuracy]:
    """Probabilities within the tolerance; masked logits, which hold infinities, bit for bit."""
    return checker({"out": expected}, {"out": _PROBS if kind == "probs" else EXACT})


def _top_k(device: torch.device, task: str, num_rows: int, vocab_size: int, k: int = TOP_K) -> Problem:
    inputs = replace(_inputs(device, task, num_rows, vocab_size), k=k)

    def call() -> Outputs:
        values, indices = top_k.top_k(inputs.logits, k)
        return {"values": values, "indices": indices}

    values, indices = inputs.logits.sort(dim=1, descending=True, stable=True)
    expected = {"values": values[:, :k].clone(), "indices": indices[:, :k].clone()}
    request = {"dtype": torch.float32, "vocab_size": vocab_size, "k": k}
    check = checker(expected, {"values": EXACT, "indices": EXACT})
    cost: Cost = top_k.cost(num_rows, vocab_size, k, torch.float32)
    return Problem(request, inputs, {"": lambda: call}, check, cost, reads(inputs.logits))


def _logprobs(device: torch.device, task: str, num_rows: int, vocab_size: int) -> Problem:
    """Of tokens that were drawn, and of the most likely ones."""
    inputs = replace(_inputs(device, task, num_rows, vocab_size), k=TOP_N)
    tokens = torch.empty_like(inputs.keys.seed)
    reference_sample(inputs.logits, inputs.filters, inputs.keys, None, tokens)

    def call() -> Outputs:
        found = logprobs.logprobs(inputs.logits, tokens, TOP_N)
        return {"chosen": found.chosen, "values": found.values, "indices": found.indices}

    exact = inputs.logits.double().log_softmax(-1)
    best = inputs.logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP_N].clone()
    chosen = exact.gather(1, tokens.unsqueeze(1)).squeeze(1)
    expected = {"chosen": chosen, "values": exact.gather(1, best), "indices": best}
    request = {"dtype": torch.float32, "vocab_size": vocab_size, "top_n": TOP_N}
    check = checker(expected, {"chosen": _LOGPROBS, "values": _LOGPROBS, "indices": EXACT})
    cost = logprobs.cost(num_rows, vocab_size, TOP_N, torch.float32)
    return Problem(request, inputs, {"": lambda: call}, check, cost, reads(inputs.logits))


TASKS: dict[str, tuple[str, Callable[..., Problem]]] = {
    "plain": ("sample", _sample),
    "topp.9": ("sample", _sample),
    "topk50": ("sample", _sample),
    "topk50 topp.9": ("sample", _sample),
    "topk50 topp.9 joint": ("sample", _sample),
    "minp.1": ("sample", _sample),
    "temperature.8": ("sample", _sample),
    "typicalp.9": ("sample", _sample),
    "plain penalised": ("sample", _sample),
    "temperature.8 penalised": ("sample", _sample),
    "topk50 topp.9 penalised": ("sample", _sample),
    "topp.9 penalised": ("sample", _sample),
    "topp.9 renorm": ("filter_logits", partial(_filter, kind="probs")),
    "topk50 renorm": ("filter_logits", partial(_filter, kind="probs")),
    "topk50 mask": ("filter_logits", partial(_filter, kind="logits")),
    "topk50 select": ("top_k", _top_k),
    "logprobs20": ("logprobs", _logprobs),
}
"""What a case asks for -> its operation and builder."""


MAIN_TASKS = ("plain", "topp.9", "topk50 topp.9", "topk50 topp.9 joint")
"""Also at other vocabularies and of other logits."""


def sampling_cases() -> Iterator[Case]:
    """Every task at every batch size and vocabulary; "sampling B1 V128256" begins as the names of the peers' file. Then some at
    more vocabularies, and of bfloat16, flat and peaked logits, and many of the largest of long rows."""
    for vocab_size in VOCABULARIES:
        for num_rows in BATCHES:
            for task, (op, build) in TASKS.items():
                made = partial(build, task=task, num_rows=num_rows, vocab_size=vocab_size)
                yield Case(op, "sampling", f"sampling B{num_rows} V{vocab_size} {task}", made)
    more = [(vocab_size, "") for vocab_size in MORE_VOCABULARIES] + [
        (VOCABULARIES[0], kind) for kind in SPREADS if kind
    ]
    for vocab_size, kind in more:
        for num_rows in MORE_BATCHES:
            for task in MAIN_TASKS:
                made = partial(_sample, task=task, num_rows=num_rows, vocab_size=vocab_size, kind=kind)
                yield Case("sample", "sampling", f"sampling B{num_rows} V{vocab_size} {task} {kind}".rstrip(), made)
    for num_rows in MORE_BATCHES:
        made = partial(_top_k, task="select", num_rows=num_rows, vocab_size=LONG_ROWS, k=LONG_TOP_K)
        yield Case("top_k", "sampling", f"sampling B{num_rows} V{LONG_ROWS} topk{LONG_TOP_K} select", made)
