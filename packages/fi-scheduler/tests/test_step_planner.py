"""The step planner under a simulated engine whose samples depend on what its pages hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from fi_core.errors import ArgumentError, CapacityError
from fi_core.records import AttentionSpec
from fi_scheduler.hookspecs import hookimpl, plugin_manager
from fi_scheduler.pages import PagePool
from fi_scheduler.policy import FifoPolicy, SchedulingPolicy
from fi_scheduler.requests import PlannerConfig, Request, StepOrderError, StepPlan, StepStats
from fi_scheduler.sharing import ALWAYS, SharingCosts
from fi_scheduler.steps import StepPlanner
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_simulation import Engine, check_all_pages_return, generate, make_engine

ALWAYS_SHARE = SharingCosts.of(AttentionSpec(1, 1, 64), ALWAYS)


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, Any]:
    page_size = draw(st.integers(1, 4))
    num_pages = draw(st.integers(4, 14))
    budget = draw(st.integers(1, 20))
    # Few distinct beginnings, so that prompts share prefixes.
    starts = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple), min_size=1, max_size=3))
    requests = []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.sampled_from(starts)) + tuple(draw(st.lists(st.integers(0, 4), max_size=6)))
        room = num_pages * page_size - len(prompt) + 1
        if room >= 1:
            count = draw(st.integers(1, min(8, room)))
            stop = frozenset(draw(st.sets(st.integers(0, 4), max_size=1)))
            samples = draw(st.sampled_from((0, 0, 0, 1, 3)))
            requests.append((prompt, count, draw(st.integers(0, 2)), stop, draw(st.integers(0, 12)), samples))
    return {
        "num_pages": num_pages,
        "page_size": page_size,
        "max_tokens_per_step": budget,
        "max_batch": draw(st.integers(1, min(5, budget))),
        "prefill_chunk": draw(st.integers(1, 8)),
        "prefix_cache": draw(st.sampled_from(("radix", "none"))),
        "policy": draw(st.sampled_from(("priority", "fifo"))),
        "wait_for_shared_prefix": draw(st.booleans()),
        "sharing": draw(st.sampled_from((None, ALWAYS_SHARE))),
        "max_prefix_depth": draw(st.integers(1, 3)),
        "requests": requests,
        "seed": draw(st.integers(0, 999)),
    }


def run_workload(workload: dict[str, Any], action_rate: float) -> tuple[Engine, dict[str, int]]:
    """Requests arrive over time; some are aborted or forked, between steps and (aborts) while one is in flight."""
    config = dict(workload)
    requests, rng = config.pop("requests"), random.Random(config.pop("seed"))
    engine = make_engine(**config)
    arrivals = sorted(range(len(requests)), key=lambda index: requests[index][4])
    aborted: set[str] = set()
    origin: dict[str, int] = {}
    for step in range(2000):
        while arrivals and requests[arrivals[0]][4] <= step:
            index = arrivals.pop(0)
            prompt, count, priority, stop, _, num_samples = requests[index]
            samples = [f"{index}.{sample}" for sample in range(num_samples)]
            engine.planner.submit(str(index), prompt, count, priority, stop, samples)
            origin.update((name, index) for name in (str(index), *samples))
        live = engine.planner.request_ids
        if live and len(live) < 12 and rng.random() < action_rate:
            parent = rng.choice(live)
            engine.planner.fork(parent, f"{parent}+{step}")
            origin[f"{parent}+{step}"] = origin[parent]
        plan = engine.planner.plan()
        if plan is None:
            if not arrivals:
                break
            continue
        engine.plans.append(plan)
        sampled = engine.execute(plan)
        for victim in engine.planner.request_ids:
            if rng.random() < action_rate / 4:
                engine.planner.abort(victim)
                aborted.add(victim)
                sampled.pop(victim, None) if rng.random() < 0.5 else None
        engine.commit(plan, sampled)
    else:
        raise AssertionError("the workload does not end")
    assert set(engine.finished) | aborted == set(origin) and not set(engine.finished) & aborted
    return engine, origin


def check_results(engine: Engine, origin: dict[str, int], requests: list[Any]) -> None:
    for request_id, result in engine.finished.items():
        prompt, count, _, stop, *_ = requests[origin[request_id]]
        expected = generate(prompt, count, stop)
        assert result.tokens == expected
        assert result.reason == ("stop" if expected[-1] in stop else "length")


@settings(max_examples=250, deadline=None)
@given(workload=workloads())
def test_every_request_gets_its_tokens(workload: dict[str, Any]) -> None:
    engine, origin = run_workload(workload, action_rate=0.0)
    check_results(engine, origin, workload["requests"])
    assert len(engine.finished) == sum(1 + request[-1] for request in workload["requests"])
    check_all_pages_return(engine)


@settings(max_examples=250, deadline=None)
@given(workload=workloads())
def test_aborts_and_forks_at_any_time(workload: dict[str, Any]) -> None:
    engine, origin = run_workload(workload, action_rate=0.3)
    check_results(engine, origin, workload["requests"])
    check_all_pages_return(engine)


@settings(max_examples=40, deadline=None)
@given(workload=workloads())
def test_the_same_calls_give_the_same_plans(workload: dict[str, Any]) -> None:
    first, _ = run_workload(workload, action_rate=0.3)
    second, _ = run_workload(workload, action_rate=0.3)
    assert first.plans == second.plans


def test_no_starvation_under_a_stream_of_short_requests() -> None:
    """A long prompt is admitted and finishes although short ones keep coming."""
    engine = make_engine(num_pages=12, max_batch=4)
    for index in range(3):
        engine.planner.submit(f"early {index}", (index,) * 4, 3)
    engine.planner.submit("long", (1, 2) * 8, 8)
    for index in range(60):
        engine.planner.submit(f"late {index}", (index % 5, 1), 2)
        engine.step()
        if "long" in engine.finished:
            break
    assert engine.finished["long"].tokens == generate((1, 2) * 8, 8)
    assert len(engine.finished) < 30


def test_a_full_pool_preempts_the_latest_of_the_lowest_priority() -> None:
    order: list[set[str]] = []
    engine = make_engine(num_pages=6, prefix_cache="none")
    for name, priority in (("low", 0), ("high", 1), ("low later", 0)):
        engine.planner.submit(name, (1, 2, 3), 6, priority)
    while engine.step():
        order.append({entry.request_id for entry in engine.plans[-1].entries})
    assert order[0] == {"low", "high", "low later"}
    shrinks = [before - after for before, after in zip(order, order[1:], strict=False) if before - after]
    assert shrinks[0] == {"low later"}
    order_of_ends = list(engine.finished)
    assert (order_of_ends[0], order_of_ends[-1]) == ("high", "low later")
    assert all(result.tokens == generate((1, 2, 3), 6) for result in engine.finished.values())


def test_a_waiting_request_preempts_only_those_after_it() -> None:
    engine = make_engine(num_pages=4, prefix_cache="none", max_tokens_per_step=5, max_batch=3)
    engine.planner.submit("running", (1,) * 5, 3)
    engine.step()
    engine.planner.submit("equal", (2,) * 5, 3)
    engine.step()
    assert [entry.request_id for entry in engine.plans[-1].entries] == ["running"]
    engine.planner.submit("urgent", (3,) * 5, 3, priority=5)
    engine.step()
    # The token that was planned for "running" goes to "urgent" as well.
    assert [(entry.request_id, entry.num_new_tokens) for entry in engine.plans[-1].entries] == [("urgent", 5)]
    engine.drain(30)
    assert list(engine.finished) == ["urgent", "running", "equal"]


def test_decodes_go_on_beside_a_chunked_prefill() -> None:
    engine = make_engine(num_pages=40, max_tokens_per_step=5, max_batch=4, prefill_chunk=9)
    engine.planner.submit("chat", (1, 2), 12)
    engine.step()
    engine.planner.submit("document", (3,) * 20, 1, priority=1)
    for step in range(5):
        engine.step()
        entries = {entry.request_id: entry for entry in engine.plans[-1].entries}
        assert entries["chat"].num_new_tokens == 1
        assert (entries["document"].start, entries["document"].num_new_tokens) == (4 * step, 4)
        assert entries["document"].samples == (step == 4)


def test_a_shared_prefix_is_computed_once() -> None:
    """Eight prompts at once: one computes the shared beginning, the others find it a step later."""
    shared = tuple(i % 3 for i in range(12))
    for wait, tokens in ((True, 12 + 8 * 2), (False, 8 * 14)):
        stats: list[StepStats] = []
        hooks = plugin_manager()
        hooks.register(BatchObserver(stats))
        config = PlannerConfig(200, 8, 200, wait_for_shared_prefix=wait)
        pool = PagePool(100, 4)
        engine = Engine(pool, StepPlanner(pool, config, hooks), config)
        for index in range(8):
            engine.planner.submit(str(index), (*shared, index % 5, index // 5), 1)
        engine.drain(10)
        assert sum(step.num_tokens for step in stats) == tokens
        assert sum(step.num_cached_tokens for step in stats) == 8 * 14 - tokens


def test_a_finished_conversation_is_found_again() -> None:
    engine = make_engine(num_pages=30, page_size=4)
    engine.planner.submit("turn 1", (1, 2, 3), 7)
    engine.drain(20)
    history = (1, 2, 3, *engine.finished["turn 1"].tokens)
    engine.planner.submit("turn 2", (*history, 4), 2)
    engine.step()
    # Nine tokens were computed, the tenth only sampled: two whole pages of four.
    assert engine.plans[-1].entries[0].start == 8


def test_what_an_aborted_step_was_to_compute_is_not_remembered() -> None:
    engine = make_engine(num_pages=10, page_size=2, prefill_chunk=4)
    prompt = (1, 2, 3, 4, 0, 1, 2, 3)
    engine.planner.submit("failed", prompt, 2)
    engine.step()
    plan = engine.planner.plan()
    assert plan is not None and plan.entries[0].start == 4
    # The step fails: nothing of it was written.
    engine.planner.abort("failed")
    engine.commit(plan, {})
    engine.planner.submit("again", (*prompt, 4), 2)
    engine.step()
    assert engine.plans[-1].entries[0].start == 4
    engine.drain(10)
    assert engine.finished["again"].tokens == generate((*prompt, 4), 2)
    check_all_pages_return(engine)


def test_fork_copies_a_page_only_when_it_is_written() -> None:
    engine = make_engine(num_pages=10, page_size=4)
    engine.planner.submit("a", (1, 2, 3, 4, 0, 1), 4)
    engine.step()
    engine.planner.fork("a", "b")
    assert engine.pool.num_free == 8
    engine.step()
    ((source, destination),) = engine.plans[-1].copies
    first, second = engine.plans[-1].entries
    assert first.pages[0] == second.pages[0] and {first.pages[1], second.pages[1]} == {source, destination}
    engine.drain(10)
    assert engine.finished["a"].tokens == engine.finished["b"].tokens == generate((1, 2, 3, 4, 0, 1), 4)
    check_all_pages_return(engine)


def test_copies_are_done_in_rounds_that_do_not_touch_each_other() -> None:
    def rounds(*copies: tuple[int, int]) -> list[list[tuple[int, int]]]:
        return StepPlan(0, (), copies).copy_rounds()

    assert rounds() == []
    assert rounds((1, 2), (1, 3), (4, 5)) == [[(1, 2), (1, 3), (4, 5)]]
    assert rounds((1, 2), (3, 1)) == [[(1, 2)], [(3, 1)]]
    assert rounds((1, 2), (2, 3)) == [[(1, 2)], [(2, 3)]]
    assert rounds((1, 2), (3, 2), (4, 5)) == [[(1, 2)], [(3, 2), (4, 5)]]


def test_a_dropped_step_ends_its_requests_and_no_others() -> None:
    engine = make_engine(num_pages=20, page_size=4, max_batch=2)
    for name in "abc":
        engine.planner.submit(name, (1, 2, 3, 4, 0, ord(name) % 5), 4)
    engine.step()
    plan = engine.planner.plan()
    assert plan is not None and {entry.request_id for entry in plan.entries} == {"a", "b"}
    engine.planner.abort("b")
    engine.planner.drop(plan)
    engine.planner.check_integrity()
    with pytest.raises(StepOrderError):
        engine.planner.drop(plan)
    assert engine.planner.request_ids == ("c",)
    engine.drain(10)
    assert set(engine.finished) == {"c"}
    check_all_pages_return(engine)


def test_over_long_requests_are_refused_by_name() -> None:
    engine = make_engine(num_pages=4, page_size=4)
    with pytest.raises(CapacityError, match=r"request 'big': expected at most 4 pages .* got 5 pages \(10 prompt \+ 8"):
        engine.planner.submit("big", (1,) * 10, 8)
    engine.planner.submit("fits", (1,) * 10, 7)
    engine.drain(20)
    assert len(engine.finished["fits"].tokens) == 7


def test_bad_calls_are_named_and_change_nothing() -> None:
    engine = make_engine(num_pages=8)
    planner = engine.planner
    planner.submit("a", (1, 2), 3)
    for call, text in (
        (lambda: planner.submit("a", (1,), 1), "'a', which is in use"),
        (lambda: planner.submit("b", (), 1), "request 'b': prompt: expected at least one token"),
        (lambda: planner.submit("b", (1,), 0), "request 'b': max_new_tokens"),
        (lambda: planner.submit("b", (1,), 1.5), "request 'b': max_new_tokens"),
        (lambda: planner.submit("b", (1,), 1, priority=None), "request 'b': priority: expected an int"),
        (lambda: planner.abort("x"), "request_id: .* got 'x'"),
        (lambda: planner.fork("x", "y"), "request_id: .* got 'x'"),
        (lambda: planner.fork("a", "a"), "'a', which is in use"),
    ):
        with pytest.raises(ArgumentError, match=text):
            call()
    plan = planner.plan()
    assert plan is not None and planner.in_flight is plan
    for order_call in (planner.plan, lambda: planner.fork("a", "b"), lambda: planner.commit(StepPlan(9, (), ()), {})):
        with pytest.raises(StepOrderError):
            order_call()
    for sampled in ({}, {"a": 1, "z": 2}):
        with pytest.raises(ArgumentError, match=r"a token of each of \['a'\]"):
            planner.commit(plan, sampled)
    engine.commit(plan, engine.execute(plan))
    engine.drain(5)
    assert engine.finished["a"].tokens == generate((1, 2), 3)


@pytest.mark.parametrize(
    ("config", "argument"),
    [
        ({"max_tokens_per_step": 0}, "config.max_tokens_per_step"),
        ({"prefill_chunk": 1.5}, "config.prefill_chunk"),
        ({"max_tokens_per_step": 4, "max_batch": 5}, "config.max_batch"),
        ({"policy": "nobody"}, "config.policy"),
        ({"prefix_cache": "nobody"}, "config.prefix_cache"),
        ({"policy_config": {"speed": 1}}, "policy_config"),
        ({"prefix_cache_config": {"speed": 1}}, "prefix_cache_config"),
    ],
)
def test_bad_configuration_is_named(config: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make_engine(num_pages=4, **config)
    assert caught.value.argument == argument


class BatchObserver:
    """Plugin that collects the statistics of every step."""

    def __init__(self, stats: list[StepStats]) -> None:
        self.stats = stats

    @hookimpl
    def fi_on_batch(self, plan: StepPlan, stats: StepStats) -> None:
        assert stats.num_tokens == sum(entry.num_new_tokens for entry in plan.entries)
        self.stats.append(stats)


class ShortestFirst:
    """Plugin with a policy of its own."""

    @hookimpl
    def fi_scheduling_policy(self, name: str, config: Mapping[str, Any]) -> SchedulingPolicy | None:
        return self if name == "shortest" and config == {"by": "prompt"} else None

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.prompt_len, request.arrival)


def test_plugins_choose_the_order_and_observe() -> None:
    stats: list[StepStats] = []
    hooks = plugin_manager()
    hooks.register(ShortestFirst())
    hooks.register(BatchObserver(stats))
    pool = PagePool(20, 2)
    config = PlannerConfig(8, 1, 8, policy="shortest", policy_config={"by": "prompt"})
    engine = Engine(pool, StepPlanner(pool, config, hooks), config)
    for name, length in (("long", 6), ("short", 2), ("middle", 4)):
        engine.planner.submit(name, (1,) * length, 1)
    engine.drain(5)
    assert list(engine.finished) == ["short", "middle", "long"]
    assert [(step.num_running, step.num_waiting, step.num_admitted) for step in stats] == [
        (1, 2, 1),
        (1, 1, 1),
        (1, 0, 1),
    ]


def test_fifo_ignores_priorities() -> None:
    engine = make_engine(num_pages=20, max_batch=1, policy="fifo")
    for name, priority in (("first", 0), ("second", 9)):
        engine.planner.submit(name, (1, 2), 1, priority)
    engine.drain(5)
    assert list(engine.finished) == ["first", "second"]
    assert isinstance(engine.planner._policy, FifoPolicy)
