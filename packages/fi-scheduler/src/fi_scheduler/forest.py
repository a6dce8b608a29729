"""The prefixes that running requests share, as a forest that follows them as they come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fi_core.errors import ArgumentError


@dataclass(eq=False)
class PrefixGroup:
    """Requests whose first ``end`` pages are the same: those that share no more (``here``) and the groups that do.

    ``pages`` are those behind the parent's; ``size`` counts the requests of the whole group. The forest's root shares nothing.
    """

    pages: tuple[int, ...] = ()
    parent: PrefixGroup | None = None
    end: int = 0
    size: int = 0
    here: dict[str, None] = field(default_factory=dict)
    groups: dict[int, PrefixGroup] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        """Pages that the parent's group shares."""
        return self.end - len(self.pages)


class PrefixForest:
    """A radix tree over the leading pages of requests (Morrison, 1968), kept as short as it can be: every group either
    branches or has requests of its own.

    ``put`` and ``remove`` cost the pages of the one request; nothing is built anew. ``version`` changes when the tree does.
    """

    def __init__(self) -> None:
        self.root = PrefixGroup()
        self.version = 0
        self._at: dict[str, PrefixGroup] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._at

    def __len__(self) -> int:
        return len(self._at)

    @property
    def request_ids(self) -> frozenset[str]:
        """All requests of the forest."""
        return frozenset(self._at)

    def put(self, request_id: str, pages: Sequence[int]) -> None:
        """Add a request with the pages that it may share, or move it to them."""
        pages = tuple(pages)
        at = self._at.get(request_id)
        if at is not None:
            if at.end == len(pages) and self.pages(request_id) == pages:
                return
            self.remove(request_id)
        group = self._place(pages)
        group.here[request_id] = None
        self._at[request_id] = group
        self._count(group, 1)
        self.version += 1

    def remove(self, request_id: str) -> None:
        """Take a request out; raises ArgumentError if it is not there."""
        group = self._at.pop(request_id, None)
        if group is None:
            raise ArgumentError("request_id", "a request of the forest", repr(request_id))
        del group.here[request_id]
        self._count(group, -1)
        self._shorten(group)
        self.version += 1

    def pages(self, request_id: str) -> tuple[int, ...]:
        """The pages that a request was put with."""
        parts: list[int] = []
        group: PrefixGroup | None = self._at[request_id]
        while group is not None:
            parts[:0] = group.pages
            group = group.parent
        return tuple(parts)

    def order(self) -> Iterator[str]:
        """All requests, those of each group next to each other: a group's own ones, then those of its groups, by age."""
        stack = [self.root]
        while stack:
            group = stack.pop()
            yield from group.here
            stack.extend(reversed(group.groups.values()))

    def _place(self, pages: tuple[int, ...]) -> PrefixGroup:
        """The group whose shared pages are exactly ``pages``, made if there is none."""
        group = self.root
        while group.end < len(pages):
            child = group.groups.get(pages[group.end])
            if child is None:
                child = PrefixGroup(pages[group.end :], group, len(pages))
                group.groups[child.pages[0]] = child
                return child
            same = _num_equal(child.pages, pages[child.begin : child.end])
            group = child if same == len(child.pages) else self._split(child, same)
        return group

    @staticmethod
    def _split(group: PrefixGroup, num_pages: int) -> PrefixGroup:
        """Put a group of the first ``num_pages`` pages between ``group`` and its parent, in its place among the others."""
        above = group.parent
        assert above is not None
        between = PrefixGroup(group.pages[:num_pages], above, group.begin + num_pages, group.size)
        group.pages, group.parent = group.pages[num_pages:], between
        between.groups[group.pages[0]] = group
        above.groups[between.pages[0]] = between
        return between

    @staticmethod
    def _count(group: PrefixGroup, change: int) -> None:
        member: PrefixGroup | None = group
        while member is not None:
            member.size += change
            member = member.parent

    @staticmethod
    def _shorten(group: PrefixGroup) -> None:
        """Take out a group that has become needless, and its parent if that is one then."""
        while group.parent is not None and not group.here and len(group.groups) < 2:
            parent = group.parent
            if group.groups:
                (only,) = group.groups.values()
                only.pages, only.parent = group.pages + only.pages, parent
                parent.groups[only.pages[0]] = only
                return
            del parent.groups[group.pages[0]]
            group = parent


def _num_equal(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Leading elements that are equal."""
    if first == second:
        return len(first)
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
