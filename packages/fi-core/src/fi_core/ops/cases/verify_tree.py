"""Conformance cases of ``verify_tree``: the inputs are probabilities, so every output is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import verify_tree
from . import guarded, poisoned
from .sampling_inputs import on_device
from .verify_chain import random_keys, random_target


@dataclass(frozen=True)
class TreeCase:
    """Shape and content. ``shuffled``: parents may come after their children; ``cyclic``: some nodes are their own
    ancestors; ``unusable`` and ``after`` as in chains."""

    name: str
    num_draft: int = 12
    vocab_size: int = 5
    num_requests: int = 23
    shuffled: bool = False
    cyclic: bool = False
    unusable: bool = False
    after: int = 0


def _tree_cases() -> Iterator[TreeCase]:
    yield TreeCase("plain")
    yield TreeCase("shuffled", shuffled=True)
    yield TreeCase("cyclic", cyclic=True)
    yield TreeCase("unusable", unusable=True)
    yield TreeCase("strided", after=7)
    yield TreeCase("one_request", num_requests=1)
    for num_draft, vocab_size in ((1, 1), (1, 2), (40, 2), (64, 3), (6, 512), (3, 4096)):
        yield TreeCase(f"n{num_draft}_v{vocab_size}", num_draft, vocab_size, num_requests=5)


def _build(case: TreeCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.num_requests, case.num_draft)
    outputs = (case.num_requests, case.num_draft + 1)
    target = random_target((*outputs, case.vocab_size), case.unusable, generator)
    keys = random_keys(case.num_requests, generator)
    earlier = torch.arange(case.num_draft).clamp(max=4 + case.num_draft // 3) + 1
    parents = (torch.rand(shape, generator=generator) * earlier).to(torch.int64) - 1
    # Half of the nodes hold what their parent's row prefers, so that walks go deep; duplicates and padding remain.
    preferred = target.nan_to_num().argmax(dim=2).gather(1, parents + 1)
    drafts = torch.randint(-1, case.vocab_size, shape, generator=generator)
    drafts = torch.where(torch.rand(shape, generator=generator) < 0.5, preferred, drafts)
    if case.cyclic:
        parents[::2, 0] = case.num_draft - 1
        parents[1::4, -1] = case.num_draft - 1
    if case.shuffled:
        order = torch.randperm(case.num_draft, generator=generator)
        place = order.argsort()
        parents = torch.where(parents >= 0, place[parents.clamp(min=0)], -1)[:, order]
        drafts = drafts[:, order].contiguous()
        target = torch.cat([target[:, :1], target[:, 1:][:, order]], dim=1)
    parents = parents.to(torch.int32).contiguous()

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = guarded(target.shape, torch.float32, device, after=case.after, content=target.to(device)).view
        tokens, path = poisoned(outputs, torch.int64, device), poisoned(outputs, torch.int32, device)
        num_accepted = poisoned(outputs[:1], torch.int32, device)
        kernel(drafts.to(device), parents.to(device), given, on_device(keys, device), tokens, path, num_accepted)
        return {"tokens": tokens, "path": path, "num_accepted": num_accepted}

    def expected() -> Mapping[str, Tensor]:
        tokens, path = torch.empty(outputs, dtype=torch.int64), torch.empty(outputs, dtype=torch.int32)
        num_accepted = torch.empty(outputs[0], dtype=torch.int32)
        verify_tree(drafts, parents, target, keys, tokens, path, num_accepted)
        return {"tokens": tokens, "path": path, "num_accepted": num_accepted}

    return Trial(run, expected, {"tokens": EXACT, "path": EXACT, "num_accepted": EXACT})


def cases() -> Iterator[Case]:
    """Every case of ``verify_tree``."""
    for case in _tree_cases():
        values = {"vocab_size": case.vocab_size, "num_draft": case.num_draft}
        tags = frozenset({"hostile"} if case.unusable or case.cyclic or case.after or case.vocab_size < 3 else ())
        yield Case(case.name, values, partial(_build, case), tags)
