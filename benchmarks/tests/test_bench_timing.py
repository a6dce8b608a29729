"""The timing core with a clock that counts: who is timed when, cold and warm, and what becomes of the samples."""

import pytest
from fi_core.bench.timing import CpuClock, Times, measure_in_turns


class CountingClock:
    """Each call has a price; a cold sample costs 100 more, and every round is one dearer than the last."""

    def __init__(self):
        self.log = []

    def prepare(self, call, repeats):
        self.log.append(("prepare", call(), repeats))
        return call, "graph"

    def sample(self, run, cold):
        name, price = run()
        self.log.append((name, cold))
        turn = sum(entry == (name, cold) for entry in self.log) - 1
        return lambda: price + 100.0 * cold + turn


def call_of(name, price):
    return lambda: (name, price)


def test_calls_take_turns_and_each_round_begins_with_another():
    clock = CountingClock()
    calls = [call_of("a", 10.0), call_of("b", 20.0), call_of("c", 30.0)]
    measure_in_turns(calls, clock, rounds=4)
    samples = [entry for entry in clock.log if entry[0] != "prepare"]
    rounds = [samples[start : start + 6] for start in range(0, 24, 6)]
    assert [[name for name, cold in taken if cold] for taken in rounds] == [
        list(order) for order in ("abc", "bca", "cab", "abc")
    ]
    for taken in rounds:
        # A warm sample follows the same call's cold one at once.
        assert [entry[1] for entry in taken] == [True, False] * 3
        assert [entry[0] for entry in taken[::2]] == [entry[0] for entry in taken[1::2]]


def test_medians_deciles_and_the_division_by_repeats():
    clock = CountingClock()
    (found,) = measure_in_turns([call_of("a", 40.0)], clock, rounds=11, repeats=20)
    assert clock.log[0] == ("prepare", ("a", 40.0), 20)
    assert (found.cold.us, found.cold.p10, found.cold.p90) == pytest.approx((145 / 20, 141 / 20, 149 / 20))
    assert (found.warm.us, found.warm.p10, found.warm.p90) == pytest.approx((45 / 20, 41 / 20, 49 / 20))
    assert found.cold.mode == "graph"


def test_the_median_ignores_one_slow_run():
    assert Times.of([1.0] * 9 + [1000.0], "cpu").us == 1.0


def test_the_cpu_clock_runs_a_call_as_often_as_asked():
    runs = []
    (found,) = measure_in_turns([lambda: runs.append(1)], CpuClock(), rounds=3, repeats=5)
    assert len(runs) == 5 * (1 + 2 * 3)
    assert 0.0 <= found.cold.p10 <= found.cold.us <= found.cold.p90
    assert found.cold.mode == "cpu"
