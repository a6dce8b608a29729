"""Shared prefixes for conformance cases of attention: forests of every shape, and caches in which requests share pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...prefixes import SharedPrefixes
from ...reference.append_kv import bytes_view
from ...rope import FusedRope
from .kv import CacheForm, CacheInputs

Node = tuple[int, int, int, int]
ForestCase = tuple[str, "Forest", tuple[int, ...], tuple[int, ...], dict[str, Any]]
"""Name, forest, q_lens, kv_lens, options of the case."""


@dataclass(frozen=True)
class Forest:
    """``nodes`` and ``order`` of SharedPrefixes."""

    nodes: tuple[Node, ...]
    order: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        """Most nodes around one request, at least 1."""
        last = max((end for _, end, _, _ in self.nodes), default=0)
        return max([1, *(sum(begin <= place < end for begin, end, _, _ in self.nodes) for place in range(last))])

    def levels(self, device: torch.device) -> SharedPrefixes:
        nodes = torch.tensor(self.nodes, dtype=torch.int32, device=device).view(-1, 4)
        order = None if self.order is None else torch.tensor(self.order, dtype=torch.int32, device=device)
        return SharedPrefixes(nodes, order)

    def request(self, place: int) -> int:
        """The request at a place of the order."""
        return place if self.order is None else self.order[place]


def share(cache: CacheInputs, forest: Forest, form: CacheForm) -> None:
    """Give the members of each node the pages of its first one, and in the page where its range ends the same tokens."""
    size = form.page_size or 1
    for begin, end, _, kv_end in forest.nodes:
        if begin == end:
            continue
        first = _entries(cache, forest.request(begin))
        for place in range(begin + 1, end):
            entries = _entries(cache, forest.request(place))
            whole, rest = divmod(kv_end, size)
            entries[:whole] = first[:whole]
            if rest:
                for tensor in cache.kv.as_nhd():
                    pages = bytes_view(tensor)
                    pages[int(entries[whole]), :rest] = pages[int(first[whole]), :rest]


def _entries(cache: CacheInputs, request: int) -> Tensor:
    """The table entries of a request, a view."""
    table, indptr, rows = (cache.fields.get(name) for name in ("table", "table_indptr", "table_row"))
    assert table is not None
    if indptr is not None:
        return table[int(indptr[request]) : int(indptr[request + 1])]
    return table[request if rows is None else int(rows[request])]


def _random_forest(seed: int, num_requests: int, depth: int, longest: int) -> Forest:
    """Requests in a random order; each stretch of them shares a random number of tokens, and parts of it again."""
    chance = random.Random(seed)
    nodes: list[Node] = []

    def grow(begin: int, end: int, kv_begin: int, level: int) -> None:
        kv_end = kv_begin + chance.randint(1, longest)
        nodes.append((begin, end, kv_begin, kv_end))
        place = begin
        while level < depth and place < end:
            stop = chance.randint(place + 1, end)
            if chance.random() < 0.8:
                grow(place, stop, kv_end, level + 1)
            place = stop

    place = 0
    while place < num_requests:
        stop = min(num_requests, place + chance.randint(1, max(1, num_requests // 2)))
        if chance.random() < 0.9:
            grow(place, stop, 0, 1)
        place = stop
    order = list(range(num_requests))
    chance.shuffle(order)
    return Forest(tuple(nodes), tuple(order))


def _lengths(forest: Forest, q_lens: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """kv_lens of requests with ``own`` tokens (taken in turns) between what they share and their new ones."""
    shared = [0] * len(q_lens)
    for begin, end, _, kv_end in forest.nodes:
        for place in range(begin, end):
            shared[forest.request(place)] = max(shared[forest.request(place)], kv_end)
    return tuple(
        before + own[request % len(own)] + new for request, (before, new) in enumerate(zip(shared, q_lens, strict=True))
    )


def _case(name: str, forest: Forest, q_lens: tuple[int, ...], own: tuple[int, ...], **options: Any) -> ForestCase:
    return name, forest, q_lens, _lengths(forest, q_lens, own), options


def forests() -> Iterator[ForestCase]:
    """Trees up to depth 5, groups of one, suffixes of nothing but the new tokens, prefixes that end inside a page,
    requests in no group; decodes, verification, appends and mixed batches."""
    five = (1,) * 5
    pair = Forest(((0, 5, 0, 64),))
    wide: dict[str, Any] = {"head_dim": 128, "heads": (8, 2)}
    yield _case("one_level", pair, five, (3, 20), features={"lse"})
    yield _case("float32", pair, five, (3, 20), dtype=torch.float32, features={"lse"})
    yield _case("long", Forest(((0, 5, 0, 700),)), five, (150, 3), **wide)
    yield _case("empty_suffixes", Forest(((0, 5, 0, 48),)), five, (0,), **wide, features={"lse"})
    yield _case("inside_a_page", Forest(((0, 5, 0, 37), (1, 4, 37, 43), (2, 4, 43, 90))), five, (5,), **wide)
    yield _case("groups_of_one", Forest(((0, 1, 0, 40), (1, 2, 0, 33), (3, 4, 0, 7))), five, (9, 0), **wide)
    yield _case("no_groups", Forest(()), five, (30, 60), **wide)
    yield _case("unused_rows", Forest(((0, 3, 0, 32), (0, 0, 0, 0), (0, 0, 0, 0))), five, (30, 60), **wide, slack=3)
    order = Forest(((0, 3, 0, 50), (3, 5, 0, 20)), (4, 0, 2, 1, 3))
    yield _case("order", order, five, (8, 1), **wide, before=True)
    yield _case("fp16", order, five, (8, 1), **wide, dtype=torch.float16, features={"lse"})
    yield _case("three_levels", Forest(((0, 6, 0, 130), (0, 4, 130, 200), (1, 3, 200, 333))), (1,) * 6, (40, 0), **wide)
    yield _case("many_requests", Forest(((0, 70, 0, 200), (10, 60, 200, 280))), (1,) * 70, (5, 9, 0), **wide)
    # A backend that leaves levels out where they cost more than they save has reason to use these.
    yield _case(
        "worth_it", Forest(((0, 48, 0, 2600), (8, 40, 2600, 3000))), (1,) * 48, (40, 3), **wide, features={"lse"}
    )
    yield _case("mixed", order, (1, 9, 1, 5, 33), (8, 1), **wide, features={"lse"})
    yield _case("verify", order, (4, 4, 1, 0, 4), (8, 1), **wide, features={"lse"}, strided=True)
    yield _case("append", order, (20, 16, 7, 1, 17), (80, 1), **wide)
    yield _case("not_causal", order, (4, 4, 1, 3, 4), (8, 1), **wide, causal=False)
    yield _case("sinks", order, (1, 2, 1, 1, 1), (8, 1), **wide, features={"sinks", "lse"})
    yield _case("soft_cap", order, (1, 2, 1, 1, 1), (8, 1), **wide, features={"soft_cap"})
    yield _case("alibi", order, (1, 2, 1, 1, 1), (8, 1), **wide, features={"alibi"})
    yield _case("window", order, (1, 2, 1, 1, 1), (8, 1), **wide, windows=(None, 20), window=20)
    yield _case("mask", order, (4, 4, 1, 3, 4), (8, 1), **wide, features={"mask"}, mask="new")
    yield _case("table_indptr", order, five, (8, 1), **wide, table="indptr")
    yield _case("table_row", order, five, (8, 1), **wide, table_row=True, kv_layout="HND")
    for page_size in (1, 5, 64):
        yield _case(f"page_size_{page_size}", order, five, (8, 1), **wide, page_size=page_size)
    for heads in ((4, 4), (16, 2), (7, 1), (48, 1)):
        yield _case(f"heads_{heads[0]}_{heads[1]}", order, five, (90, 1), head_dim=128, heads=heads)
    for head_dim in (64, 96, 192, 256):
        yield _case(f"head_dim_{head_dim}", order, five, (8, 1), head_dim=head_dim)
    yield _case("fp8", order, five, (90, 1), **wide, kv_format="fp8_e4m3", scale="heads", features={"lse"})
    yield _case("fp8_e5m2", order, (2, 1, 1, 3, 1), (90, 1), **wide, kv_format="fp8_e5m2", scale="tensor")
    all_fp8: dict[str, Any] = {**wide, "kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "fp8_weights": True}
    yield _case("fp8_q", order, five, (90, 1), **all_fp8, scale="heads", q_scale="heads", features={"lse"})
    yield _case("fp8_q_mixed", order, (1, 20, 1, 5, 33), (90, 1), **all_fp8, scale="tensor", q_scale="float")
    yield _case("fp8_q_bf16_kv", order, (1, 2, 1, 1, 3), (90, 1), **wide, q_format="fp8_e4m3", q_scale="tensor")
    yield _case("rope_q", order, (1, 20, 1, 5, 33), (8, 1), **wide, rope=FusedRope(128), features={"lse"})
    pairs = FusedRope(64, pairs="interleaved")
    yield _case("rope_q_short", order, (1, 2, 1, 3, 1), (90, 1), **wide, rope=pairs, features={"lse"})
    yield _case("rope_qk", order, (1, 2, 1, 3, 1), (8, 1), **wide, rope=FusedRope(64, keys=True))
    for seed in range(6):
        count = (7, 12, 20, 5, 16, 33)[seed]
        forest = _random_forest(seed, count, 5, (40, 90, 300, 20, 130, 60)[seed])
        q_lens = tuple((1, 1, 4, 1, 2)[(seed + request) % 5] if seed % 2 else 1 for request in range(count))
        yield _case(f"forest_{seed}", forest, q_lens, (0, 1, 33, 150), **wide, features={"lse"})
