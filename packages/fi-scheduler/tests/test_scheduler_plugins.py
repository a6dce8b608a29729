"""Plugins of the entry-point group ``fi`` bring policies, prefix caches and observers to the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from fi_core.errors import ArgumentError, PluginError
from fi_core.registry import registry
from fi_scheduler.hookspecs import hookimpl, plugin_manager
from fi_scheduler.pages import PagePool
from fi_scheduler.policy import SchedulingPolicy
from fi_scheduler.requests import PlannerConfig, Request, StepPlan
from fi_scheduler.steps import StepPlanner
from planner_simulation import Engine


class ShortestFirst:
    def key(self, request: Request) -> tuple[int, ...]:
        return (request.prompt_len, request.arrival)


class InstalledPolicy:
    @hookimpl(optionalhook=True)
    def fi_scheduling_policy(self, name: str, config: Mapping[str, Any]) -> SchedulingPolicy | None:
        return ShortestFirst() if name == "installed" else None


class WrongHook:
    @hookimpl(optionalhook=True)
    def fi_on_batch(self, plan: StepPlan, weather: str) -> None: ...


@pytest.fixture
def installed() -> Iterator[Callable[[object], None]]:
    """Adds plugins as entry points do, for one test."""
    manager = registry().manager
    added = []

    def add(plugin: object) -> None:
        manager.register(plugin, f"test-{len(added)}")
        added.append(plugin)

    yield add
    for plugin in added:
        manager.unregister(plugin)


def test_an_installed_plugin_brings_a_policy(installed: Callable[[object], None]) -> None:
    config = PlannerConfig(8, 1, 8, policy="installed")
    with pytest.raises(ArgumentError, match="installed"):
        StepPlanner(PagePool(20, 2), config)
    installed(InstalledPolicy())
    pool = PagePool(20, 2)
    engine = Engine(pool, StepPlanner(pool, config), config)
    for name, length in (("long", 6), ("short", 2)):
        engine.planner.submit(name, (1,) * length, 1)
    engine.drain(5)
    assert list(engine.finished) == ["short", "long"]


def test_an_installed_plugin_with_a_wrong_hook_is_named(installed: Callable[[object], None]) -> None:
    installed(WrongHook())
    with pytest.raises(PluginError, match="(?s)'test-0'.*weather"):
        plugin_manager()
