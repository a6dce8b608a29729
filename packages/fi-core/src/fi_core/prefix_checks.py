"""Checked mode's part for shared prefixes: nodes, order, and whether members' tables agree, compared on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .records import Batch, Capacity

if TYPE_CHECKING:
    from .checks import Record


def check_levels(record: Record, batch: Batch, page_size: int | None, capacity: Capacity) -> None:
    """Note the first way in which ``batch.levels`` is not what SharedPrefixes says."""
    levels, size = batch.levels, batch.size
    if levels is None or size == 0:
        return
    device = batch.kv_lens.device
    order = torch.arange(size, device=device) if levels.order is None else levels.order.long()
    record.note("batch.levels.order", (order < 0) | (order >= size), order, size - 1)
    order = order.clamp(0, size - 1)
    times = torch.zeros_like(order).scatter_add(0, order, torch.ones_like(order))
    record.note("batch.levels.order twice", times[order] > 1, order, 1)
    if levels.nodes.shape[0] == 0:
        return
    nodes = levels.nodes.long()
    begin, end, kv_begin, kv_end = nodes.unbind(1)
    least = torch.stack([torch.zeros_like(begin), begin, torch.zeros_like(begin), kv_begin], dim=1)
    most = torch.full_like(least, torch.iinfo(torch.int32).max)
    most[:, :2] = size
    record.note("batch.levels.nodes", (nodes < least) | (nodes > most), nodes, torch.where(nodes < least, least, most))
    real = (begin < end) & (kv_begin < kv_end)
    _check_forest(record, nodes, real)
    place = torch.arange(size, device=device)
    inside = real[:, None] & (place >= begin[:, None]) & (place < end[:, None])
    own = (batch.kv_lens - (batch.q_indptr[1:] - batch.q_indptr[:-1])).long()[order]
    room = torch.where(inside, own, torch.iinfo(torch.int32).max).amin(dim=1)
    record.note("batch.levels.nodes", real & (kv_end > room), kv_end, room)
    depth = inside.sum(dim=0)
    record.note("depth of batch.levels.nodes", depth > capacity.max_prefix_depth, depth, capacity.max_prefix_depth)
    shared = torch.where(inside[:, :-1] & inside[:, 1:], kv_end[:, None], 0).amax(dim=0)
    if page_size is not None and size > 1:
        _check_tables(record, batch, order, shared // page_size)


def _check_forest(record: Record, nodes: Tensor, real: Tensor) -> None:
    """Members nested or apart, and each KV range where the one around it ends."""
    begin, end, kv_begin, kv_end = nodes.unbind(1)
    earlier = torch.ones(len(nodes), len(nodes), dtype=torch.bool, device=nodes.device).tril(-1)
    earlier = earlier & real[:, None] & real[None, :]  # [row, earlier row]
    overlap = earlier & (begin[:, None] < end[None, :]) & (begin[None, :] < end[:, None])
    within = overlap & (begin[:, None] >= begin[None, :]) & (end[:, None] <= end[None, :])
    record.note("members of batch.levels.nodes", (overlap & ~within).any(dim=1), end, 0)
    around = torch.where(within, kv_end[None, :], 0).amax(dim=1)
    record.note("kv_begin of batch.levels.nodes", real & (kv_begin != around), kv_begin, around)


def _check_tables(record: Record, batch: Batch, order: Tensor, num_pages: Tensor) -> None:
    """Whether neighbours in ``order`` agree in their first ``num_pages`` int64 [B - 1] pages; all members of a node then do."""
    table, indptr = batch.table, batch.table_indptr
    assert table is not None
    follower = torch.zeros_like(order).scatter(0, order[:-1], order[1:])
    count = torch.zeros_like(order).scatter(0, order[:-1], num_pages)
    if indptr is None:
        rows = torch.arange(batch.size, device=table.device) if batch.table_row is None else batch.table_row.long()
        pages = table[rows.clamp(0, table.shape[0] - 1)]
        entry = torch.arange(table.shape[1], device=table.device)
        differs = (entry < count[:, None]) & (pages != pages[follower])
        record.note("batch.table of two members", differs, pages, pages[follower])
    else:
        entry = torch.arange(table.shape[0], device=table.device)
        request = torch.searchsorted(indptr[1:].long(), entry, right=True).clamp(max=batch.size - 1)
        place = entry - indptr[request]
        other = table[(indptr[follower[request]].long() + place).clamp(0, max(0, table.shape[0] - 1))]
        differs = (place < count[request]) & (table != other)
        record.note("batch.table of two members", differs, table, other)
