"""Typical calls of the sampling operations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from ..contract import EXACT, Cost, Tolerance
from ..ops import filter_logits, logprobs, penalize_logits, record_tokens, sample, top_k, verify_chain, verify_tree
from ..ops.cases import normal
from ..sampling import DrawKeys, FilterParams, PenaltyParams, TokenHistory
from ..tolerances import ROUNDED
from .workload import Builder, Outputs, Scale, Workload

_SEED = 21
_TOP_K, _TOP_N, _NUM_CHAIN, _NUM_TREE, _CAPACITY = 64, 5, 4, 16, 1024


def _logits(device: torch.device, scale: Scale) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return 3.0 * normal((scale.num_rows, scale.vocab_size), torch.float32, device, generator)


def _keys(device: torch.device, count: int) -> DrawKeys:
    seed = torch.arange(count, dtype=torch.int64, device=device)
    sample_idx = torch.zeros(count, dtype=torch.int32, device=device)
    return DrawKeys(seed, sample_idx, torch.full((count,), 100, dtype=torch.int64, device=device))


def _filters(device: torch.device, scale: Scale) -> FilterParams:
    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((scale.num_rows,), value, dtype=dtype, device=device)

    return FilterParams(column(0.8, torch.float32), top_k=column(50, torch.int32), top_p=column(0.9, torch.float32))


def _workload(
    scale: Scale,
    values: Mapping[str, Hashable],
    call: Callable[[], Outputs],
    cost: Cost,
    tolerance: Mapping[str, Tolerance],
) -> Workload:
    fields: dict[str, Hashable] = {"vocab_size": scale.vocab_size, **values}
    return Workload(f"rows={scale.num_rows} vocab={scale.vocab_size}", fields, call, cost, tolerance)


_FILTERED: Mapping[str, Hashable] = {
    "dtype": torch.float32,
    "filters": frozenset({"top_k", "top_p"}),
    "order": "sequential",
}


def _sample(device: torch.device, scale: Scale) -> Workload:
    logits, filters, keys = _logits(device, scale), _filters(device, scale), _keys(device, scale.num_rows)
    out = torch.empty(scale.num_rows, dtype=torch.int64, device=device)
    cost = sample.cost(scale.num_rows, scale.vocab_size, torch.float32)

    def call() -> Outputs:
        return {"tokens": sample.sample(logits, filters, keys, out=out)}

    values = {**_FILTERED, "penalties": frozenset[str](), "slots": False}
    return _workload(scale, values, call, cost, {"tokens": EXACT})


def _filter(device: torch.device, scale: Scale) -> Workload:
    logits, filters = _logits(device, scale), _filters(device, scale)
    out = torch.empty_like(logits)
    values = {**_FILTERED, "kind": "probs"}
    cost = filter_logits.cost(scale.num_rows, scale.vocab_size, torch.float32)
    tolerance = {"out": Tolerance(1e-5, 1e-5)}

    def call() -> Outputs:
        return {"out": filter_logits.filter_logits(logits, filters, out=out)}

    return _workload(scale, values, call, cost, tolerance)


def _top_k(device: torch.device, scale: Scale) -> Workload:
    logits = _logits(device, scale)

    def call() -> Outputs:
        values, indices = top_k.top_k(logits, _TOP_K)
        return {"values": values, "indices": indices}

    cost = top_k.cost(scale.num_rows, scale.vocab_size, _TOP_K, torch.float32)
    return _workload(scale, {"dtype": torch.float32, "k": _TOP_K}, call, cost, {"values": EXACT, "indices": EXACT})


def _logprobs(device: torch.device, scale: Scale) -> Workload:
    logits = _logits(device, scale)
    tokens = torch.arange(scale.num_rows, device=device)

    def call() -> Outputs:
        found = logprobs.logprobs(logits, tokens, _TOP_N)
        return {"chosen": found.chosen, "values": found.values, "indices": found.indices}

    cost = logprobs.cost(scale.num_rows, scale.vocab_size, _TOP_N, torch.float32)
    limit = ROUNDED[torch.float32]
    tolerance = {"chosen": limit, "values": limit, "indices": EXACT}
    return _workload(scale, {"dtype": torch.float32, "top_n": _TOP_N}, call, cost, tolerance)


def _penalize(device: torch.device, scale: Scale) -> Workload:
    logits = _logits(device, scale)
    generator = torch.Generator().manual_seed(_SEED + 1)
    counts = (
        torch.randint(0, 64, logits.shape, generator=generator, dtype=torch.int32).sub_(60).clamp_(min=0).to(device)
    )
    column = torch.full((scale.num_rows,), 1.1, device=device)
    penalties = PenaltyParams(repetition=column, frequency=column, presence=column, output_counts=counts)
    out = torch.empty_like(logits)
    values = {"dtype": torch.float32, "parts": penalties.active, "counts": "dense"}
    cost = penalize_logits.cost(scale.num_rows, scale.vocab_size, 1, torch.float32)

    def call() -> Outputs:
        return {"out": penalize_logits.penalize_logits(logits, penalties, out=out)}

    return _workload(scale, values, call, cost, {"out": ROUNDED[torch.float32]})


def _record(device: torch.device, scale: Scale) -> Workload:
    names = ("seen", "entries", "num_entries", "num_output")
    history = TokenHistory.empty(scale.num_rows, scale.vocab_size, _CAPACITY, device)
    tokens = torch.arange(scale.num_rows, device=device).unsqueeze(1)

    def call() -> Outputs:
        history.num_entries.zero_()
        history.num_output.zero_()
        record_tokens.record_tokens(history, tokens)
        return dict(zip(names, history.tensors, strict=True))

    cost = record_tokens.cost(scale.num_rows, 1, 0)
    limits = dict.fromkeys(names, EXACT)
    return Workload(f"rows={scale.num_rows} capacity={_CAPACITY}", {"capacity": _CAPACITY}, call, cost, limits)


def _drafts(device: torch.device, scale: Scale, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft tokens [rows, count], half of them the target's most likely, and target probabilities."""
    generator = torch.Generator().manual_seed(_SEED)
    logits = 8.0 * normal((scale.num_rows, count + 1, scale.vocab_size), torch.float32, device, generator)
    probs = logits.softmax(dim=-1)
    tokens = probs[:, :-1].argmax(dim=-1)
    tokens[:, 1::2] = 0
    return tokens, probs


