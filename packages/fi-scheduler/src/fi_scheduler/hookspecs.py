"""Hooks of the scheduler (pluggy, project "fi"): they choose and observe; none is called per kernel launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy
from fi_core.errors import PluginError
from fi_core.registry import registry

if TYPE_CHECKING:
    from .policy import SchedulingPolicy
    from .prefix import PrefixCache
    from .requests import StepPlan, StepStats

PROJECT = "fi"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class SchedulerHooks:
    """Specifications; a plugin implements any of them with ``hookimpl`` and keyword arguments."""

    @hookspec(firstresult=True)
    def fi_scheduling_policy(self, name: str, config: Mapping[str, Any]) -> SchedulingPolicy | None:
        """Return the ordering called ``name``.

        Called by StepPlanner once, when it is made, with the names of PlannerConfig.policy and .policy_config.
        None means: not mine; the next plugin is asked. When every plugin says None, the planner raises ArgumentError.
        """

    @hookspec(firstresult=True)
    def fi_prefix_cache(self, name: str, config: Mapping[str, Any]) -> PrefixCache | None:
        """Return a new prefix cache called ``name``; ``config["pool"]`` is the PagePool it takes references from.

        Called by StepPlanner once, when it is made, with PlannerConfig.prefix_cache and .prefix_cache_config.
        None means: not mine; the next plugin is asked. When every plugin says None, the planner raises ArgumentError.
        """

    @hookspec
    def fi_on_batch(self, plan: StepPlan, stats: StepStats) -> None:
        """Observe a step that is about to run.

        Called by StepPlanner.plan for every step that has work, before the plan is returned. Results are ignored; an
        exception leaves ``plan`` unreturned and the planner waiting for its commit.
        """


def plugin_manager() -> pluggy.PluginManager:
    """A plugin manager with these hooks, the built-in policies and caches, and every plugin of the entry-point group
    ``fi`` that implements one of the hooks; plugins are asked before what is built in.

    Such a plugin marks them ``@hookimpl(optionalhook=True)``: it may be loaded where fi-scheduler is not. PluginError
    names one whose hook has other parameters than the specification.
    """
    manager = pluggy.PluginManager(PROJECT)
    add_scheduler_hooks(manager)
    names = [name for name in vars(SchedulerHooks) if name.startswith("fi_")]
    for name, plugin in registry().manager.list_name_plugin():
        if any(hasattr(plugin, hook) for hook in names):
            try:
                manager.register(plugin, name)
            except pluggy.PluginValidationError as error:
                raise PluginError(f"plugin {name!r}: {error}") from error
    return manager


def add_scheduler_hooks(manager: pluggy.PluginManager) -> None:
    """Add these hooks and the built-in policies and caches to a manager of the project "fi"."""
    from .policy import BuiltinPolicies
    from .prefix import BuiltinPrefixCaches

    manager.add_hookspecs(SchedulerHooks)
    manager.register(BuiltinPolicies(), name="fi-scheduler-policies")
    manager.register(BuiltinPrefixCaches(), name="fi-scheduler-prefix-caches")
