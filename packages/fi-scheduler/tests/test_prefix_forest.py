"""The forest of shared prefixes against brute force, and the choice of levels against trying every one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec
from fi_scheduler.forest import PrefixForest, PrefixGroup
from fi_scheduler.requests import SharedLevel
from fi_scheduler.sharing import ALWAYS, Sharer, SharingCosts, SharingRates
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

PAGE = 4
Pages = tuple[int, ...]
paths = st.lists(st.integers(0, 2), max_size=6).map(tuple)
names = st.sampled_from("abcdefgh")


def groups_of(forest: PrefixForest) -> Iterator[PrefixGroup]:
    stack = [forest.root]
    while stack:
        group = stack.pop()
        yield group
        stack.extend(group.groups.values())


class ForestMachine(RuleBasedStateMachine):
    """The forest beside a dict from requests to their pages."""

    def __init__(self) -> None:
        super().__init__()
        self.forest = PrefixForest()
        self.model: dict[str, Pages] = {}

    @rule(name=names, pages=paths)
    def put(self, name: str, pages: Pages) -> None:
        before = self.forest.version
        self.forest.put(name, list(pages))
        assert (self.forest.version != before) == (self.model.get(name) != pages)
        self.model[name] = pages

    @rule(name=names)
    def remove(self, name: str) -> None:
        if self.model.pop(name, None) is None:
            with pytest.raises(ArgumentError, match="a request of the forest"):
                self.forest.remove(name)
        else:
            self.forest.remove(name)

    @invariant()
    def agrees(self) -> None:
        assert self.forest.request_ids == set(self.model) and len(self.forest) == len(self.model)
        assert all(self.forest.pages(name) == pages for name, pages in self.model.items())
        order = list(self.forest.order())
        assert sorted(order) == sorted(self.model)
        # Whoever begins alike stands together.
        for length in range(1, 7):
            starts = [self.model[name][:length] for name in order if len(self.model[name]) >= length]
            runs = [key for key, _ in itertools.groupby(starts)]
            assert len(runs) == len(set(runs))
        for group in groups_of(self.forest):
            assert group.size == len(group.here) + sum(child.size for child in group.groups.values())
            assert group is self.forest.root or group.here or len(group.groups) > 1


TestForest = ForestMachine.TestCase
TestForest.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def time_of(levels: tuple[SharedLevel, ...], costs: SharingCosts, q_lens: list[int], kv_lens: list[int]) -> float:
    """Of a batch with levels: every prefix once, and of every request what its levels leave, by itself."""
    total = costs.batch_ns
    shared = [0] * len(q_lens)
    for begin, end, kv_begin, kv_end in levels:
        total += costs.once(q_lens[begin:end], kv_end - kv_begin)
        for index in range(begin, end):
            shared[index] = kv_end
    return total + sum(
        costs.each([q_len], kv_len - least) for q_len, kv_len, least in zip(q_lens, kv_lens, shared, strict=True)
    )


def best_by_trial(
    held: Mapping[str, Pages],
    order: tuple[str, ...],
    costs: SharingCosts,
    lens: tuple[list[int], list[int]],
    depth: int,
) -> float:
    """The least time of any set of shared prefixes that is not empty."""
    starts = {held[name][:length] for name in order for length in range(1, len(held[name]) + 1)}
    shared = [start for start in starts if sum(held[name][: len(start)] == start for name in order) > 1]
    best = float("inf")
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(shared, count + 1) for count in range(len(shared))
    ):
        levels = []
        for start in sorted(chosen, key=len):
            members = [index for index, name in enumerate(order) if held[name][: len(start)] == start]
            above = [len(other) for other in chosen if len(other) < len(start) and start[: len(other)] == other]
            if len(above) >= depth:
                break
            levels.append(SharedLevel(members[0], members[-1] + 1, PAGE * max(above, default=0), PAGE * len(start)))
        else:
            best = min(best, time_of(tuple(levels), costs, *lens))
    return best


@settings(max_examples=150, deadline=None)
@given(
    held=st.dictionaries(names, st.lists(st.integers(0, 1), max_size=3).map(tuple), min_size=1, max_size=6),
    q_lens=st.lists(st.sampled_from((1, 1, 5)), min_size=6, max_size=6),
    rest=st.lists(st.sampled_from((0, 3, 40)), min_size=6, max_size=6),
    numbers=st.tuples(*[st.sampled_from((0.0, 0.5, 1.0, 4.0, 16.0))] * 4),
    depth=st.integers(1, 3),
)
def test_the_choice_takes_the_least_time(
    held: dict[str, Pages], q_lens: list[int], rest: list[int], numbers: tuple[float, ...], depth: int
) -> None:
    pair_ns, row_ns, node_ns, batch_ns = numbers
    costs = SharingCosts(1.0, 0.5, 1.25, pair_ns / 16, row_ns, node_ns, batch_ns, 10.0)
    news = dict(zip(held, q_lens, strict=False))
    kept = {name: PAGE * len(held[name]) + more + news[name] for name, more in zip(held, rest, strict=False)}
    found = Sharer(costs, PAGE, depth).arrange(held, news, kept)
    lens = [news[name] for name in found.order], [kept[name] for name in found.order]
    starts = {held[name][:length] for name in held for length in range(1, len(held[name]) + 1)}
    times = [sum(held[name][: len(start)] == start for name in held) for start in starts]
    without = costs.without_levels(*lens, PAGE * sum(n > 1 for n in times), PAGE * sum(n - 1 for n in times))
    assert found.without == pytest.approx(without)
    best = best_by_trial(held, found.order, costs, lens, depth)
    if found.levels:
        assert time_of(found.levels, costs, *lens) == pytest.approx(found.best) == pytest.approx(best)
        assert best < without
    else:
        assert best >= without - 1e-9 or not any(verdict.taken for verdict in found.verdicts)


def ones(held: Mapping[str, Pages | None]) -> dict[str, int]:
    return dict.fromkeys(held, 1)


def test_nothing_is_chosen_anew_while_nothing_changes() -> None:
    sharer = Sharer(SharingCosts.of(AttentionSpec(8, 2, 64), ALWAYS), PAGE)
    held: dict[str, Pages | None] = {"a": (1, 2), "b": (1, 2, 3), "c": (7,)}
    first = sharer.arrange(held, ones(held), dict.fromkeys(held, 20))
    assert first.levels == (SharedLevel(0, 2, 0, 8),) and first.order == ("a", "b", "c")
    assert sharer.arrange(dict.fromkeys(held), ones(held), dict.fromkeys(held, 21)) is first
    without = sharer.arrange({"b": None, "c": None}, {"b": 1, "c": 1}, {"b": 20, "c": 20})
    assert without.levels == () and without.order == ("b", "c")
    with pytest.raises(ArgumentError, match="'d', which the last step had not"):
        sharer.arrange({"b": None, "d": None}, {"b": 1, "d": 1}, {"b": 20, "d": 20})


def test_levels_are_given_up_when_own_tokens_outweigh_them_and_taken_again() -> None:
    """What requests read for themselves is slower beside levels, so long ones do not pay for a short prefix."""
    sharer = Sharer(SharingCosts(1.0, 1.0, 1.2, 0.0, 0.0, 0.0, 2.0, 1e9), PAGE)
    held: dict[str, Pages | None] = dict.fromkeys("abcd", (1, 2, 3, 4, 5))
    for own, taken in ((4, True), (100, False), (5, True)):
        found = sharer.arrange(held, ones(held), dict.fromkeys(held, 20 + own))
        assert bool(found.levels) is taken and found.order == ("a", "b", "c", "d")
        held = dict.fromkeys(held)


def test_a_chain_of_many_groups_is_no_recursion_without_end() -> None:
    held = {str(index): tuple(range(index)) for index in range(1500)}
    kept = {name: PAGE * len(pages) + 1 for name, pages in held.items()}
    found = Sharer(SharingCosts.of(AttentionSpec(8, 2, 64), ALWAYS), PAGE).arrange(held, ones(held), kept)
    assert 0 < len(found.levels) <= 4 and found.order == tuple(held)


def test_the_choice_explains_itself() -> None:
    rates = SharingRates(3000.0, 6000.0, 2800.0, 400_000.0, 300.0, 500.0, 1000.0, 1e8)
    costs = SharingCosts.of(AttentionSpec(32, 8, 128), rates)
    assert costs.token_ns == pytest.approx(4096 / 3000) and costs.pair_ns == pytest.approx(16384 / 400_000)
    held = {**{f"long {index}": (*range(64), 100 + index) for index in range(8)}, "short": (0, 500), "other": (900,)}
    kept = {name: 16 * len(pages) + 9 for name, pages in held.items()}
    head, shared, inner = Sharer(costs, 16).arrange(held, ones(held), kept).explain()[:3]
    assert head.startswith("1 shared prefixes are read once")
    assert "9 requests share tokens 0 to 16" in shared and not shared.endswith("once")
    assert "8 requests share tokens 0 to 1024" in inner and inner.endswith("-> once")


def test_prefixes_that_the_l2_cannot_hold_are_read_from_memory_again() -> None:
    costs = SharingCosts(1.0, 0.4, 1.1, 0.0, 0.0, 0.0, 0.0, 1000.0)
    assert costs.without_levels([1, 1], [500, 500], 400, 400) == 600
    assert costs.without_levels([1, 1], [5000, 5000], 4000, 4000) == 10000 - 4000 / 4
    assert costs.without_levels([1] * 9, [400] * 9, 390, 8 * 390) == 0.4 * 3600


def test_rates_go_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(ALWAYS.to_json())
    assert SharingRates.from_file(path) == ALWAYS
    path.write_text('{"read_rate": 1}')
    with pytest.raises(ArgumentError, match="numbers for"):
        SharingRates.from_file(path)
    with pytest.raises(ArgumentError, match=r"rates\.read_rate"):
        SharingRates(0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
