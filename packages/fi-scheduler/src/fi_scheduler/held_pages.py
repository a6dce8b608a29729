"""The pages of requests: what they share with the prefix cache and with each other, and what they may write."""

from __future__ import annotations

from .pages import PagePool
from .prefix import PrefixCache
from .requests import Request


class HeldPages:
    """Keeps a request's pages, the pool's reference counts and the prefix cache's locks in step."""

    def __init__(self, pool: PagePool, cache: PrefixCache) -> None:
        self._pool = pool
        self._cache = cache

    def make_room(self, num_pages: int) -> bool:
        """Have ``num_pages`` free pages, at the prefix cache's expense if need be."""
        if num_pages > self._pool.num_free:
            self._cache.evict(num_pages - self._pool.num_free)
        return num_pages <= self._pool.num_free

    def share(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Give a new request the pages of the first ``num_tokens`` tokens of another."""
        # Pages the parent has in reserve stay its own: it will write them.
        shared = parent.pages[: self._pool.pages_for(num_tokens)]
        self._pool.fork(shared)
        self._cache.lock(parent.node)
        child.pages, child.node = shared, parent.node
        child.num_computed = num_tokens
        parent.has_moved = True

    def shares_page_to_write(self, request: Request) -> bool:
        """Whether the page of the request's next token has other owners; only requests that branched off share
        such a page."""
        page_idx, offset = divmod(request.num_computed, self._pool.page_size)
        return offset > 0 and self._pool.refcount(request.pages[page_idx]) > 1

    def make_writable(self, request: Request) -> tuple[int, int]:
        """Copy on write of that page: (page to copy from, page to copy to). There must be a free page."""
        page_idx = request.num_computed // self._pool.page_size
        page, source = self._pool.make_writable(request.pages[page_idx])
        assert source is not None
        request.pages[page_idx] = page
        request.table = ()
        return source, page

    def remember(self, request: Request) -> None:
        """Share the whole computed pages of a request through the prefix cache; where it had them, use the cache's."""
        num_pages = request.num_computed // self._pool.page_size
        tokens = request.tokens[: num_pages * self._pool.page_size]
        kept = self._cache.insert(tokens, request.pages[:num_pages])
        self._cache.lock(kept.node)
        self._cache.unlock(request.node)
        request.node = kept.node
        self._pool.fork(kept.pages)
        self._pool.free(request.pages[:num_pages])
        request.pages[:num_pages] = kept.pages
        request.table = ()
        request.has_moved = True

    def release(self, request: Request) -> None:
        """Take a request's pages away; what it computed may stay in the prefix cache until the room is needed."""
        self.remember(request)
        self._cache.unlock(request.node)
        self._pool.free(request.pages)
        request.node = None
        request.pages, request.table = [], ()
        request.num_computed = 0