def _chain(device: torch.device, scale: Scale) -> Workload:
    tokens, probs = _drafts(device, scale, _NUM_CHAIN)
    keys = _keys(device, scale.num_rows)

    def call() -> Outputs:
        drawn, accepted = verify_chain.verify_chain(tokens, None, probs, keys)
        return {"tokens": drawn, "num_accepted": accepted}

    cost = verify_chain.cost(scale.num_rows, _NUM_CHAIN, scale.vocab_size, False)
    values = {"num_draft": _NUM_CHAIN, "has_draft_probs": False}
    return _workload(scale, values, call, cost, {"tokens": EXACT, "num_accepted": EXACT})


def _tree(device: torch.device, scale: Scale) -> Workload:
    tokens, probs = _drafts(device, scale, _NUM_TREE)
    keys = _keys(device, scale.num_rows)
    binary = (torch.arange(_NUM_TREE, dtype=torch.int32, device=device) - 1) // 2
    parents = binary.expand(scale.num_rows, -1).contiguous()

    def call() -> Outputs:
        drawn, path, accepted = verify_tree.verify_tree(tokens, parents, probs, keys)
        return {"tokens": drawn, "path": path, "num_accepted": accepted}

    cost = verify_tree.cost(scale.num_rows, _NUM_TREE, scale.vocab_size)
    tolerance = {"tokens": EXACT, "path": EXACT, "num_accepted": EXACT}
    return _workload(scale, {"num_draft": _NUM_TREE}, call, cost, tolerance)


SAMPLING_WORKLOADS: dict[str, tuple[Builder, ...]] = {
    "sample": (_sample,),
    "filter_logits": (_filter,),
    "top_k": (_top_k,),
    "logprobs": (_logprobs,),
    "penalize_logits": (_penalize,),
    "record_tokens": (_record,),
    "verify_chain": (_chain,),
    "verify_tree": (_tree,),
}
"""Builders of the typical calls of the sampling operations."""
