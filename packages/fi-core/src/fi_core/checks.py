"""Checked mode (FI_CHECK=1): indices from the user are validated on their device, by torch operations alone.

On a CPU a bad index raises at once. On a GPU it is written to a sticky record, without synchronisation and also inside
CUDA graphs; every checked call copies the record to pinned host memory, and the next one raises what has arrived there.
``raise_pending`` after a synchronisation leaves nothing unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .devices import normal_device
from .errors import IndexCheckError
from .prefix_checks import check_levels
from .records import Batch, KVCache, PackedMask
from .rope import RopeTable
from .sampling import PenaltyParams

if TYPE_CHECKING:
    from .plan import Plan

_ARGUMENTS = (
    "none",
    "batch.q_indptr",
    "batch.kv_lens",
    "batch.table",
    "batch.table_row",
    "batch.table_indptr",
    "batch.kv_indptr",
    "batch.slot_mapping",
    "positions",
    "batch.mask.indptr",
    "rows",
    "slots",
    "penalties.rows",
    "penalties.bias_indptr",
    "source_pages",
    "target_pages",
    "target_pages of two pairs",
    "source_pages of one pair, target_pages of another",
    "batch.levels.order",
    "batch.levels.order twice",
    "batch.levels.nodes",
    "members of batch.levels.nodes",
    "kv_begin of batch.levels.nodes",
    "depth of batch.levels.nodes",
    "batch.table of two members",
)

_LIMIT = "{value} is outside its limit {limit}"
_CLASHES = {
    "target_pages of two pairs": ("target_pages", "page {value} is the target of another pair too"),
    "source_pages of one pair, target_pages of another": (
        "source_pages",
        "page {value} is the target of another pair of the same cache",
    ),
    "batch.levels.order twice": ("batch.levels.order", "request {value} stands there twice"),
    "members of batch.levels.nodes": (
        "batch.levels.nodes",
        "members up to {value} are neither within those of an earlier node nor apart from them",
    ),
    "kv_begin of batch.levels.nodes": (
        "batch.levels.nodes",
        "kv_begin is {value}, but the nodes around it end at {limit}",
    ),
    "depth of batch.levels.nodes": ("batch.levels.nodes", "{value} nodes around a request, more than {limit}"),
    "batch.table of two members": (
        "batch.table",
        "page {value} of what this request shares with the next in levels.order, which has page {limit}",
    ),
}
"""What is said of a bad element that is within its limit: the argument's name and the text."""


class Record:
    """The first bad element seen on a device: int64 (argument, row, column or -1, value, limit); argument 0: none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found = torch.zeros(5, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self.host = torch.zeros(5, dtype=torch.int64, pin_memory=pinned) if pinned else self.found

    def note(self, argument: str, bad: Tensor, values: Tensor, limit: Tensor | int) -> None:
        """Record the first element of ``values`` (1 or 2 dims) where ``bad`` holds, unless one is recorded already."""
        if values.numel() == 0:
            return
        count = values.numel()
        positions = torch.arange(count, device=self.device)
        first = torch.where(bad.reshape(-1), positions, count).min()
        index = first.clamp(max=count - 1).view(1)
        columns = values.shape[1] if values.dim() == 2 else 1
        column = index % columns if values.dim() == 2 else torch.full_like(index, -1)
        bound = limit.reshape(-1)[index].long() if isinstance(limit, Tensor) else torch.full_like(index, limit)
        code = torch.full_like(index, _ARGUMENTS.index(argument))
        new = torch.cat([code, index // columns, column, values.reshape(-1)[index].long(), bound])
        self.found.copy_(torch.where((self.found[0] == 0) & (first < count), new, self.found))

    def publish(self) -> None:
        """Send the record to the host; raise at once on a CPU."""
        if self.host is self.found:
            self.raise_found()
        else:
            self.host.copy_(self.found, non_blocking=True)

    def raise_found(self) -> None:
        code, row, column, value, limit = self.host.tolist()
        if code == 0:
            return
        if self.device.type == "cuda":
            # Copies in flight would bring this finding to the host a second time.
            torch.cuda.synchronize(self.device)
        self.found.zero_()
        self.host.zero_()
        place = f"[{row}]" if column < 0 else f"[{row}, {column}]"
        argument, problem = _CLASHES.get(_ARGUMENTS[code], (_ARGUMENTS[code], _LIMIT))
        raise IndexCheckError(f"{argument}{place}: {problem.format(value=value, limit=limit)}")


_records: dict[torch.device, Record] = {}


def _record(device: torch.device) -> Record:
    found = _records.get(device)
    if found is None:
        found = _records[device] = Record(device)
    return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def prepare(device: torch.device) -> None:
    """Allocate what checks on ``device`` need, which a CUDA graph's capture could not."""
    _record(device)


def reset() -> None:
    """Forget every record, for tests."""
    _records.clear()


def raise_pending(device: torch.device | str) -> None:
    """Raise IndexCheckError naming argument, index, value and limit of the first bad element reported on ``device`` (one
    with an index, as tensors have it), and forget it. Does not wait for work in flight: synchronise before to see all."""
    found = _records.get(normal_device(device))
    if found is not None:
        found.raise_found()


