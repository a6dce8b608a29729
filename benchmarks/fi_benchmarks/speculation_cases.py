"""Verification of drafts, chains with and without the draft's probabilities and trees, at the batch sizes of sampling."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from fi_core.contract import EXACT, Cost
from fi_core.ops import verify_chain, verify_tree
from fi_core.reference.sampling.verify import verify_chain as reference_chain
from fi_core.reference.sampling.verify import verify_tree as reference_tree
from fi_core.sampling import DrawKeys
from torch import Tensor

from .ceilings import reads
from .numerics import Accuracy, checker
from .problem import Case, Outputs, Problem, generator_on

BATCHES, VOCAB_SIZE = (1, 16, 64), 128256
CHAIN_DRAFTS, TREE_DRAFTS = 4, 15
_SPREAD, _DRAFT_NOISE = 3.0, 1.0
"""Standard deviations of the target's logits and of what the draft's differ by: about half of the drafted tokens are accepted."""


@dataclass(frozen=True)
class DraftInputs:
    """``draft_tokens`` int64 [B, n] and the distributions ``draft_probs`` [B, n, V] (None: not known) and ``target_probs``
    [B, n + 1, V] of fi_core.verify_chain; ``parents`` int32 [B, n] of trees."""

    draft_tokens: Tensor
    draft_probs: Tensor | None
    target_probs: Tensor
    keys: DrawKeys
    parents: Tensor | None = None


def _keys(num_rows: int, device: torch.device) -> DrawKeys:
    seeds = torch.arange(num_rows, device=device)
    return DrawKeys(seeds, torch.zeros_like(seeds, dtype=torch.int32), torch.full_like(seeds, 100))


def _chain_inputs(device: torch.device, num_rows: int, vocab_size: int, known: bool) -> DraftInputs:
    generator = generator_on(device)
    logits = torch.randn((num_rows, CHAIN_DRAFTS + 1, vocab_size), device=device, generator=generator) * _SPREAD
    noise = torch.randn((num_rows, CHAIN_DRAFTS, vocab_size), device=device, generator=generator) * _DRAFT_NOISE
    draft = (logits[:, :CHAIN_DRAFTS] + noise).softmax(-1)
    drawn = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(num_rows, CHAIN_DRAFTS)
    keys = _keys(num_rows, device)
    return DraftInputs(drawn, draft if known else None, logits.softmax(-1), keys)


def _tree_inputs(device: torch.device, num_rows: int, vocab_size: int) -> DraftInputs:
    """Full binary trees; a node's children hold the two most likely tokens after it."""
    generator = generator_on(device)
    logits = torch.randn((num_rows, TREE_DRAFTS + 1, vocab_size), device=device, generator=generator) * _SPREAD
    nodes = torch.arange(TREE_DRAFTS, device=device)
    parents = torch.where(nodes < 2, -1, nodes // 2 - 1).to(torch.int32)
    best = logits.topk(2, dim=2).indices
    drafts = best[:, parents.long() + 1, nodes % 2]
    repeated = parents.expand(num_rows, -1).contiguous()
    return DraftInputs(drafts.contiguous(), None, logits.softmax(-1), _keys(num_rows, device), repeated)


def _chain_check(inputs: DraftInputs) -> Callable[[Outputs], Accuracy]:
    """Ours as the reference's, bit for bit; of other generators ("drawn") that each row is a chain: drafted tokens, one
    more, none after it, all of which the target may draw."""
    tokens = inputs.draft_tokens.new_empty(inputs.target_probs.shape[:2])
    num_accepted = tokens.new_empty(tokens.shape[0], dtype=torch.int32)
    reference_chain(inputs.draft_tokens, inputs.draft_probs, inputs.target_probs, inputs.keys, tokens, num_accepted)
    exact = checker({"tokens": tokens, "num_accepted": num_accepted}, {"tokens": EXACT, "num_accepted": EXACT})

    def check(outputs: Outputs) -> Accuracy:
        if set(outputs) != {"drawn"}:
            return exact(outputs)
        return Accuracy(_fault_of_chains(outputs["drawn"].long(), inputs))

    return check


def _fault_of_chains(drawn: Tensor, inputs: DraftInputs) -> str | None:
    num_draft, vocab_size = inputs.draft_tokens.shape[1], inputs.target_probs.shape[2]
    step = torch.arange(num_draft + 1, device=drawn.device)
    length = (drawn >= 0).sum(dim=1, keepdim=True)
    if drawn.shape != (inputs.draft_tokens.shape[0], num_draft + 1) or not bool(
        ((drawn >= 0) == (step < length)).all()
    ):
        return "rows that are no chain"
    if bool((length == 0).any()) or bool((drawn >= vocab_size).any()):
        return "rows without a token of the vocabulary"
    accepted = step[:num_draft] < length - 1
    if bool((accepted & (drawn[:, :num_draft] != inputs.draft_tokens)).any()):
        return "tokens before the last that are not the drafted ones"
    likelihood = inputs.target_probs.gather(2, drawn.clamp(min=0).unsqueeze(2)).squeeze(2)
    return "tokens that the target never draws" if bool(((drawn >= 0) & (likelihood <= 0)).any()) else None


def _chain(device: torch.device, num_rows: int, vocab_size: int, known: bool) -> Problem:
    inputs = _chain_inputs(device, num_rows, vocab_size, known)

    def call() -> Outputs:
        tokens, num_accepted = verify_chain.verify_chain(
            inputs.draft_tokens, inputs.draft_probs, inputs.target_probs, inputs.keys
        )
        return {"tokens": tokens, "num_accepted": num_accepted}

    cost = verify_chain.cost(num_rows, CHAIN_DRAFTS, vocab_size, known)
    request: dict[str, Hashable] = {"vocab_size": vocab_size, "num_draft": CHAIN_DRAFTS, "has_draft_probs": known}
    return _problem(request, inputs, call, _chain_check(inputs), cost)


def _tree(device: torch.device, num_rows: int, vocab_size: int) -> Problem:
    inputs = _tree_inputs(device, num_rows, vocab_size)
    parents = inputs.parents
    assert parents is not None
    shape = inputs.target_probs.shape[:2]
    names = ("tokens", "path", "num_accepted")
    expected = (
        inputs.draft_tokens.new_empty(shape),
        parents.new_empty(shape),
        parents.new_empty(shape[0]),
    )
    reference_tree(inputs.draft_tokens, parents, inputs.target_probs, inputs.keys, *expected)

    def call() -> Outputs:
        found = verify_tree.verify_tree(inputs.draft_tokens, parents, inputs.target_probs, inputs.keys)
        return dict(zip(names, found, strict=True))

    check = checker(dict(zip(names, expected, strict=True)), dict.fromkeys(names, EXACT))
    cost = verify_tree.cost(num_rows, TREE_DRAFTS, vocab_size)
    return _problem({"vocab_size": vocab_size, "num_draft": TREE_DRAFTS}, inputs, call, check, cost)


def _problem(
    request: dict[str, Hashable],
    inputs: DraftInputs,
    call: Callable[[], Outputs],
    check: Callable[[Outputs], Accuracy],
    cost: Cost,
) -> Problem:
    """The ceiling reads the one row of target probabilities (and of draft probabilities) that the cost counts."""
    rows = [inputs.target_probs[:, 0]] + ([] if inputs.draft_probs is None else [inputs.draft_probs[:, 0]])
    return Problem(request, inputs, {"": lambda: call}, check, cost, reads(torch.cat(rows)))


TASKS: dict[str, tuple[str, Callable[..., Problem]]] = {
    "chain4": ("verify_chain", partial(_chain, known=False)),
    "chain4 drafted": ("verify_chain", partial(_chain, known=True)),
    "tree15": ("verify_tree", _tree),
}


def speculation_cases() -> Iterator[Case]:
    """Every task at every batch size; "drafted": with the draft's probabilities."""
    for num_rows in BATCHES:
        for task, (op, build) in TASKS.items():
            made = partial(build, num_rows=num_rows, vocab_size=VOCAB_SIZE)
            yield Case(op, "sampling", f"sampling B{num_rows} V{VOCAB_SIZE} {task}", made)
