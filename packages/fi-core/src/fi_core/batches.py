"""Checks of a batch: shapes, dtypes and devices always; values only where they are already on the host."""

from __future__ import annotations

import torch

from .errors import ArgumentError, CapacityError
from .prefixes import check_form, check_values
from .records import AttentionSpec, Batch, Capacity


def _vector(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int | None) -> None:
    shape = "[n]" if size is None else f"[{size}]"
    if tensor.dtype != dtype or tensor.dim() != 1 or (size is not None and tensor.shape[0] != size):
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise ArgumentError(f"batch.{name}", f"{dtype} {shape}", actual)
    if tensor.stride(0) != 1 and tensor.shape[0] > 1:
        raise ArgumentError(f"batch.{name}", "a contiguous tensor", f"stride {tensor.stride(0)}")


def _absent(batch: Batch, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(batch, name) is not None:
            raise ArgumentError(f"batch.{name}", f"None {why}", "a tensor")


def check_batch(batch: Batch) -> None:
    """Raise ArgumentError unless the batch's tensors agree with each other; reads metadata only."""
    for name, tensor in batch_tensors(batch):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"batch.{name}", "a tensor", type(tensor).__name__)
    size = batch.kv_lens.shape[0] if batch.kv_lens.dim() == 1 else -1
    if size < 0:
        raise ArgumentError("batch.kv_lens", "int32 [B]", f"{batch.kv_lens.dtype} {list(batch.kv_lens.shape)}")
    _vector("kv_lens", batch.kv_lens, torch.int32, size)
    _vector("q_indptr", batch.q_indptr, torch.int32, size + 1)
    table = batch.table
    if table is None:
        _absent(batch, ("table_row", "table_indptr"), "without a table")
        if batch.kv_indptr is not None:
            _vector("kv_indptr", batch.kv_indptr, torch.int32, size + 1)
        elif batch.slot_mapping is None:
            raise ArgumentError("batch", "one of table, kv_indptr and slot_mapping", "none of them")
    else:
        _absent(batch, ("kv_indptr",), "with a table")
        _check_table(batch, table, size)
    if batch.slot_mapping is not None:
        _vector("slot_mapping", batch.slot_mapping, torch.int64, None)
    if batch.mask is not None:
        _check_mask(batch, size)
    if batch.levels is not None:
        check_form(batch.levels, size)
    for name, tensor in batch_tensors(batch):
        if tensor.device != batch.kv_lens.device:
            raise ArgumentError(f"batch.{name}", f"a tensor on {batch.kv_lens.device} like kv_lens", tensor.device)


def _check_table(batch: Batch, table: torch.Tensor, size: int) -> None:
    if batch.table_indptr is not None:
        _absent(batch, ("table_row",), "with table_indptr")
        _vector("table", table, torch.int32, None)
        _vector("table_indptr", batch.table_indptr, torch.int32, size + 1)
        return
    if table.dtype != torch.int32 or table.dim() != 2:
        raise ArgumentError("batch.table", "int32 [rows, entries]", f"{table.dtype} {list(table.shape)}")
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ArgumentError("batch.table", "a contiguous last dim", f"strides {table.stride()}")
    if batch.table_row is not None:
        _vector("table_row", batch.table_row, torch.int32, size)
        if size and not table.shape[0]:
            raise ArgumentError("batch.table", "at least a row, which table_row picks", "0 rows")
    elif table.shape[0] < size:
        raise ArgumentError("batch.table", f"at least {size} rows (no table_row)", f"{table.shape[0]} rows")


def _check_mask(batch: Batch, size: int) -> None:
    assert batch.mask is not None
    _vector("mask.bits", batch.mask.bits, torch.uint8, None)
    _vector("mask.indptr", batch.mask.indptr, torch.int64, size + 1)
    if batch.mask.columns not in ("kv", "new"):
        raise ArgumentError("batch.mask.columns", "'kv' or 'new'", batch.mask.columns)


