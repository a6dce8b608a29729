"""Levels from equal leading table entries: a few launches a level, each with a program a request, without a copy or a wait.

At a level every group splits by its members' next page. ``leader_kernel`` finds of each request the first one, in the present
order, of its part, and how many pages the two agree in; ``part_kernel`` the part's size, what all of it agrees in, and
the new order, in which a part's members are neighbours; ``node_kernel`` writes the nodes and the next pages.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fi_core.records import Batch
from torch import Tensor

from .launch import on_device

_REQUESTS_AT_ONCE = 256
_ENTRIES_AT_ONCE = 1024
_ARRAYS = (
    "group",
    "matched",
    "covered",
    "next_page",
    "place",
    "order",
    "leader",
    "length",
    "new_place",
    "size",
    "wanted",
)


@triton.jit
def entries_of(
    request, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, ROWS: tl.constexpr, INDPTR: tl.constexpr
):
    """Where a request's table entries begin."""
    if INDPTR:
        begin = tl.load(table_indptr_ptr + request).to(tl.int64)
    else:
        row = request
        if ROWS:
            row = tl.load(table_row_ptr + request)
        begin = row.to(tl.int64) * table_stride
    return table_ptr + begin


@triton.jit
def pages_before(request, q_indptr_ptr, kv_lens_ptr, PAGE_SIZE: tl.constexpr):
    """Whole pages before a request's new tokens."""
    q_len = tl.load(q_indptr_ptr + request + 1) - tl.load(q_indptr_ptr + request)
    return tl.maximum(tl.load(kv_lens_ptr + request) - q_len, 0) // PAGE_SIZE


@triton.jit
def page_at(entries, index, limit):
    """The page at an index below ``limit``; -1 for none."""
    return tl.maximum(tl.load(entries + index, mask=index < limit, other=-1), -1)


