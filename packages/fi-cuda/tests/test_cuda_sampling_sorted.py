"""Kept sets of whole vocabularies against filters that sort the row in float64: of the reference, and of the kernels on a GPU."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core.sampling import FilterParams

pytestmark = pytest.mark.timeout(240)

VOCAB = 128256
BOUNDARY = 1e-6
"""Tokens whose cumulative probability lies so close to a limit may go either way."""

KINDS = ("random", "peaked", "flat", "tied", "one_hot", "equal", "masked", "unusable")
VALUES = (
    {"top_k": 50},
    {"top_k": 2000},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 3000, "top_p": 0.7, "min_p": 0.01},
)
TYPICAL = ({"typical_p": 0.9}, {"typical_p": 0.3}, {"top_k": 500, "typical_p": 0.6})
DTYPES = {"top_k": torch.int32}


def rows_of(kind: str, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn((num_rows, VOCAB), generator=generator)
    return {
        "random": lambda: 3 * noise,
        "peaked": lambda: 10 * noise,
        "flat": lambda: 0.01 * noise,
        "tied": lambda: (1.5 * noise).round(),
        "one_hot": lambda: torch.full_like(noise, -torch.inf).index_fill_(1, torch.tensor([777]), 1.0),
        "equal": lambda: torch.full_like(noise, 0.25),
        "masked": lambda: torch.where(noise > 1.0, 3 * noise, -torch.inf),
        "unusable": lambda: noise.index_fill(1, torch.tensor([5]), torch.nan).index_fill(
            1, torch.tensor([9]), torch.inf
        ),
    }[kind]()


def prefix(ranked: torch.Tensor, kept: torch.Tensor, probs: torch.Tensor, fraction: float, whole: bool):
    """Of tokens in rank order those before which less than ``fraction`` lies of what is ``kept``, or of the ``whole`` row; and
    those that may go either way."""
    mass = torch.where(kept, probs, 0.0)[ranked]
    share = mass / (1.0 if whole else mass.sum())
    before = share.cumsum(0) - share
    order = torch.empty_like(ranked)
    order[ranked] = torch.arange(len(ranked))
    return (before < fraction)[order] & kept, ((before - fraction).abs() < BOUNDARY)[order]


def sorted_filters(logits: torch.Tensor, values: dict[str, float], joint: bool):
    """bool [V] kept, and bool [V] what may go either way, of one usable row: the filters one after the other, or each on its own
    with the whole row's probabilities."""
    exact = logits.double()
    probs = exact.softmax(0)
    ranked = exact.sort(descending=True, stable=True).indices
    everything = torch.ones(len(exact), dtype=torch.bool)
    kept, either = everything, ~everything
    if "top_k" in values:
        kept = torch.zeros_like(kept).index_fill_(0, ranked[: int(values["top_k"])], True)
    if "top_p" in values:
        fraction = float(torch.tensor(values["top_p"]))
        longest, near = prefix(ranked, everything if joint else kept, probs, fraction, joint)
        kept, either = kept & longest, either | near
    if "min_p" in values:
        limit = float(torch.tensor(values["min_p"])) * probs.max()
        kept, either = kept & (probs >= limit), either | ((probs / limit - 1).abs() < BOUNDARY)
    if "typical_p" in values:
        considered = everything if joint else kept
        weights = torch.where(considered, probs, 0.0)
        weights = weights / weights.sum()
        shortfall = exact.max() - exact
        mean = torch.where(weights > 0, weights * shortfall, 0.0).sum()
        distance = (shortfall - mean).abs()
        nearest = distance.sort(stable=True).indices
        chosen, near = prefix(nearest, considered, probs, float(torch.tensor(values["typical_p"])), False)
        last = distance[chosen & (weights > 0)].max()
        # Distances in float32 come in another order where they differ by less than it resolves.
        kept, either = kept & chosen, either | near | ((distance - last).abs() < 1e-5)
    if not bool(kept.any()):  # filters that look at the whole row may have no token in common
        kept = kept.index_fill(0, ranked[:1], True)
    return kept, either


def check_kept(logits: torch.Tensor, values: dict[str, float], joint: bool, found: torch.Tensor) -> None:
    """``found``: masked logits, like ``logits`` on the host."""
    if bool(logits.isnan().any()):
        assert found.eq(-torch.inf).all()
        return
    for row in range(logits.shape[0]):
        kept, either = sorted_filters(logits[row], values, joint)
        kept &= logits[row] > -torch.inf
        wrong = (found[row] > -torch.inf) != kept
        assert not bool((wrong & ~either).any()), (values, joint, row, wrong.nonzero().ravel()[:5].tolist())
        assert torch.equal(found[row][~wrong & kept], logits[row][~wrong & kept])


def masked_logits(logits: torch.Tensor, values: dict[str, float], joint: bool) -> torch.Tensor:
    columns = {
        name: torch.full((logits.shape[0],), value, dtype=DTYPES.get(name, torch.float32), device=logits.device)
        for name, value in values.items()
    }
    filters = FilterParams(**columns, order="joint" if joint else "sequential")
    return fi.filter_logits(logits, filters, "logits", out=torch.full_like(logits, 7.0)).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_keeps_what_sorting_keeps(kind):
    logits = rows_of(kind, 1)
    with fi.use(backend="reference"):
        for values in (*VALUES, *TYPICAL):
            for joint in (False, True):
                check_kept(logits, values, joint, masked_logits(logits, values, joint))


def test_the_check_can_fail():
    logits = rows_of("random", 1)
    with fi.use(backend="reference"):
        found = masked_logits(logits, {"top_p": 0.9001}, False)
    with pytest.raises(AssertionError):
        check_kept(logits, {"top_p": 0.9}, False, found)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_keep_what_sorting_keeps(kind, num_rows):
    logits = rows_of(kind, num_rows)
    some = [0, num_rows // 2, num_rows - 1]
    with fi.use(backend="cuda"):
        for values in VALUES:
            for joint in (False, True):
                check_kept(logits[some], values, joint, masked_logits(logits.cuda(), values, joint)[some])
