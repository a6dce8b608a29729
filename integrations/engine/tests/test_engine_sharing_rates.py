"""The built-in rates decide as measurements do: attention of one layer with levels and without, on an H200."""

from __future__ import annotations

import pytest
from fi_core.records import AttentionSpec
from fi_engine.prefixes import RATES, rates_of
from fi_scheduler.sharing import SharingCosts

MEASURED = [
    # requests, shared tokens, own tokens, KV heads, microseconds with levels and without
    (64, 8192, 256, 8, 62.6, 262.0),
    (256, 8192, 256, 8, 167.9, 997.5),
    (64, 32768, 256, 8, 130.6, 1114.9),
    (256, 32768, 512, 8, 418.3, 4644.5),
    (256, 32768, 128, 32, 570.3, 21366.6),
    (16, 2048, 256, 8, 24.2, 27.9),
    (8, 1024, 512, 8, 22.2, 16.7),
    (64, 1024, 1024, 8, 100.4, 80.5),
]


@pytest.mark.parametrize(("size", "shared", "own", "kv_heads", "with_levels", "without"), MEASURED)
def test_decisions_are_those_of_the_measured_times(size, shared, own, kv_heads, with_levels, without):
    costs = SharingCosts.of(AttentionSpec(32, kv_heads, 128), RATES["NVIDIA H200", "cuda"])
    ones, lens = [1] * size, [shared + own] * size
    predicted = costs.without_levels(ones, lens, shared + size * own)
    best = costs.with_levels(ones, lens, costs.each(ones, shared) - costs.once(ones, shared))
    assert (best < predicted) == (with_levels < without)
    # Beyond fixed costs the model is coarse, but not by more than this.
    assert best / 1e3 == pytest.approx(with_levels, rel=0.3, abs=10)
    assert predicted / 1e3 == pytest.approx(without, rel=0.3, abs=20)


def test_no_rates_for_an_unknown_device():
    import torch

    assert rates_of(torch.device("cpu"), "cuda") is None