def batch_tensors(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    """The batch's tensors with their names."""
    names = ("q_indptr", "kv_lens", "table", "table_row", "table_indptr", "kv_indptr", "slot_mapping")
    found = [(name, getattr(batch, name)) for name in names if getattr(batch, name) is not None]
    if batch.mask is not None:
        found += [("mask.bits", batch.mask.bits), ("mask.indptr", batch.mask.indptr)]
    if batch.levels is not None:
        found += batch.levels.tensors()
    return found


def check_planned(batch: Batch, spec: AttentionSpec, capacity: Capacity, device: torch.device) -> None:
    """Raise unless ``batch`` is what a plan of ``spec`` and ``capacity`` on ``device`` serves.

    ArgumentError for a wrong form, CapacityError (naming the capacity) for too much of it. Lengths are compared only
    when they are on the CPU.
    """
    check_batch(batch)
    if batch.table_form != spec.table:
        raise ArgumentError("batch.table", f"the spec's form, {spec.table!r}", batch.table_form)
    if spec.table == "ragged" and batch.kv_indptr is None:
        raise ArgumentError("batch.kv_indptr", "int32 [B + 1] (table='ragged')", None)
    if (batch.mask is not None) != ("mask" in spec.features):
        raise ArgumentError("batch.mask", "a mask exactly when spec.features has 'mask'", batch.mask is not None)
    if batch.size > capacity.max_batch:
        raise CapacityError("batch.kv_lens", f"at most max_batch={capacity.max_batch} requests", batch.size)
    if batch.levels is not None:
        if batch.mask is not None and batch.mask.columns != "new":
            expected = "'new' with levels: all who share a prefix see all of it"
            raise ArgumentError("batch.mask.columns", expected, batch.mask.columns)
        if capacity.max_prefixes == 0:
            raise ArgumentError("batch.levels", "None (the plan's max_prefixes is 0)", "shared prefixes")
        if batch.levels.nodes.shape[0] > capacity.max_prefixes:
            expected = f"at most max_prefixes={capacity.max_prefixes} rows"
            raise CapacityError("batch.levels.nodes", expected, batch.levels.nodes.shape[0])
    if batch.kv_lens.device.type == "cpu":
        check_lengths(batch, spec.page_size, capacity)
    if batch.kv_lens.device not in (device, torch.device("cpu")):
        raise ArgumentError("batch", f"tensors on the plan's device {device} or on the CPU", batch.kv_lens.device)


def check_lengths(batch: Batch, page_size: int | None, capacity: Capacity | None) -> None:
    """Compare a CPU batch's lengths with each other, with its table and with ``capacity``."""
    indptr = _checked_indptr("q_indptr", batch.q_indptr)
    kv_lens = batch.kv_lens.tolist()
    held = _tokens_held(batch, page_size)
    for request, kv_len in enumerate(kv_lens):
        if kv_len < 0:
            raise ArgumentError("batch.kv_lens", "no negative length", f"{kv_len} at request {request}")
        if held is not None and kv_len > held[request]:
            expected = f"at most {held[request]} tokens, what request {request}'s table holds"
            raise CapacityError("batch.kv_lens", expected, kv_len)
    if batch.levels is not None:
        limits = [kv_len - (stop - start) for kv_len, start, stop in zip(kv_lens, indptr, indptr[1:], strict=False)]
        check_values(batch.levels, limits, None if capacity is None else capacity.max_prefix_depth)
    if capacity is None:
        return
    longest_q = max((stop - start for start, stop in zip(indptr, indptr[1:], strict=False)), default=0)
    for name, argument, actual in (
        ("max_q_tokens", "q_indptr", indptr[-1]),
        ("max_q_len", "q_indptr", longest_q),
        ("max_kv_len", "kv_lens", max(kv_lens, default=0)),
    ):
        limit = getattr(capacity, name)
        if actual > limit:
            raise CapacityError(f"batch.{argument}", f"at most {name}={limit}", actual)


def _checked_indptr(name: str, tensor: torch.Tensor) -> list[int]:
    indptr: list[int] = tensor.tolist()
    if indptr[0] < 0 or (name == "q_indptr" and indptr[0] != 0):
        raise ArgumentError(f"batch.{name}", "a first element of 0", indptr[0])
    for request, (start, stop) in enumerate(zip(indptr, indptr[1:], strict=False)):
        if stop < start:
            raise ArgumentError(f"batch.{name}", "ascending values", f"{start}, {stop} at request {request}")
    return indptr


def _tokens_held(batch: Batch, page_size: int | None) -> list[int] | None:
    """KV tokens that each request's table entries (or ragged rows) have room for; None: not bounded by the batch."""
    size = batch.size
    if batch.table is None:
        if batch.kv_indptr is None:
            return None
        indptr = _checked_indptr("kv_indptr", batch.kv_indptr)
        return [indptr[request + 1] - indptr[request] for request in range(size)]
    if page_size is None:
        raise ArgumentError("batch.table", "None with ragged K and V", "a table")
    if batch.table_indptr is None:
        return [batch.table.shape[1] * page_size] * size
    indptr = _checked_indptr("table_indptr", batch.table_indptr)
    if indptr[-1] > batch.table.shape[0]:
        raise ArgumentError("batch.table_indptr", f"at most {batch.table.shape[0]}, the table's entries", indptr[-1])
    return [(indptr[request + 1] - indptr[request]) * page_size for request in range(size)]
