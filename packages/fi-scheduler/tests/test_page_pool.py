"""The page pool: reference counts, copy-on-write, all-or-nothing calls, and an integrity check that finds damage."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from fi_core.errors import ArgumentError
from fi_scheduler.pages import PagePool, PoolFullError, PoolIntegrityError
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule


class PoolMachine(RuleBasedStateMachine):
    """Random calls, compared with a plain multiset of references."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7, 4)
        self.held: list[int] = []

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = 7 - len(set(self.held))
        if count > free:
            with pytest.raises(PoolFullError) as caught:
                self.pool.allocate(count)
            assert (caught.value.needed, caught.value.available) == (count, free)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and not set(pages) & set(self.held)
        self.held += pages

    @rule(data=st.data())
    def fork_some(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(set(self.held))), max_size=3)) if self.held else []
        self.pool.fork(pages)
        self.held += pages

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.held)))
        pages = data.draw(st.permutations(self.held))[:count]
        self.pool.free(pages)
        for page in pages:
            self.held.remove(page)

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        if not self.held:
            return
        page = data.draw(st.sampled_from(sorted(set(self.held))))
        shared = self.held.count(page) > 1
        if shared and self.pool.num_free == 0:
            with pytest.raises(PoolFullError):
                self.pool.make_writable(page)
            return
        writable, source = self.pool.make_writable(page)
        assert (writable != page) == shared and source == (page if shared else None)
        self.held.remove(page)
        assert writable not in self.held
        self.held.append(writable)

    @rule(page=st.integers(-2, 9))
    def misuse(self, page: int) -> None:
        if page in self.held:
            return
        for call in (self.pool.fork, self.pool.free):
            with pytest.raises(ArgumentError, match=str(page)):
                call([*sorted(set(self.held))[:1], page])

    @invariant()
    def agrees(self) -> None:
        assert self.pool.num_free == 7 - len(set(self.held))
        for page in range(7):
            assert self.pool.refcount(page) == self.held.count(page)
        self.pool.check_integrity({"test": self.held})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_freeing_twice_in_one_call_changes_nothing() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    with pytest.raises(ArgumentError, match="at most 1 times page 0, got 2 times"):
        pool.free([pages[1], pages[0], pages[0]])
    assert Counter(pool.refcount(page) for page in range(4)) == {1: 2, 0: 2}


@pytest.mark.parametrize(
    ("owners", "page", "text"),
    [
        ({"a": [0]}, 1, "1 references but held by nobody"),
        ({"a": [0, 1], "b": [1]}, 1, r"1 references but held by \['a', 'b'\]"),
        ({"a": [0, 1, 3]}, 3, "0 references but held by"),
        ({"a": [0, 1, 9]}, 9, "outside the pool"),
    ],
)
def test_integrity_names_the_first_bad_page(owners: dict[str, list[int]], page: int, text: str) -> None:
    pool = PagePool(4, 16)
    pool.allocate(2)
    with pytest.raises(PoolIntegrityError, match=f"page {page}: .*{text}") as caught:
        pool.check_integrity(owners)
    assert caught.value.page == page


def test_integrity_finds_a_damaged_free_list() -> None:
    pool = PagePool(4, 16)
    pool.allocate(1)
    pool._free.append(2)
    with pytest.raises(PoolIntegrityError, match="page 2: 2 times in the free list"):
        pool.check_integrity({"a": [0]})
    pool._free[:] = [2, 3]
    with pytest.raises(PoolIntegrityError, match="page 1: 0 times in the free list"):
        pool.check_integrity({"a": [0]})


def test_bad_sizes() -> None:
    for arguments, name in (((0, 16), "num_pages"), ((4, -1), "page_size"), ((True, 1), "num_pages")):
        with pytest.raises(ArgumentError, match=name):
            PagePool(*arguments)
    with pytest.raises(ArgumentError, match="num_pages"):
        PagePool(4, 1).allocate(-1)
    assert PagePool(4, 16).pages_for(0) == 0 and PagePool(4, 16).pages_for(17) == 2


@pytest.mark.parametrize("error", [PoolFullError(3, 1), PoolIntegrityError(2, "held by nobody")])
def test_errors_survive_pickling(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
