"""Reference of ``find_shared_prefixes``: groups of requests as lists, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import Batch


@dataclass(frozen=True)
class _Group:
    """Requests, in order, whose first ``matched`` pages are equal; up to token ``covered`` they are read once."""

    members: tuple[int, ...]
    matched: int
    covered: int


def find_shared_prefixes(
    batch: Batch, page_size: int, max_depth: int, min_saved_tokens: int, nodes: Tensor, order: Tensor
) -> None:
    """The ``FindSharedPrefixes`` protocol; synchronises on a GPU."""
    starts = (batch.kv_lens - (batch.q_indptr[1:] - batch.q_indptr[:-1])).clamp(min=0).tolist()
    pages = [row[: start // page_size].tolist() for row, start in zip(_rows(batch), starts, strict=True)]
    groups = [_Group(tuple(range(batch.size)), 0, 0)]
    found: list[tuple[int, int, int, int]] = []
    for _ in range(max_depth):
        parts = [part for group in groups for part in _parts(group, pages)]
        groups, begin = [], 0
        for part in parts:
            count, end = len(part.members), part.matched * page_size
            saved = (count - 1) * (end - part.covered)
            if count > 1 and saved >= min_saved_tokens and len(found) < nodes.shape[0]:
                found.append((begin, begin + count, part.covered, end))
                part = _Group(part.members, part.matched, end)
            groups.append(part)
            begin += count
    members = [member for group in groups for member in group.members]
    order.copy_(torch.tensor(members, dtype=torch.int32))
    nodes.zero_()
    nodes[: len(found)] = torch.tensor(found, dtype=torch.int32).view(-1, 4).to(nodes.device)


def _parts(group: _Group, pages: Sequence[list[int]]) -> Iterator[_Group]:
    """The group split by the members' next page, each part with all that it agrees in; whoever has no next page stays alone."""
    parts: dict[tuple[int, int], list[int]] = {}
    for member in group.members:
        own = pages[member]
        has_next = len(own) > group.matched and own[group.matched] >= 0
        parts.setdefault((0, own[group.matched]) if has_next else (1, member), []).append(member)
    for members in parts.values():
        matched = group.matched
        if len(members) > 1:
            rows = [pages[member] for member in members]
            while all(len(row) > matched and row[matched] == rows[0][matched] for row in rows):
                matched += 1
        yield _Group(tuple(members), matched, group.covered)


def _rows(batch: Batch) -> list[Tensor]:
    """Each request's table entries, on the CPU."""
    table = batch.table
    assert table is not None
    table = table.cpu()
    if batch.table_indptr is not None:
        bounds = batch.table_indptr.tolist()
        return [table[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    rows = range(batch.size) if batch.table_row is None else batch.table_row.tolist()
    return [table[row] for row in rows]
