"""Conformance cases of ``verify_chain``: the inputs are probabilities, so every output is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import verify_chain
from ...sampling import DrawKeys
from . import guarded, poisoned
from .sampling_inputs import noise, on_device


@dataclass(frozen=True)
class ChainCase:
    """Shape and content. ``likely``: drafted tokens are mostly what the target prefers; ``unusable``: some rows hold
    NaN, no mass, a negative or a too large value; ``after``: foreign elements after each row."""

    name: str
    num_draft: int = 4
    vocab_size: int = 61
    num_requests: int = 23
    draft_probs: bool = False
    likely: bool = True
    unusable: bool = False
    after: int = 0


def _chain_cases() -> Iterator[ChainCase]:
    for draft_probs in (False, True):
        suffix = "_probs" if draft_probs else ""
        yield ChainCase(f"plain{suffix}", draft_probs=draft_probs)
        yield ChainCase(f"unlikely{suffix}", draft_probs=draft_probs, likely=False)
        yield ChainCase(f"unusable{suffix}", draft_probs=draft_probs, unusable=True)
        yield ChainCase(f"strided{suffix}", draft_probs=draft_probs, after=7)
        yield ChainCase(f"one_request{suffix}", draft_probs=draft_probs, num_requests=1)
        for num_draft, vocab_size in ((0, 17), (1, 2), (2, 1), (7, 512), (2, 4096)):
            name = f"n{num_draft}_v{vocab_size}{suffix}"
            yield ChainCase(name, num_draft, vocab_size, num_requests=5, draft_probs=draft_probs)


def random_keys(count: int, generator: torch.Generator) -> DrawKeys:
    """Keys with every bit in use."""
    return DrawKeys(
        torch.randint(-(2**62), 2**62, (count,), generator=generator),
        torch.randint(0, 4, (count,), generator=generator).to(torch.int32),
        torch.randint(0, 2**33, (count,), generator=generator),
    )


def random_target(shape: tuple[int, int, int], unusable: bool, generator: torch.Generator) -> Tensor:
    """Random probabilities [B, rows, V], a tenth of them 0."""
    probs = noise(shape[0] * shape[1], shape[2], generator).softmax(dim=1)
    probs[:, 1:].masked_fill_(torch.rand(probs[:, 1:].shape, generator=generator) < 0.1, 0.0)
    if unusable:
        for start, value in ((1, torch.nan), (6, -0.25), (11, 2.0)):
            probs[start::20, 0] = value
        probs[16::20] = 0.0
    return probs.view(shape)


def _build(case: ChainCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    rows = case.num_draft + 1
    target = random_target((case.num_requests, rows, case.vocab_size), case.unusable, generator)
    keys = random_keys(case.num_requests, generator)
    drafts = torch.randint(0, case.vocab_size, (case.num_requests, case.num_draft), generator=generator)
    if case.likely:
        drafts = torch.where(drafts % 4 > 0, target[:, :-1].argmax(dim=2), drafts)
    drafts[::4, -1:] = -1
    drafts[1::6, 1:2] = case.vocab_size
    draft_probs = None
    if case.draft_probs:
        other = random_target((case.num_requests, case.num_draft, case.vocab_size), False, generator)
        draft_probs = 0.5 * other + 0.5 * target[:, :-1].nan_to_num() if case.likely else other
        draft_probs[2::7] = target[2::7, :-1].nan_to_num()
        if case.unusable:
            for row, value in enumerate((torch.nan, -0.5, 3.0, torch.inf)):
                draft_probs[4 + row :: 9, row % case.num_draft, -1] = value
    shape = (case.num_requests, rows)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = [None if item is None else _strided(item, device, case.after) for item in (draft_probs, target)]
        tokens, num_accepted = poisoned(shape, torch.int64, device), poisoned(shape[:1], torch.int32, device)
        kernel(drafts.to(device), given[0], given[1], on_device(keys, device), tokens, num_accepted)
        return {"tokens": tokens, "num_accepted": num_accepted}

    def expected() -> Mapping[str, Tensor]:
        tokens, num_accepted = torch.empty(shape, dtype=torch.int64), torch.empty(shape[0], dtype=torch.int32)
        verify_chain(drafts, draft_probs, target, keys, tokens, num_accepted)
        return {"tokens": tokens, "num_accepted": num_accepted}

    return Trial(run, expected, {"tokens": EXACT, "num_accepted": EXACT})


def _strided(content: Tensor, device: torch.device, after: int) -> Tensor:
    return guarded(content.shape, torch.float32, device, after=after, content=content.to(device)).view


def cases() -> Iterator[Case]:
    """Every case of ``verify_chain``."""
    for case in _chain_cases():
        values = {"vocab_size": case.vocab_size, "num_draft": case.num_draft, "has_draft_probs": case.draft_probs}
        tags = frozenset({"hostile"} if case.unusable or case.after or case.vocab_size < 3 else ())
        yield Case(case.name, values, partial(_build, case), tags)
