"""Prefix caches: which pages already hold the keys and values of a prompt's first tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fi_core.errors import ArgumentError

from .hookspecs import hookimpl
from .pages import PagePool


@dataclass(eq=False)
class PrefixNode:
    """One whole page of tokens behind its parent's; the root holds no page (-1).

    ``num_locks`` counts the locks on this node or below: a locked node stays.
    """

    page: int
    tokens: tuple[int, ...] = ()
    parent: PrefixNode | None = None
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    num_locks: int = 0
    last_used: int = 0
    is_queued: bool = False
    in_tree: bool = True


@dataclass(frozen=True)
class PrefixMatch:
    """Cached pages of a prefix, in order, and the node to lock while they are in use (None: nothing to lock)."""

    pages: tuple[int, ...]
    node: PrefixNode | None


class PrefixCache(Protocol):
    """What the step planner asks of a prefix cache. The cache owns one reference of every page it holds."""

    def match(self, tokens: Sequence[int]) -> PrefixMatch:
        """Longest cached prefix of whole pages. The caller locks the node and forks the pages before anything else."""

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> PrefixMatch:
        """Remember that ``pages`` hold ``tokens`` (whole pages only); returns the cache's pages of these tokens.

        What is cached already keeps its page, so that the result may differ from ``pages``; of the others the cache
        takes a reference of its own.
        """

    def lock(self, node: PrefixNode | None) -> None:
        """Keep the node and all before it until ``unlock``."""

    def unlock(self, node: PrefixNode | None) -> None:
        """Undo one ``lock``."""

    def evict(self, num_pages: int) -> int:
        """Give up unlocked pages, least recently used first, until ``num_pages`` became free; returns how many did."""

    def pages(self) -> Iterator[int]:
        """Every page the cache holds a reference of."""


class RadixCache:
    """A prefix tree with one node a page, so that only whole pages are shared and a shared page is never written.

    ``evict`` takes the least recently used unlocked leaf (RadixAttention: Zheng et al., SGLang, 2024, section 3).
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = PrefixNode(-1)
        self._clock = 0
        self._num_queued = 0
        # Candidates for eviction as (last use when queued, sequence number, node); a node is in it at most once.
        self._queue: list[tuple[int, int, PrefixNode]] = []

    def match(self, tokens: Sequence[int]) -> PrefixMatch:
        node, pages = self._root, []
        for chunk in self._chunks(tokens):
            child = node.children.get(chunk)
            if child is None:
                break
            node = child
            pages.append(node.page)
        self._touch(node)
        return PrefixMatch(tuple(pages), node)

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> PrefixMatch:
        if len(tokens) != len(pages) * self._pool.page_size:
            expected = f"{len(pages)} whole pages of {self._pool.page_size} tokens"
            raise ArgumentError("tokens", expected, f"{len(tokens)} tokens")
        node, kept = self._root, []
        for chunk, page in zip(self._chunks(tokens), pages, strict=True):
            child = node.children.get(chunk)
            if child is None:
                self._pool.fork([page])
                child = PrefixNode(page, chunk, node)
                node.children[chunk] = child
            node = child
            kept.append(node.page)
        self._touch(node)
        self._queue_if_evictable(node)
        return PrefixMatch(tuple(kept), node)

    def lock(self, node: PrefixNode | None) -> None:
        for member in self._path(self._checked(node)):
            member.num_locks += 1

    def unlock(self, node: PrefixNode | None) -> None:
        node = self._checked(node)
        if node is not self._root and node.num_locks < 1:
            raise ArgumentError("node", "a locked node", f"page {node.page} without a lock")
        for member in self._path(node):
            member.num_locks -= 1
        self._queue_if_evictable(node)

    def evict(self, num_pages: int) -> int:
        free_before = self._pool.num_free
        while self._queue and self._pool.num_free - free_before < num_pages:
            queued_at, _, node = heapq.heappop(self._queue)
            node.is_queued = False
            if node.last_used != queued_at:
                self._queue_if_evictable(node)
            elif self._is_evictable(node):
                self._remove(node)
        return self._pool.num_free - free_before

    def pages(self) -> Iterator[int]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node.page
            stack.extend(node.children.values())

    def _checked(self, node: PrefixNode | None) -> PrefixNode:
        if node is None or not node.in_tree:
            raise ArgumentError("node", "a node of this cache", "None" if node is None else f"evicted page {node.page}")
        return node

    def _remove(self, node: PrefixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        node.in_tree = False
        self._pool.free([node.page])
        self._queue_if_evictable(parent)

    def _chunks(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self._pool.page_size
        for begin in range(0, len(tokens) - size + 1, size):
            yield tuple(tokens[begin : begin + size])

    def _path(self, node: PrefixNode) -> Iterator[PrefixNode]:
        """The node and its ancestors, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _touch(self, node: PrefixNode) -> None:
        self._clock += 1
        for member in self._path(node):
            member.last_used = self._clock

    def _is_evictable(self, node: PrefixNode) -> bool:
        return node.parent is not None and node.in_tree and not node.children and node.num_locks == 0

    def _queue_if_evictable(self, node: PrefixNode) -> None:
        if self._is_evictable(node) and not node.is_queued:
            node.is_queued = True
            self._num_queued += 1
            heapq.heappush(self._queue, (node.last_used, self._num_queued, node))


class NoPrefixCache:
    """The same interface with nothing cached."""

    def match(self, tokens: Sequence[int]) -> PrefixMatch:
        return PrefixMatch((), None)

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> PrefixMatch:
        return PrefixMatch(tuple(pages), None)

    def lock(self, node: PrefixNode | None) -> None:
        pass

    def unlock(self, node: PrefixNode | None) -> None:
        pass

    def evict(self, num_pages: int) -> int:
        return 0

    def pages(self) -> Iterator[int]:
        return iter(())


class BuiltinPrefixCaches:
    """Plugin with the built-in caches "radix" and "none"; neither takes settings besides the pool."""

    @hookimpl
    def fi_prefix_cache(self, name: str, config: Mapping[str, Any]) -> PrefixCache | None:
        unknown = sorted(set(config) - {"pool"})
        if name in ("radix", "none") and unknown:
            raise ArgumentError("prefix_cache_config", f"no settings for {name!r}", unknown)
        if name == "radix":
            return RadixCache(config["pool"])
        return NoPrefixCache() if name == "none" else None