def check_attention(plan: Plan, q: Tensor, kv: KVCache) -> None:
    """Check the plan's batch against the plan's capacities, ``q`` and ``kv``. Values are compared on the batch's device."""
    batch = plan.batch
    assert batch is not None
    record = _begin(batch.kv_lens.device)
    capacity, window = plan.capacity, None
    if None not in plan.spec.windows:
        window = max(item for item in plan.spec.windows if item is not None)
    _check_indptr(record, "batch.q_indptr", batch.q_indptr, min(q.shape[0], capacity.max_q_tokens))
    q_lens = batch.q_indptr[1:] - batch.q_indptr[:-1]
    record.note("batch.q_indptr", q_lens > capacity.max_q_len, q_lens, capacity.max_q_len)
    _check_lengths(record, batch, kv, capacity.max_kv_len)
    first = batch.kv_lens * 0 if window is None else (batch.kv_lens - q_lens - window + 1).clamp(min=0)
    _check_pages(record, batch, kv, first)
    if batch.mask is not None:
        _check_mask(record, batch, batch.mask, q_lens)
    check_levels(record, batch, kv.page_size, capacity)
    record.publish()


def check_tables(batch: Batch, table: Tensor, page_size: int) -> None:
    """Check lengths and rows of a batch against its table, whatever the pages are."""
    record = _begin(batch.kv_lens.device)
    _check_indptr(record, "batch.q_indptr", batch.q_indptr, torch.iinfo(torch.int32).max)
    record.note("batch.kv_lens", batch.kv_lens < 0, batch.kv_lens, 0)
    held = _held_by_tables(record, batch, table, page_size)
    record.note("batch.kv_lens", batch.kv_lens > held, batch.kv_lens, held)
    rows = batch.table_row
    if rows is not None:
        record.note("batch.table_row", (rows < 0) | (rows >= table.shape[0]), rows, table.shape[0] - 1)
    record.publish()


def check_append(k: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None) -> None:
    """Check ``batch`` against ``kv``, the rows of ``k`` and the length of RoPE's table."""
    record = _begin(batch.kv_lens.device)
    _check_indptr(record, "batch.q_indptr", batch.q_indptr, k.shape[0])
    if rope is not None and rope.cos_sin is not None:
        limit = rope.cos_sin.shape[0]
        record.note("batch.kv_lens", batch.kv_lens > limit, batch.kv_lens, limit)
    if batch.slot_mapping is not None:
        limit = kv.k.shape[0] * (kv.page_size or 1) if kv.is_paged else kv.as_nhd()[0].shape[0]
        used = torch.arange(k.shape[0], device=k.device) < batch.q_indptr[-1]
        record.note("batch.slot_mapping", used & (batch.slot_mapping >= limit), batch.slot_mapping, limit - 1)
    else:
        _check_lengths(record, batch, kv, None)
        written = batch.kv_lens - (batch.q_indptr[1:] - batch.q_indptr[:-1])
        _check_pages(record, batch, kv, written.clamp(min=0))
    record.publish()


