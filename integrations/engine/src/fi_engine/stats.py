"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from fi_scheduler.hookspecs import hookimpl
from fi_scheduler.requests import StepPlan, StepStats


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_decode_steps: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @hookimpl
    def fi_on_batch(self, plan: StepPlan, stats: StepStats) -> None:
        self.num_steps += 1
        self.num_preemptions += stats.num_preempted
        self.num_cached_tokens += stats.num_cached_tokens
