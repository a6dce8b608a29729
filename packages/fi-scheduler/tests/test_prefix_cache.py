"""The prefix caches against brute force: longest whole-page match, least recently used eviction, no page lost."""

from __future__ import annotations

import pytest
from fi_core.errors import ArgumentError
from fi_scheduler.pages import PagePool
from fi_scheduler.prefix import NoPrefixCache, PrefixNode, RadixCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

PAGE = 2
Path = tuple[int, ...]
sequences = st.lists(st.integers(0, 2), max_size=9).map(tuple)


class RadixMachine(RuleBasedStateMachine):
    """The cache beside a plain dict from token prefixes to (page, last use)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, PAGE)
        self.cache = RadixCache(self.pool)
        self.model: dict[Path, list[int]] = {}
        self.locks: list[tuple[Path, PrefixNode | None]] = []
        self.clock = 0

    def cached(self, tokens: Path) -> Path:
        """Longest prefix of whole pages in the model."""
        lengths = range(PAGE, len(tokens) + 1, PAGE)
        return max((tokens[:length] for length in lengths if tokens[:length] in self.model), key=len, default=())

    def touch(self, tokens: Path) -> None:
        self.clock += 1
        for length in range(PAGE, len(tokens) + 1, PAGE):
            self.model[tokens[:length]][1] = self.clock

    @rule(tokens=sequences)
    def match(self, tokens: Path) -> None:
        prefix = self.cached(tokens)
        pages = [self.model[prefix[:length]][0] for length in range(PAGE, len(prefix) + 1, PAGE)]
        assert list(self.cache.match(tokens).pages) == pages
        self.touch(prefix)

    @rule(tokens=sequences)
    def insert(self, tokens: Path) -> None:
        whole = tokens[: len(tokens) // PAGE * PAGE]
        if len(whole) // PAGE > self.pool.num_free:
            return
        pages = self.pool.allocate(len(whole) // PAGE)
        kept = self.cache.insert(whole, pages)
        for page_idx, page in enumerate(pages):
            self.model.setdefault(whole[: (page_idx + 1) * PAGE], [page, 0])
        assert list(kept.pages) == [self.model[whole[:end]][0] for end in range(PAGE, len(whole) + 1, PAGE)]
        self.touch(whole)
        self.pool.free(pages)

    @rule(tokens=sequences)
    def lock(self, tokens: Path) -> None:
        match = self.cache.match(tokens)
        self.touch(self.cached(tokens))
        self.cache.lock(match.node)
        self.locks.append((self.cached(tokens), match.node))

    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        if self.locks:
            _, node = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
            self.cache.unlock(node)

    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        freed = 0
        while freed < count:
            leaves = [
                path
                for path in self.model
                if not any(other[: len(path)] == path for other in self.model if len(other) > len(path))
                and not any(locked[: len(path)] == path for locked, _ in self.locks)
            ]
            if not leaves:
                break
            # Leaves cannot share their time of last use: a touch ends in one node.
            del self.model[min(leaves, key=lambda path: self.model[path][1])]
            freed += 1
        assert self.cache.evict(count) == freed

    @invariant()
    def agrees(self) -> None:
        pages = [page for page, _ in self.model.values()]
        assert sorted(self.cache.pages()) == sorted(pages)
        self.pool.check_integrity({"cache": pages})


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_eviction_spares_pages_that_others_hold() -> None:
    """Pages with another owner leave the tree without becoming free, and the eviction goes on."""
    pool = PagePool(4, 1)
    cache = RadixCache(pool)
    pages = pool.allocate(3)
    cache.insert((1,), pages[:1])
    cache.insert((2,), pages[1:2])
    pool.free(pages[1:2])
    assert cache.evict(1) == 1
    assert sorted(cache.pages()) == []
    pool.check_integrity({"test": [pages[0], pages[2]]})


def test_misuse_is_named() -> None:
    pool = PagePool(4, 2)
    cache = RadixCache(pool)
    pages = pool.allocate(1)
    with pytest.raises(ArgumentError, match="tokens: expected 1 whole pages of 2 tokens, got 3 tokens"):
        cache.insert((1, 2, 3), pages)
    node = cache.insert((1, 2), pages).node
    with pytest.raises(ArgumentError, match="without a lock"):
        cache.unlock(node)
    cache.evict(1)
    for call in (cache.lock, cache.unlock):
        with pytest.raises(ArgumentError, match=f"evicted page {pages[0]}"):
            call(node)
        with pytest.raises(ArgumentError, match="None"):
            call(None)


def test_no_prefix_cache_keeps_nothing() -> None:
    cache = NoPrefixCache()
    kept = cache.insert((1, 2), [3])
    assert kept.pages == (3,) and kept.node is None
    assert cache.match((1, 2)).pages == () and list(cache.pages()) == [] and cache.evict(5) == 0