def check_copy(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    """Check the ids of the pairs that are copied against the caches' pages, and that no target is used twice. Caches
    whose K or V begin at one address are one cache."""
    record = _begin(source_pages.device)
    used = (source_pages >= 0) & (target_pages >= 0)
    for name, pages, kv in (("source_pages", source_pages, source), ("target_pages", target_pages, target)):
        limit = kv.k.shape[0] - 1
        record.note(name, used & (pages > limit), pages, limit)
    if used.numel() > 0:
        # Skipped pairs get ids below 0, of which no two are equal.
        ids = torch.where(used, target_pages, -1 - torch.arange(used.shape[0], device=used.device)).long()
        ordered, order = ids.sort(stable=True)
        again = torch.zeros_like(used).scatter(0, order[1:], ordered[1:] == ordered[:-1])
        record.note("target_pages of two pairs", again, target_pages, 0)
        if source.k.data_ptr() == target.k.data_ptr() or source.v.data_ptr() == target.v.data_ptr():
            place = torch.searchsorted(ordered, source_pages.long()).clamp(max=used.shape[0] - 1)
            overwritten = used & (source_pages != target_pages) & (ordered[place] == source_pages)
            record.note("source_pages of one pair, target_pages of another", overwritten, source_pages, 0)
    record.publish()


def check_rope(positions: Tensor, table: RopeTable) -> None:
    """Check that no position is negative or beyond the table's length (if it has one)."""
    record = _begin(positions.device)
    record.note("positions", positions < 0, positions, 0)
    if table.cos_sin is not None:
        limit = table.cos_sin.shape[0] - 1
        record.note("positions", positions > limit, positions, limit)
    record.publish()


def check_rows(argument: str, rows: Tensor, num_rows: int) -> None:
    """Check that ``rows`` (the argument of that name) are from 0 to ``num_rows`` - 1."""
    record = _begin(rows.device)
    record.note(argument, (rows < 0) | (rows >= num_rows), rows, num_rows - 1)
    record.publish()


def check_slots(slots: Tensor, num_rows: int) -> None:
    """Check that ``slots`` are below ``num_rows``; those below 0 name no row."""
    record = _begin(slots.device)
    record.note("slots", slots >= num_rows, slots, num_rows - 1)
    record.publish()


def check_penalties(penalties: PenaltyParams, slots: Tensor | None) -> None:
    """Check where each row's parameters, bias entries and histories lie."""
    if penalties.bias_indptr is not None and penalties.bias_tokens is not None:
        record = _begin(penalties.bias_indptr.device)
        _check_indptr(record, "penalties.bias_indptr", penalties.bias_indptr, penalties.bias_tokens.shape[0])
        record.publish()
    columns = [penalties.allowed, penalties.repetition, penalties.frequency, penalties.presence]
    sizes = [column.shape[0] for column in columns if column is not None]
    if penalties.bias_indptr is not None:
        sizes.append(penalties.bias_indptr.shape[0] - 1)
    if slots is not None and sizes:
        check_slots(slots, min(sizes))
    histories = [penalties.prompt_counts, penalties.output_counts]
    histories += [None if penalties.history is None else penalties.history.num_entries]
    for held in histories:
        if held is not None and penalties.rows is not None:
            check_rows("penalties.rows", penalties.rows, held.shape[0])
        elif held is not None and slots is not None:
            check_slots(slots, held.shape[0])


def _begin(device: torch.device) -> Record:
    record = _record(device)
    if not _capturing(device):
        record.raise_found()
    return record


def _check_indptr(record: Record, name: str, indptr: Tensor, limit: int) -> None:
    """From 0 or more, ascending, up to ``limit``."""
    before = torch.cat([indptr.new_zeros(1), indptr[:-1]])
    record.note(name, indptr < before, indptr, before)
    record.note(name, indptr > limit, indptr, limit)
    if name == "batch.q_indptr":
        record.note(name, indptr[:1] != 0, indptr[:1], 0)


def _check_lengths(record: Record, batch: Batch, kv: KVCache, max_kv_len: int | None) -> None:
    kv_lens, page_size = batch.kv_lens, kv.page_size or 1
    record.note("batch.kv_lens", kv_lens < 0, kv_lens, 0)
    if max_kv_len is not None:
        record.note("batch.kv_lens", kv_lens > max_kv_len, kv_lens, max_kv_len)
    if batch.table is not None:
        held = _held_by_tables(record, batch, batch.table, page_size)
    elif batch.kv_indptr is not None:
        _check_indptr(record, "batch.kv_indptr", batch.kv_indptr, kv.as_nhd()[0].shape[0])
        held = batch.kv_indptr[1:] - batch.kv_indptr[:-1]
    else:
        return
    record.note("batch.kv_lens", kv_lens > held, kv_lens, held)


def _held_by_tables(record: Record, batch: Batch, table: Tensor, page_size: int) -> Tensor:
    """Tokens that each request's table entries have room for."""
    if batch.table_indptr is None:
        return torch.full_like(batch.kv_lens, table.shape[1] * page_size, dtype=torch.int64)
    _check_indptr(record, "batch.table_indptr", batch.table_indptr, table.shape[0])
    return (batch.table_indptr[1:] - batch.table_indptr[:-1]).long() * page_size


def _check_mask(record: Record, batch: Batch, mask: PackedMask, q_lens: Tensor) -> None:
    """Whether each request's mask rows lie within the bits."""
    columns = batch.kv_lens if mask.columns == "kv" else q_lens
    num_bytes = q_lens.long() * ((columns.long() + 7) // 8)
    begin, limit = mask.indptr[:-1], mask.bits.shape[0] - num_bytes
    record.note("batch.mask.indptr", (num_bytes > 0) & ((begin < 0) | (begin > limit)), begin, limit)


def _check_pages(record: Record, batch: Batch, kv: KVCache, first: Tensor) -> None:
    """Page ids of the positions [first, kv_len) of each request."""
    table, page_size = batch.table, kv.page_size
    if table is None or page_size is None or batch.size == 0:
        return
    num_pages = kv.k.shape[0]
    begin, end = first // page_size, (batch.kv_lens + page_size - 1) // page_size
    if batch.table_indptr is None:
        rows = torch.arange(batch.size, device=table.device) if batch.table_row is None else batch.table_row.long()
        record.note("batch.table_row", (rows < 0) | (rows >= table.shape[0]), rows, table.shape[0] - 1)
        pages = table[rows.clamp(0, table.shape[0] - 1)]
        entry = torch.arange(table.shape[1], device=table.device)
        used = (entry >= begin[:, None]) & (entry < end[:, None])
    else:
        pages = table
        entry = torch.arange(table.shape[0], device=table.device)
        request = torch.searchsorted(batch.table_indptr[1:].long(), entry, right=True).clamp(max=batch.size - 1)
        place = entry - batch.table_indptr[request]
        used = (place >= begin[request]) & (place < end[request])
    record.note("batch.table", used & ((pages < 0) | (pages >= num_pages)), pages, num_pages - 1)
