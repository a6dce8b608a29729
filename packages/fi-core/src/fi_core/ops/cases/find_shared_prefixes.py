"""Conformance cases of ``find_shared_prefixes``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...protocols import FindSharedPrefixes
from ...records import Batch
from ...reference.prefixes import find_shared_prefixes

_POISON = -77


@dataclass(frozen=True)
class Scenario:
    """``pages`` before each request's new tokens, ``rest`` tokens behind them in a page of their own, ``q_lens`` new ones (taken
    in turns). ``table_row``: rows lie in another order, with others between."""

    pages: tuple[tuple[int, ...], ...]
    page_size: int = 16
    rest: int = 3
    q_lens: tuple[int, ...] = (1,)
    max_prefixes: int = 16
    max_depth: int = 2
    min_saved_tokens: int = 1
    indptr: bool = False
    table_row: bool = False

    def batch(self, device: torch.device, seed: int) -> Batch:
        """Entries past a request's pages are foreign: some equal, some out of range."""
        chance = random.Random(seed)
        size = len(self.pages)
        q_lens = [self.q_lens[request % len(self.q_lens)] for request in range(size)]
        lens = [len(held) * self.page_size + self.rest + new for held, new in zip(self.pages, q_lens, strict=True)]
        own = [
            [5_000 + request] * (-(-length // self.page_size) - len(self.pages[request]))
            for request, length in enumerate(lens)
        ]
        rows = [[*held, *tail] for held, tail in zip(self.pages, own, strict=True)]
        indptr = _int32([0, *q_lens], device).cumsum(0, dtype=torch.int32)
        if self.indptr:
            table = _int32([entry for row in rows for entry in row], device)
            bounds = _int32([0, *(len(row) for row in rows)], device).cumsum(0, dtype=torch.int32)
            return Batch(indptr, _int32(lens, device), table, table_indptr=bounds)
        width = max(map(len, rows), default=0) + 2
        foreign = (7, 7, -1, 1 << 30)
        padded = [[*row, *(chance.choice(foreign) for _ in range(width - len(row)))] for row in rows]
        if not self.table_row:
            return Batch(indptr, _int32(lens, device), _int32(padded, device).view(size, width))
        places = chance.sample(range(2 * size), size)
        table = torch.full((2 * size, width), 7, dtype=torch.int32)
        table[places] = torch.tensor(padded, dtype=torch.int32)
        return Batch(indptr, _int32(lens, device), table.to(device), _int32(places, device))


def _int32(values: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def build(scenario: Scenario, device: torch.device, seed: int) -> Trial:
    """Nodes and order are exact."""
    batch = scenario.batch(device, seed)
    numbers = (scenario.page_size, scenario.max_depth, scenario.min_saved_tokens)

    def outputs(call: FindSharedPrefixes) -> dict[str, Tensor]:
        nodes = torch.full((scenario.max_prefixes, 4), _POISON, dtype=torch.int32, device=device)
        order = torch.full((batch.size,), _POISON, dtype=torch.int32, device=device)
        call(batch, *numbers, nodes, order)
        return {"nodes": nodes, "order": order}

    return Trial(outputs, lambda: outputs(find_shared_prefixes), {"nodes": EXACT, "order": EXACT})


def _case(name: str, *pages: tuple[int, ...], **options: Any) -> Case:
    scenario = Scenario(pages, **options)
    values = {"table": "indptr" if scenario.indptr else "dense", "max_depth": scenario.max_depth}
    return Case(name, values, lambda device, seed: build(scenario, device, seed))


def _tree(seed: int, size: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Random paths with few beginnings, some cut short."""
    chance = random.Random(seed)
    stems = [tuple(chance.randrange(3) for _ in range(chance.randint(0, longest))) for _ in range(max(1, size // 5))]
    found = []
    for request in range(size):
        path = (*chance.choice(stems), *(chance.randrange(3) for _ in range(chance.randint(0, 3))), 100 + request)
        found.append(path[: chance.randint(0, len(path))])
    return tuple(found)


def cases() -> Iterator[Case]:
    """Trees, lengths that end the sharing early, little to save, too many nodes, every form of table."""
    apart, alike = ((1, 2), (3,), (4, 5, 6)), ((1, 2, 3, 9), (1, 2, 3, 8), (1, 2, 3, 7))
    yield _case("nothing_shared", *apart)
    yield _case("one_group", *alike)
    yield _case("equal_requests", (1, 2), (1, 2), (1, 2))
    yield _case("in_turns", (1, 2, 9), (5, 6), (1, 2, 8), (5, 6, 7), (1, 2), (4,))
    yield _case("two_levels", (1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 6), (1, 2, 5, 7), (1, 2))
    yield _case("three_levels", (1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (1, 7), (1, 2, 3, 5, 8), max_depth=3)
    yield _case("deeper_than_asked", (1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (1, 7), (1, 2, 3, 5, 8), max_depth=1)
    yield _case("a_short_one_ends_the_group", (1, 2, 3), (1,), (1, 2, 3, 4))
    yield _case("too_little_is_left_to_those_within", (1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 7), min_saved_tokens=60)
    yield _case("just_enough", (1, 2), (1, 3), min_saved_tokens=16)
    yield _case("just_too_little", (1, 2), (1, 3), min_saved_tokens=17)
    yield _case("more_nodes_than_rows", *((group, member) for member in range(3) for group in range(5)), max_prefixes=3)
    yield _case("one_request", (1, 2, 3))
    yield _case("no_request")
    yield _case("no_pages", (), (), ())
    yield _case("new_tokens_hide_pages", (1, 2, 3), (1, 2, 3, 4), q_lens=(40, 1), rest=0)
    yield _case("padding", (1, 2), (), (1, 2), q_lens=(1, 0, 1), rest=0)
    yield _case("token_slots", *alike, page_size=1, rest=0)
    yield _case("indptr", *_tree(1, 20, 6), indptr=True, max_depth=3)
    yield _case("table_row", *_tree(2, 20, 6), table_row=True, max_depth=3)
    long = tuple(range(3000))
    yield _case("long", (*long, 1), (*long, 2), (*long[:2050], 1, 2), page_size=1, max_depth=3)
    yield _case("many_requests", *_tree(3, 300, 5), max_prefixes=200, max_depth=4)
    for seed in range(8):
        yield _case(
            f"tree_{seed}", *_tree(seed, 5 + 4 * seed, 8), max_depth=1 + seed % 4, min_saved_tokens=(1, 40)[seed % 2]
        )
