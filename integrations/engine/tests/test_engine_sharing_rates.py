"""The built-in rates decide as measurements do: attention of one layer with levels and without, on an H200."""

from __future__ import annotations

import pytest
import torch
from fi_core.records import AttentionSpec
from fi_engine.prefixes import RATES, rates_of
from fi_scheduler.sharing import SharingCosts

MEASURED = [
    # groups, requests each, shared tokens, own tokens, KV heads, microseconds with levels and without
    (1, 64, 8192, 256, 8, 55.3, 253.9),
    (1, 64, 2048, 256, 8, 43.2, 79.6),
    (1, 64, 1024, 256, 8, 40.2, 48.7),
    (1, 64, 512, 256, 8, 40.6, 34.9),
    (2, 32, 8192, 256, 8, 57.1, 363.1),
    (2, 32, 128, 256, 8, 38.0, 27.9),
    (8, 8, 8192, 256, 8, 101.2, 483.7),
    (8, 8, 2048, 256, 8, 52.5, 83.0),
    (8, 8, 512, 256, 8, 41.2, 36.9),
    (16, 4, 8192, 256, 8, 160.0, 499.6),
    (16, 4, 2048, 256, 8, 69.8, 95.3),
    (16, 4, 1024, 256, 8, 54.6, 51.2),
    (32, 2, 8192, 256, 8, 280.7, 504.4),
    (32, 2, 2048, 256, 8, 100.7, 116.9),
    (32, 2, 1024, 256, 8, 71.0, 62.7),
    (32, 2, 128, 256, 8, 45.1, 30.8),
    (1, 256, 8192, 256, 8, 167.9, 997.5),
    (1, 64, 32768, 256, 8, 130.6, 1114.9),
    (1, 256, 32768, 512, 8, 418.3, 4644.5),
    (1, 256, 32768, 128, 32, 570.3, 21366.6),
    (1, 8, 1024, 512, 8, 22.2, 16.7),
    (1, 64, 1024, 1024, 8, 100.4, 80.5),
]


@pytest.mark.parametrize(("groups", "size", "shared", "own", "kv_heads", "with_levels", "without"), MEASURED)
def test_decisions_are_those_of_the_measured_times(groups, size, shared, own, kv_heads, with_levels, without):
    costs = SharingCosts.of(AttentionSpec(32, kv_heads, 128), RATES["NVIDIA H200", "cuda"])
    ones, lens = [1] * groups * size, [shared + own] * groups * size
    predicted = costs.without_levels(ones, lens, groups * shared, groups * (size - 1) * shared)
    saved = costs.each([1] * size, shared) - costs.once([1] * size, shared)
    best = costs.with_levels(ones, lens, groups * saved)
    if best < predicted:
        assert with_levels < without  # a choice to share never loses
    else:
        assert without < 1.2 * with_levels
    # Beyond fixed costs the model is coarse, but not by more than this.
    assert best / 1e3 == pytest.approx(with_levels, rel=0.3, abs=20)
    assert predicted / 1e3 == pytest.approx(without, rel=0.4, abs=25)


def test_no_rates_for_an_unknown_device():
    assert rates_of(torch.device("cpu"), "cuda") is None
