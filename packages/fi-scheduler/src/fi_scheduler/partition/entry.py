"""The public entry of the work partition: argument checks and the choice between native module and stand-in."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from fi_core.errors import ArgumentError, CapacityError

from .. import build_native
from .records import INT32_MAX, MAX_TOTAL_COST, RECORD_WIDTH, Int32Array, PartitionParams, WorkList
from .vectorised import numpy_partition

_REBUILD = "run: python -m fi_scheduler.build_native"


@dataclass(frozen=True)
class Implementation:
    """Which code partitions: ``name`` is "native" or "numpy", ``reason`` says why, for a person."""

    name: str
    reason: str


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, Implementation]:
    try:
        module = importlib.import_module("fi_scheduler._partition")
    except ModuleNotFoundError:
        return None, Implementation("numpy", f"the native module is not built; {_REBUILD}")
    except ImportError as error:
        return None, Implementation("numpy", f"the native module does not load ({error}); {_REBUILD}")
    if module.SOURCE_DIGEST != build_native.source_digest():
        return None, Implementation("numpy", f"the native module was built from other sources; {_REBUILD}")
    return module, Implementation("native", f"built module {module.__file__}")


def implementation() -> Implementation:
    """The implementation that ``partition`` uses in this process."""
    return _load()[1]


def partition(
    q_indptr: Int32Array | torch.Tensor,
    kv_lens: Int32Array | torch.Tensor,
    params: PartitionParams,
    out: WorkList | None = None,
) -> WorkList:
    """Share the work of a batch equally among workers.

    ``q_indptr`` int32 [B + 1] (first element 0, ascending) and ``kv_lens`` int32 [B] (>= 0, new tokens included; may be
    smaller than q_len): contiguous numpy arrays or CPU tensors, B may be 0. Requests with q_len 0 have no work;
    requests with kv_len 0 keep their tiles, with an empty KV range, so that their output is written.

    Returns a work list; with ``out`` its arrays are views of the first rows of ``out``'s (``out.worker_indptr`` must
    have W + 1 elements), else they are new. Raises ArgumentError naming the first bad element, CapacityError when
    ``out`` is smaller than the batch may need (``PartitionBounds`` gives sizes that always do).
    """
    q_indptr, kv_lens = _as_array("q_indptr", q_indptr), _as_array("kv_lens", kv_lens)
    if q_indptr.size != kv_lens.size + 1:
        raise ArgumentError("q_indptr", f"{kv_lens.size + 1} elements (kv_lens has {kv_lens.size})", q_indptr.size)
    native, _ = _load()
    if native is not None:
        return _partition_native(native, q_indptr, kv_lens, params, out)
    check_lengths(q_indptr, kv_lens, params)
    result = numpy_partition(q_indptr, kv_lens, params)
    return result if out is None else _copy_into(out, params, result)


def _as_array(name: str, values: Int32Array | torch.Tensor) -> Int32Array:
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ArgumentError(name, "a CPU tensor", f"device {values.device}")
        values = values.numpy()
    if not isinstance(values, np.ndarray):
        raise ArgumentError(name, "a numpy array or a CPU tensor", type(values).__name__)
    if values.dtype != np.int32 or values.ndim != 1 or not values.flags.c_contiguous:
        layout = "contiguous" if values.flags.c_contiguous else "strided"
        raise ArgumentError(name, "contiguous int32 with one dim", f"{layout} {values.dtype} {values.shape}")
    return values


def _partition_native(
    native: ModuleType, q_indptr: Int32Array, kv_lens: Int32Array, params: PartitionParams, out: WorkList | None
) -> WorkList:
    packed = params.packed
    if out is None:
        valid, _, max_items, max_merges = native.measure(q_indptr, kv_lens, packed)
        if not valid:
            check_lengths(q_indptr, kv_lens, params)
        indptr = np.empty(params.num_workers + 1, dtype=np.int32)
        items = np.empty((max_items, RECORD_WIDTH), dtype=np.int32)
        out = WorkList(indptr, items, np.empty((max_merges, RECORD_WIDTH), dtype=np.int32))
    else:
        _check_out(out, params)
    written, num_items, num_merges = native.partition(
        q_indptr, kv_lens, packed, out.worker_indptr, out.items, out.merges
    )
    if not written:
        valid, _, max_items, max_merges = native.measure(q_indptr, kv_lens, packed)
        if not valid:
            check_lengths(q_indptr, kv_lens, params)
        _check_rows(out, max_items, max_merges)
    return WorkList(out.worker_indptr, out.items[:num_items], out.merges[:num_merges])


def _check_out(out: WorkList, params: PartitionParams) -> None:
    """Shapes and dtypes of the caller's buffers; the native module relies on them."""
    shapes = ((params.num_workers + 1,), (None, RECORD_WIDTH), (None, RECORD_WIDTH))
    for name, shape in zip(("worker_indptr", "items", "merges"), shapes, strict=True):
        array = getattr(out, name)
        fits = len(array.shape) == len(shape) and array.shape[-1] == shape[-1]
        if not (fits and array.dtype == np.int32 and array.flags.c_contiguous and array.flags.writeable):
            expected = f"writable contiguous int32 of shape {shape}"
            raise ArgumentError(f"out.{name}", expected, f"{array.dtype} {array.shape}")


