"""Find the prefixes that requests share from equal leading entries of their tables: the contract and the public function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..batches import check_batch
from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..prefixes import SharedPrefixes
from ..records import Batch
from ..settings import settings
from .arguments import call_checked, check_like, check_writable


def _cases() -> Iterator[Case]:
    from .cases.find_shared_prefixes import cases

    return cases()


OPERATION = Operation(
    name="find_shared_prefixes",
    summary="the levels of a batch from equal leading entries of its table",
    fields={"table": "'dense' or 'indptr'", "max_depth": "most levels around one request"},
    typical={"table": "dense", "max_depth": 2},
    cases=_cases,
)

_dispatch = Dispatcher("find_shared_prefixes", "table", "max_depth")


def find_shared_prefixes(
    batch: Batch,
    page_size: int,
    *,
    max_prefixes: int = 64,
    max_depth: int = 2,
    min_saved_tokens: int = 2048,
    out: SharedPrefixes | None = None,
) -> SharedPrefixes:
    """The prefixes that requests of ``batch`` share, for ``Batch.levels``; for engines that know tables and no prefix tree.

    Two requests share the pages in which their tables' leading entries agree, as far as these lie before both requests' new
    tokens. At each of ``max_depth`` levels (1 to 8) a group of requests splits by its next page, and each part shares as much as
    all of it agrees in; it becomes a node if reading that once saves ``min_saved_tokens`` or more: tokens times members but one
    (the default saves 8 MiB with 8 KV heads of 128 dims in bfloat16; see ``fi_scheduler.sharing`` for what pays where). What
    is too little for a node is left to the nodes within it. Groups are found at most ``max_depth`` branchings deep.

    ``out`` has ``nodes`` int32 [N, 4] (new: N = ``max_prefixes``) and ``order`` int32 [B], contiguous and on the batch's
    device; the rows behind the nodes found are 0, and nodes that would be more than N are left out. Stream-ordered, no
    synchronisation, legal in CUDA-graph capture. The batch has a table of pages of ``page_size`` tokens. Raises
    ArgumentError.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_batch(batch)
    table = batch.table
    if table is None:
        raise ArgumentError("batch.table", "a table of pages", "ragged K and V")
    for name, value, most in (
        ("page_size", page_size, 256),
        ("max_depth", max_depth, 8),
        ("max_prefixes", max_prefixes, None),
        ("min_saved_tokens", min_saved_tokens, None),
    ):
        if not isinstance(value, int) or value < 1 or (most is not None and value > most):
            raise ArgumentError(name, "a positive int" if most is None else f"an int from 1 to {most}", value)
    out = _output(out, batch, max_prefixes)
    numbers = (page_size, max_depth, min_saved_tokens)
    if compiling:
        indptr = (batch.q_indptr, batch.kv_lens, table, batch.table_row, batch.table_indptr)
        _OP(*indptr, *numbers, out.nodes, out.order)
        return out
    if settings().check:
        _check_indices(batch, table, page_size)
    kernel = _dispatch(table.device, batch.table_form, max_depth)
    call_checked(kernel, (batch, *numbers, out.nodes, out.order), lambda: _check_indices(batch, table, page_size))
    return out


def _check_indices(batch: Batch, table: Tensor, page_size: int) -> None:
    from .. import checks

    checks.check_tables(batch, table, page_size)


def _output(out: SharedPrefixes | None, batch: Batch, max_prefixes: int) -> SharedPrefixes:
    lens = batch.kv_lens
    if out is None:
        nodes = torch.empty((max_prefixes, 4), dtype=torch.int32, device=lens.device)
        return SharedPrefixes(nodes, torch.empty_like(lens))
    if out.order is None:
        raise ArgumentError("out.order", "a tensor: members of a group need not be neighbours", None)
    if out.nodes.dim() != 2:
        raise ArgumentError("out.nodes", "int32 [N, 4]", list(out.nodes.shape))
    check_like("out.nodes", out.nodes, lens, (out.nodes.shape[0], 4))
    check_like("out.order", out.order, lens, (lens.shape[0],))
    for name, tensor in (("out.nodes", out.nodes), ("out.order", out.order)):
        check_writable(name, tensor)
        if not tensor.is_contiguous():
            raise ArgumentError(name, "a contiguous tensor", f"strides {tensor.stride()}")
    return out


def _run(*flat: Any) -> None:
    """The operator's arguments, in the order of its schema."""
    q_indptr, kv_lens, table, table_row, table_indptr, page_size, max_depth, min_saved_tokens, nodes, order = flat
    batch = Batch(q_indptr, kv_lens, table, table_row, table_indptr)
    out = SharedPrefixes(nodes, order)
    find_shared_prefixes(batch, page_size, max_depth=max_depth, min_saved_tokens=min_saved_tokens, out=out)


_OP = library.register(
    "find_shared_prefixes(Tensor q_indptr, Tensor kv_lens, Tensor table, Tensor? table_row, Tensor? table_indptr, "
    "SymInt page_size, SymInt max_depth, SymInt min_saved_tokens, Tensor(a!) nodes, Tensor(b!) order) -> ()",
    _run,
)


def find_shared_prefixes_cost(num_requests: int, num_entries: int) -> Cost:
    """Fewest bytes: the ``num_entries`` table entries before the new tokens, read once, and order and lengths."""
    return Cost(4 * (num_entries + 3 * num_requests), 0)
