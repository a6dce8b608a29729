"""An engine for the step planner's tests: pages hold what a real one's would, and samples depend on all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fi_scheduler.pages import PagePool
from fi_scheduler.requests import Finished, PlannerConfig, StepPlan
from fi_scheduler.steps import StepPlanner

VOCABULARY = 5


def next_token(tokens: tuple[int, ...]) -> int:
    """Stands for the model: any change to any earlier token changes what follows."""
    return hash(tokens) % VOCABULARY


def generate(prompt: tuple[int, ...], count: int, stop: frozenset[int] = frozenset()) -> tuple[int, ...]:
    tokens = prompt
    for _ in range(count):
        tokens = (*tokens, next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@dataclass
class Engine:
    """Runs plans. A cell of a page holds all tokens up to its position, so that any mix-up of pages is seen."""

    pool: PagePool
    planner: StepPlanner
    config: PlannerConfig
    memory: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def read(self, pages: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """The tokens whose keys and values the pages hold."""
        size = self.pool.page_size
        cells = [self.memory.get((pages[position // size], position % size)) for position in range(num_tokens)]
        for position, cell in enumerate(cells):
            assert cell is not None and len(cell) == position + 1 and cell == cells[-1][: position + 1]
        return cells[-1] if cells else ()

    def execute(self, plan: StepPlan) -> dict[str, int]:
        size = self.pool.page_size
        assert sum(entry.num_new_tokens for entry in plan.entries) <= self.config.max_tokens_per_step
        assert 0 < len(plan.entries) <= self.config.max_batch
        assert len({entry.request_id for entry in plan.entries}) == len(plan.entries)
        for source, destination in plan.copies:
            for offset in range(size):
                self.memory[destination, offset] = self.memory.get((source, offset), ())
        check_levels(plan, size, self.config.max_prefix_depth)
        contexts = [self.read(entry.pages, entry.start) for entry in plan.entries]
        written = set()
        sampled = {}
        for entry, context in zip(plan.entries, contexts, strict=True):
            assert 1 <= entry.num_new_tokens <= self.config.prefill_chunk
            end = entry.start + entry.num_new_tokens
            assert len(entry.pages) == self.pool.pages_for(end)
            for position, token in enumerate(entry.tokens, entry.start):
                context = (*context, token)
                cell = entry.pages[position // size], position % size
                assert cell not in written and self.pool.refcount(cell[0]) == 1
                written.add(cell)
                self.memory[cell] = context
            if entry.samples:
                sampled[entry.request_id] = next_token(context)
        return sampled

    def step(self) -> bool:
        plan = self.planner.plan()
        if plan is None:
            return False
        self.plans.append(plan)
        self.commit(plan, self.execute(plan))
        return True

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> None:
        for result in self.planner.commit(plan, sampled):
            assert result.request_id not in self.finished
            self.finished[result.request_id] = result
        self.planner.check_integrity()

    def drain(self, max_steps: int) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {max_steps} steps: {self.planner.request_ids}")


def check_levels(plan: StepPlan, page_size: int, max_depth: int) -> None:
    """Levels are a forest, parents first; members have the same pages there, computed before their new tokens."""
    shared: dict[int, list[int]] = {index: [0] for index in range(len(plan.entries))}
    for begin, end, kv_begin, kv_end in plan.levels:
        members = plan.entries[begin:end]
        assert len(members) == end - begin > 1 and kv_begin < kv_end
        assert all(shared[index] == shared[begin] and shared[index][-1] == kv_begin for index in range(begin, end))
        assert all(entry.pages[: kv_end // page_size] == members[0].pages[: kv_end // page_size] for entry in members)
        assert kv_end % page_size == 0 and all(kv_end <= entry.start for entry in members)
        for index in range(begin, end):
            shared[index] = [*shared[index], kv_end]
            assert len(shared[index]) - 1 <= max_depth


def make_engine(num_pages: int, page_size: int = 2, **config: Any) -> Engine:
    planner_config = PlannerConfig(**{"max_tokens_per_step": 16, "max_batch": 8, "prefill_chunk": 6, **config})
    pool = PagePool(num_pages, page_size)
    return Engine(pool, StepPlanner(pool, planner_config), planner_config)


def check_all_pages_return(engine: Engine) -> None:
    engine.planner._cache.evict(engine.pool.num_pages)
    assert engine.pool.num_free == engine.pool.num_pages
    engine.pool.check_integrity({})
