"""Where a batch's tokens lie: the one translation from (request, position) to a page and a token in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Batch


def locate(batch: Batch, request: Tensor, position: Tensor, page_size: int | None) -> tuple[Tensor, Tensor]:
    """(block, offset) int64 of each ``position`` of ``request`` (int64, broadcast together, on the result's device).

    Paged: page id and token in the page; ragged: row and 0. Positions must be within the request.
    """

    def at(tensor: Tensor, *index: Tensor) -> Tensor:
        return tensor.to(position.device)[index].long()

    if batch.table is None or page_size is None:
        assert batch.kv_indptr is not None
        row = at(batch.kv_indptr, request) + position
        return row, torch.zeros_like(row)
    entry = torch.div(position, page_size, rounding_mode="floor")
    if batch.table_indptr is None:
        row = request if batch.table_row is None else at(batch.table_row, request)
        if batch.table_row is not None and row.device.type == "cpu" and (row < 0).any():
            # As an index it would count from the end.
            raise IndexError("a table row is negative")
        page = at(batch.table, row, entry)
    else:
        page = at(batch.table, at(batch.table_indptr, request) + entry)
    return page, position % page_size


def token_positions(batch: Batch, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, request, position) int64 of every row of q below q_indptr[B] that a request owns, on the batch's device.

    Position is kv_len - q_len + i, which is negative when q_len exceeds kv_len. Synchronises on a GPU: the
    number of rows is data.
    """
    indptr = batch.q_indptr.long()
    q_lens = indptr[1:] - indptr[:-1]
    request = torch.repeat_interleave(torch.arange(batch.size, device=indptr.device), q_lens)
    row = torch.arange(request.shape[0], device=indptr.device)
    position = row - indptr[1:][request] + batch.kv_lens.long()[request]
    keep = row < num_rows
    return row[keep], request[keep], position[keep]