def _check_rows(out: WorkList, num_items: int, num_merges: int) -> None:
    for name, rows in (("items", num_items), ("merges", num_merges)):
        if getattr(out, name).shape[0] < rows:
            raise CapacityError(f"out.{name}", f"at least {rows} rows", getattr(out, name).shape[0])


def _copy_into(out: WorkList, params: PartitionParams, result: WorkList) -> WorkList:
    _check_out(out, params)
    _check_rows(out, len(result.items), len(result.merges))
    out.worker_indptr[:] = result.worker_indptr
    out.items[: len(result.items)] = result.items
    out.merges[: len(result.merges)] = result.merges
    return WorkList(out.worker_indptr, out.items[: len(result.items)], out.merges[: len(result.merges)])


def check_lengths(q_indptr: Int32Array, kv_lens: Int32Array, params: PartitionParams) -> None:
    """Raise ArgumentError naming the first element that makes a batch illegal."""
    if q_indptr[0] != 0:
        raise ArgumentError("q_indptr[0]", "0", q_indptr[0])
    q_lens = np.diff(q_indptr.astype(np.int64))
    packed_rows = q_lens * params.group_size
    max_rows = params.kinds[-1].max_packed_rows
    for name, values, bad, expected in (
        ("q_indptr", q_indptr[1:], q_lens < 0, "ascending values"),
        ("kv_lens", kv_lens, kv_lens < 0, "a length >= 0"),
        ("q_indptr", q_indptr[1:], packed_rows > max_rows, f"at most {max_rows} packed rows a request (the last kind)"),
    ):
        if bad.any():
            index = int(np.argmax(bad))
            shown = f"{name}[{index + (name == 'q_indptr')}]"
            raise ArgumentError(shown, expected, values[index])
    limits = [kind.max_packed_rows for kind in params.kinds[:-1]]
    table = np.array([(k.q_rows, k.kv_tokens, k.item_cost, k.step_cost) for k in params.kinds], dtype=np.int64)
    q_rows, kv_tokens, item_cost, step_cost = table[np.searchsorted(limits, packed_rows)].T
    num_tiles = -(-packed_rows // q_rows)
    # As PartitionBounds counts them: tiles and two partial ones a worker, or the most pieces of every tile.
    pieces, partial = (params.max_splits, 0) if params.max_splits else (1, 2 * params.num_workers)
    num_pieces = int(num_tiles.sum()) * params.num_kv_heads * pieces + partial
    if num_pieces > INT32_MAX:
        raise ArgumentError("q_indptr", f"a batch of at most {INT32_MAX} items and slots", num_pieces)
    tile_cost = item_cost + -(-kv_lens.astype(np.int64) // kv_tokens) * step_cost
    total = float(np.sum(num_tiles * tile_cost.astype(np.float64))) * params.num_kv_heads
    if total > MAX_TOTAL_COST:
        raise ArgumentError("kv_lens", f"a batch whose cost is at most {MAX_TOTAL_COST}", f"about {total:.3g}")
