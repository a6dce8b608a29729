"""The page pool: reference-counted KV pages, copy-on-write, and an integrity check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fi_core.errors import ArgumentError, FiError


class PoolFullError(FiError):
    """An allocation asked for more pages than are free; nothing was taken."""

    def __init__(self, needed: int, available: int) -> None:
        self.needed = needed
        self.available = available
        super().__init__(f"page pool is full: {needed} pages needed, {available} available")


class PoolIntegrityError(FiError):
    """The pool's reference counts disagree with what its owners hold; ``page`` is the first bad one."""

    def __init__(self, page: int, problem: str) -> None:
        self.page = page
        super().__init__(f"page {page}: {problem}")


class PagePool:
    """Hands out page ids 0 .. num_pages - 1 of ``page_size`` tokens each; holds no memory itself.

    A page has as many references as owners. Every method either succeeds as a whole or changes nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(name, "a positive int", value)
        self.num_pages = num_pages
        self.page_size = page_size
        self._refcounts = [0] * num_pages
        # A stack, lowest page on top: pages used last are the likeliest to be in a cache.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that an allocation can take now."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def refcount(self, page: int) -> int:
        """Owners of ``page``; 0 means it is free."""
        self._check_page(page)
        return self._refcounts[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Take ``num_pages`` pages with one reference each; raises PoolFullError and takes none if too few are free."""
        if num_pages < 0:
            raise ArgumentError("num_pages", "an int >= 0", num_pages)
        if num_pages > len(self._free):
            raise PoolFullError(num_pages, len(self._free))
        if num_pages == 0:
            return []
        pages = self._free[: -num_pages - 1 : -1]
        del self._free[-num_pages:]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def fork(self, pages: Sequence[int]) -> None:
        """Add one reference to each of ``pages``: a second owner shares them."""
        for page in pages:
            self._check_owned(page)
        for page in pages:
            self._refcounts[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference of each of ``pages`` (a page named twice loses two); the last one frees the page."""
        for page, count in Counter(pages).items():
            self._check_owned(page)
            if count > self._refcounts[page]:
                raise ArgumentError("pages", f"at most {self._refcounts[page]} times page {page}", f"{count} times")
        for page in pages:
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                self._free.append(page)

    def make_writable(self, page: int) -> tuple[int, int | None]:
        """A page that the owner of ``page`` alone may write: (page, None), or (new page, the page to copy from).

        A shared page passes the caller's reference on to a fresh page; raises PoolFullError when there is none. The
        caller copies the contents before anything is written to either page.
        """
        self._check_owned(page)
        if self._refcounts[page] == 1:
            return page, None
        (fresh,) = self.allocate(1)
        self._refcounts[page] -= 1
        return fresh, page

    def check_integrity(self, owners: Mapping[str, Iterable[int]]) -> None:
        """Compare the reference counts with what each owner holds; raises PoolIntegrityError at the first bad page."""
        holders: dict[int, list[str]] = {}
        for owner, pages in owners.items():
            for page in pages:
                if not 0 <= page < self.num_pages:
                    raise PoolIntegrityError(page, f"held by {owner} but outside the pool of {self.num_pages} pages")
                holders.setdefault(page, []).append(owner)
        times_free = Counter(self._free)
        for page, refcount in enumerate(self._refcounts):
            held = holders.get(page, [])
            if refcount != len(held):
                raise PoolIntegrityError(page, f"{refcount} references but held by {held or 'nobody'}")
            expected_free = 1 if refcount == 0 else 0
            if times_free[page] != expected_free:
                raise PoolIntegrityError(page, f"{times_free[page]} times in the free list with {refcount} references")

    def _check_page(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise ArgumentError("page", f"a page id from 0 to {self.num_pages - 1}", page)

    def _check_owned(self, page: int) -> None:
        self._check_page(page)
        if self._refcounts[page] == 0:
            raise ArgumentError("page", "a page in use", f"page {page}, which is free")