@triton.jit(do_not_specialize=["num_nodes", "table_stride"])
def begin_kernel(
    state_ptr, counts_ptr, nodes_ptr, num_nodes, q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr,
    table_stride, num_requests, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, INDPTR: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All requests in one group that has nothing in common yet, in the order of the batch; no nodes."""
    program = tl.program_id(0)
    if program < num_requests:
        entries = entries_of(program, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, ROWS, INDPTR)
        limit = pages_before(program, q_indptr_ptr, kv_lens_ptr, PAGE_SIZE)
        mine = state_ptr + program
        tl.store(mine, 0)
        tl.store(mine + num_requests, 0)
        tl.store(mine + 2 * num_requests, 0)
        tl.store(mine + 3 * num_requests, page_at(entries, program * 0, limit))
        tl.store(mine + 4 * num_requests, program)
        tl.store(mine + 5 * num_requests, program)
    if program < num_nodes:
        tl.store(nodes_ptr + program * 4 + tl.arange(0, 4), tl.zeros((4,), tl.int32))
    if program <= DEPTH:
        tl.store(counts_ptr + program, 0)


@triton.jit(do_not_specialize=["num_requests", "table_stride"])
def leader_kernel(
    group_ptr, matched_ptr, next_page_ptr, place_ptr, order_ptr, leader_ptr, length_ptr, q_indptr_ptr, kv_lens_ptr,
    table_ptr, table_row_ptr, table_indptr_ptr, table_stride, num_requests,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, INDPTR: tl.constexpr, REQUESTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Request ``program_id(0)``: the leader of its part, and the first pages that the two have in common."""
    request = tl.program_id(0)
    matched = tl.load(matched_ptr + request)
    page = tl.load(next_page_ptr + request)
    leader = request
    if page >= 0:
        group = tl.load(group_ptr + request)
        first_place = tl.load(place_ptr + request)
        for first in range(0, num_requests, REQUESTS):
            other = first + tl.arange(0, REQUESTS)
            inside = other < num_requests
            same = inside & (tl.load(group_ptr + other, mask=inside, other=-1) == group)
            same = same & (tl.load(next_page_ptr + other, mask=inside, other=-1) == page)
            place = tl.load(place_ptr + other, mask=same, other=2147483647)
            first_place = tl.minimum(first_place, tl.min(place, 0))
        leader = tl.load(order_ptr + first_place)
        entries = entries_of(request, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, ROWS, INDPTR)
        others = entries_of(leader, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, ROWS, INDPTR)
        end = pages_before(request, q_indptr_ptr, kv_lens_ptr, PAGE_SIZE)
        end = tl.minimum(end, pages_before(leader, q_indptr_ptr, kv_lens_ptr, PAGE_SIZE))
        begin = matched
        while begin < end:  # ends early: a difference becomes the end
            index = begin + tl.arange(0, ENTRIES)
            inside = index < end
            differs = inside & (
                tl.load(entries + index, mask=inside, other=0) != tl.load(others + index, mask=inside, other=0)
            )
            end = tl.minimum(end, tl.min(tl.where(differs, index, 2147483647), 0))
            begin += ENTRIES
        matched = end
    tl.store(leader_ptr + request, leader)
    tl.store(length_ptr + request, matched)


@triton.jit(do_not_specialize=["num_requests", "min_saved"])
def part_kernel(
    matched_ptr, covered_ptr, place_ptr, order_ptr, leader_ptr, length_ptr, new_matched_ptr, new_place_ptr, new_order_ptr,
    size_ptr, wanted_ptr, num_requests, min_saved, PAGE_SIZE: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """The part of request ``program_id(0)``: its size, its common pages, whether it is to be a node (noted at its leader);
    and the request's place in the new order."""
    request = tl.program_id(0)
    leader = tl.load(leader_ptr + request)
    leader_place = tl.load(place_ptr + leader)
    place = tl.load(place_ptr + request)
    size = 0
    length = tl.load(length_ptr + request)
    new_place = 0
    for first in range(0, num_requests, REQUESTS):
        other = first + tl.arange(0, REQUESTS)
        inside = other < num_requests
        other_leader = tl.load(leader_ptr + other, mask=inside, other=0)
        same = inside & (other_leader == leader)
        size += tl.sum(same.to(tl.int32), 0)
        length = tl.minimum(length, tl.min(tl.load(length_ptr + other, mask=same, other=2147483647), 0))
        other_leader_place = tl.load(place_ptr + other_leader, mask=inside, other=0)
        other_place = tl.load(place_ptr + other, mask=inside, other=0)
        before = (other_leader_place < leader_place) | (same & (other_place < place))
        new_place += tl.sum((inside & before).to(tl.int32), 0)
    if size == 1:
        length = tl.load(matched_ptr + request)
    saved = (length * PAGE_SIZE - tl.load(covered_ptr + request)).to(tl.int64) * (size - 1)
    tl.store(new_matched_ptr + request, length)
    tl.store(new_place_ptr + request, new_place)
    tl.store(new_order_ptr + new_place, request)
    tl.store(size_ptr + request, size)
    tl.store(wanted_ptr + request, ((leader == request) & (size > 1) & (saved >= min_saved)).to(tl.int32))


@triton.jit(do_not_specialize=["num_nodes", "num_requests", "table_stride"])
def node_kernel(
    nodes_ptr, num_nodes, count_ptr, covered_ptr, leader_ptr, matched_ptr, place_ptr, size_ptr, wanted_ptr, next_page_ptr,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, num_requests,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, INDPTR: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """Request ``program_id(0)``: whether its part has become a node, the node's row, and its next page. ``count_ptr``: nodes
    of the levels before; the level's sum goes behind it."""
    request = tl.program_id(0)
    leader = tl.load(leader_ptr + request)
    leader_place = tl.load(place_ptr + leader)
    before = tl.load(count_ptr)
    node = before
    total = before
    for first in range(0, num_requests, REQUESTS):
        other = first + tl.arange(0, REQUESTS)
        inside = other < num_requests
        wanted = tl.load(wanted_ptr + other, mask=inside, other=0)
        place = tl.load(place_ptr + other, mask=inside, other=0)
        node += tl.sum(tl.where(place < leader_place, wanted, 0), 0)
        total += tl.sum(wanted, 0)
    if request == 0:
        tl.store(count_ptr + 1, tl.minimum(total, num_nodes))
    matched = tl.load(matched_ptr + request)
    if (tl.load(wanted_ptr + leader) > 0) & (node < num_nodes):
        end = matched * PAGE_SIZE
        if leader == request:
            row = nodes_ptr + node * 4
            tl.store(row, leader_place)
            tl.store(row + 1, leader_place + tl.load(size_ptr + request))
            tl.store(row + 2, tl.load(covered_ptr + request))
            tl.store(row + 3, end)
        tl.store(covered_ptr + request, end)
    entries = entries_of(request, table_ptr, table_row_ptr, table_indptr_ptr, table_stride, ROWS, INDPTR)
    limit = pages_before(request, q_indptr_ptr, kv_lens_ptr, PAGE_SIZE)
    tl.store(next_page_ptr + request, page_at(entries, matched, limit))


def find_shared_prefixes(
    batch: Batch, page_size: int, max_depth: int, min_saved_tokens: int, nodes: Tensor, out_order: Tensor
) -> None:
    """The ``FindSharedPrefixes`` protocol."""
    table, size, num_nodes = batch.table, batch.size, nodes.shape[0]
    assert table is not None
    state = torch.empty((len(_ARRAYS) + 2, size), dtype=torch.int32, device=table.device)
    counts = torch.empty(max_depth + 1, dtype=torch.int32, device=table.device)
    (
        group,
        matched,
        covered,
        next_page,
        place,
        order,
        leader,
        length,
        new_place,
        part_size,
        wanted,
        new_order,
        new_matched,
    ) = state
    indptr = batch.table_indptr
    lengths = (batch.q_indptr, batch.kv_lens)
    addressing = (
        table,
        counts if batch.table_row is None else batch.table_row,
        counts if indptr is None else indptr,
        0 if indptr is not None else table.stride(0),
    )
    rows, by_indptr = batch.table_row is not None, indptr is not None
    options: dict[str, Any] = {"REQUESTS": _REQUESTS_AT_ONCE, "num_warps": 4}
    with on_device(table.device):
        begin_kernel[(max(size, num_nodes, max_depth + 1),)](
            state, counts, nodes, num_nodes, *lengths, *addressing, size, page_size, rows, by_indptr, max_depth,
            num_warps=1,
        )  # fmt: skip
        for level in range(max_depth if size else 0):
            leader_kernel[(size,)](
                group, matched, next_page, place, order, leader, length, *lengths, *addressing, size,
                page_size, rows, by_indptr, ENTRIES=_ENTRIES_AT_ONCE, **options,
            )  # fmt: skip
            part_kernel[(size,)](
                matched, covered, place, order, leader, length, new_matched, new_place, new_order, part_size, wanted,
                size, min_saved_tokens, page_size, **options,
            )  # fmt: skip
            place, new_place, order, new_order, matched, new_matched = (
                new_place, place, new_order, order, new_matched, matched
            )  # fmt: skip
            node_kernel[(size,)](
                nodes, num_nodes, counts[level:], covered, leader, matched, place, part_size, wanted, next_page,
                *lengths, *addressing, size, page_size, rows, by_indptr, **options,
            )  # fmt: skip
            group, leader = leader, group
        out_order.copy_(order)


def load_kernel() -> object:
    """What the kernel entry loads."""
    return find_shared_prefixes
