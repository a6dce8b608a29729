"""The benchmarks of shared prefixes, as far as they need no GPU: rates from times, and workloads."""

from pathlib import Path

import fit_sharing
import pytest
from bench_sharing import Workload, main
from fi_scheduler.sharing import SharingCosts, SharingRates
from fit_sharing import POINTS, SPEC, Case, fit


def times_by(rates: SharingRates, fixed: float) -> dict[str, tuple[float, float]]:
    """What the points would take if the cost model were the truth, with ``fixed`` nanoseconds of every call."""
    costs, found = SharingCosts.of(SPEC, rates), {}
    for name, case in POINTS.items():
        ones, lens = [1] * case.num_requests, [case.prefix + case.own] * case.num_requests
        saved = case.num_groups * (costs.each([1] * case.size, case.prefix) - costs.once([1] * case.size, case.prefix))
        plain = costs.without_levels(ones, lens, *case.read_again)
        found[name] = (plain + fixed, costs.with_levels(ones, lens, saved) + fixed)
    return found


def test_rates_are_found_again():
    rates = SharingRates(4000.0, 9000.0, 3500.0, 400_000.0, 250.0, 800.0, 6000.0, 1.5e8)
    found = fit(times_by(rates, 9000.0))
    for name in ("read_rate", "attend_rate", "own_rate", "product_rate", "node_ns"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=0.02), name
    assert found.merge_rate == pytest.approx(rates.merge_rate, rel=0.1)
    assert found.reuse_bytes == pytest.approx(rates.reuse_bytes, rel=0.15)
    # What a call without levels pays for memory is not told from its fixed cost.
    assert found.batch_ns == pytest.approx(rates.batch_ns, abs=2500)


def test_stored_rows_can_be_plotted(tmp_path, monkeypatch):
    rows = Path(__file__).parents[1] / "results" / "h200" / "sharing.json"
    monkeypatch.setattr("sys.argv", ["bench_sharing", "--rows", str(rows), "--plot", str(tmp_path / "plot.png")])
    main()
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_case_counts_its_requests():
    assert Case(3, 4, 512).num_requests == 12 and {case.num_groups for case in POINTS.values()} == {1, 32, 64}
    assert len(fit_sharing.GRID) == 25


def test_prompts_share_what_their_kind_says():
    common, separate = Workload("common", 2).prompts(100), Workload("separate", 4, 16).prompts(100)
    assert len(common) == 64 and all(prompt[:8192] == common[0][:8192] for prompt in common)
    assert len({tuple(prompt[8192:]) for prompt in common}) == 64 and {len(prompt) for prompt in common} == {8320}
    assert len(separate) == 16 and min(map(len, separate)) == 1024 and max(map(len, separate)) == 8192
    assert len({tuple(prompt[:32]) for prompt in separate}) == 16
