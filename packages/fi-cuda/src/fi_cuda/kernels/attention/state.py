"""Attention as a plan's kernel: planning on the device or the host, and one launch a call; the decode kernel's part."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fi_core.errors import ArgumentError
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from torch import Tensor

from ...launch import LaunchableKernel, RepeatedLaunch
from ...params import TensorMap
from ...spec import kernel_for
from .boxes import maps_of, tokens_of_box
from .call import CallForm
from .decode import DecodeSpec, decode_spec
from .layout import Layout
from .order import OrderPlanner
from .plan import DevicePlanner, ShortSteps, fill_on_host
from .tuning import DecodeTuning

_MAX_CALLS = 4096
_MAX_ROW_STRIDE_BYTES = 2**32


class DecodeAttention:
    """The ``AttentionKernel`` protocol."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        return Layout.of(spec, capacity, torch.device(device)).num_bytes

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> DecodeState:
        return DecodeState(spec, capacity, torch.device(device))


class Call(NamedTuple):
    """What calls with the same cache and layer share: the kernel, and the values that no call changes, between which go
    those of q, out, lse and the batch. In the order that each kernel's layout has."""

    kv: weakref.ref[KVCache]
    layer: ResolvedLayer  # kept, so that its id names it
    kernel: LaunchableKernel
    workspace: tuple[int, ...]
    cache: tuple[int, int]
    layer_tensors: tuple[int, ...]
    cache_strides: tuple[int, ...]
    numbers: tuple[float, ...]
    maps: tuple[TensorMap, ...]


@dataclass(slots=True)
class PackedCall:
    """A call whose parameters stay packed for the q, out, lse and batch that it had last."""

    kv: weakref.ref[KVCache]
    shared: Call
    launch: RepeatedLaunch


class KernelPart(NamedTuple):
    """A decode kernel, its lists and slots by address, and its tensor maps of K and V."""

    spec: DecodeSpec
    workspace: tuple[int, ...]
    maps: tuple[TensorMap, ...]


class Addressing(NamedTuple):
    """The batch's part of a call: table, table_row, indptr, mask bits and indptr by address, and the table's stride."""

    addresses: tuple[int, ...]
    table_stride: int
    has_rows: bool
    mask_columns: str | None
    tensors: tuple[Tensor | None, ...]  # kept alive

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Addressing:
        """That of a batch on ``device``, or on the CPU: then it is copied."""
        mask = batch.mask
        indptr = batch.table_indptr if batch.table_indptr is not None else batch.kv_indptr
        masks = (None, None) if mask is None else (mask.bits, mask.indptr)
        given = (batch.table, batch.table_row, indptr, *masks)
        tensors = tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in given)
        table = tensors[0]
        stride = 0 if table is None or table.dim() == 1 else table.stride(0)
        columns = None if mask is None else mask.columns
        return cls(tuple(map(address_of, tensors)), stride, batch.table_row is not None, columns, tensors)


class ListState:
    """The part of the ``AttentionState`` protocol that kernels share: one buffer with a work list for each distinct window
    of the spec. ``short``: steps other than these get no work in those lists."""

    def __init__(
        self,
        spec: AttentionSpec,
        capacity: Capacity,
        device: torch.device,
        layout: Layout,
        short: ShortSteps | None = None,
    ) -> None:
        self._spec = spec
        self._device = device
        self._layout = layout
        self._max_q_len = capacity.max_q_len
        self._short = short
        self._buffer = buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        layout.arrivals.of(buffer).zero_()
        for slots in (layout.partials, layout.partial_rows):
            slots.of(buffer).view(torch.int32).fill_(-1)
        self._lists = {window: regions.of(buffer) for window, regions in layout.lists.items()}
        for lists in self._lists.values():
            lists.starts.zero_()  # a worker reads its first item before it knows that it has none
        scratch, max_tiles = layout.scratch.of(buffer), layout.bounds.max_tiles
        self._planners: list[DevicePlanner | OrderPlanner] = [
            DevicePlanner(layout.params[window], capacity, max_tiles, lists, scratch, short)
            for window, lists in self._lists.items()
        ]
        for planner in self._planners:
            planner.load()  # compiling and loading would not be legal in a capture
        self._num_workers = layout.params[spec.windows[0]].num_workers
        self._batch: Batch | None = None
        self._addressing: Addressing | None = None
        self._num_addressings = 0
        self._calls: dict[tuple[int, int, bool], PackedCall] = {}
        self._planner = "not yet updated"

    @property
    def workspace(self) -> Sequence[Tensor]:
        return (self._buffer,)

    def update(self, batch: Batch) -> None:
        """Plan on the device where the lengths are there, one launch a window; else on the host with one copy of the lists
        (and one of each other tensor of a CPU batch)."""
        if batch.kv_lens.is_cpu:
            self._planner = "host, fi_scheduler.partition"
            self._plan_on_host(batch)
        else:
            self._planner = "device, one kernel a work list"
            for planner in self._planners:
                planner(batch.q_indptr, batch.kv_lens)
        self.take(batch)

    def take(self, batch: Batch) -> None:
        """Remember where a batch lies, whose lists another kernel may have filled."""
        if self._batch is batch and not batch.kv_lens.is_cpu:
            return  # its addresses are known
        self._batch = batch
        before, now = self._addressing, Addressing.of(batch, self._device)
        if before is None or (before.has_rows, before.mask_columns) != (now.has_rows, now.mask_columns):
            self._calls.clear()
        self._addressing = now
        self._num_addressings += 1

    def _plan_on_host(self, batch: Batch) -> None:
        layout = self._layout
        # Pinned memory comes from torch's caching allocator, which reuses a block only after the copy that reads it.
        pinned = self._device.type == "cuda"
        staging = torch.empty(layout.host_bytes, dtype=torch.uint8, pin_memory=pinned)
        q_indptr, kv_lens = batch.q_indptr, batch.kv_lens
        exceeds = bool((q_indptr.diff() > self._max_q_len).any())
        is_left = self._short is not None and not self._short.hold(q_indptr, self._spec.num_kv_heads)
        if exceeds or is_left:  # as on the device: no work
            q_indptr, kv_lens = q_indptr[:1], kv_lens[:0]
        for window, regions in layout.lists.items():
            fill_on_host(q_indptr, kv_lens, layout.params[window], regions.of(staging))
        self._order_on_host(batch, staging)
        self._buffer[: layout.host_bytes].copy_(staging, non_blocking=True)

    def _order_on_host(self, batch: Batch, staging: Tensor) -> None:
        """Fill what a kernel has besides the work lists."""

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        call = self._remembered(kv, layer, lse is not None)
        given = (
            *(self._num_addressings, q.data_ptr(), q.shape, q.stride(), out.data_ptr(), out.stride()),
            *(() if lse is None else (lse.data_ptr(), lse.stride(0))),
        )
        launch = call.launch
        if launch.packed_for != given:
            launch.pack(*self._values(call.shared, q, out, lse))
            launch.packed_for = given
        launch.launch()

    def _values(self, shared: Call, q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Any, ...]:
        """What the call's kernel is launched with."""
        raise AssertionError(f"{type(self).__name__} does not define _values")

    def _remembered(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> PackedCall:
        """What calls with this cache and layer share: found, or made by ``_prepare``."""
        key = (id(kv), id(layer), not with_lse)
        call = self._calls.get(key)
        if call is None or call.kv() is not kv:
            shared = self._prepare(kv, layer, with_lse)
            call = PackedCall(shared.kv, shared, shared.kernel.repeated(self._device, self._num_workers))
            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            self._calls[key] = call
        return call

    def _prepare(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> Call:
        raise AssertionError(f"{type(self).__name__} does not define _prepare")

    @property
    def _addresses(self) -> Addressing:
        assert self._addressing is not None, "the plan calls update first"
        return self._addressing


class DecodeState(ListState):
    """Attention of short queries."""

    def __init__(
        self, spec: AttentionSpec, capacity: Capacity, device: torch.device, short: ShortSteps | None = None
    ) -> None:
        super().__init__(spec, capacity, device, Layout.of(spec, capacity, device), short)
        assert isinstance(self._layout.tuning, DecodeTuning)
        self._tuning = self._layout.tuning

    def planner_of(self, window: int | None) -> DevicePlanner:
        """What fills the lists of a window of the spec."""
        planner = self._planners[list(self._lists).index(window)]
        assert isinstance(planner, DevicePlanner)
        return planner

    def describe(self) -> Sequence[str]:
        layout, tuning = self._layout, self._tuning
        params = layout.params[self._spec.windows[0]]
        split = f"at most {params.max_splits} pieces a tile" if params.max_splits else "equal shares for the workers"
        loader, tokens = "rows by cp.async", tokens_of_box(self._spec.page_size, tuning.chunk_tokens)
        if tokens is not None:
            loader = f"boxes of {tokens} tokens by tensor maps; {loader} from a cache that no map describes"
        rope = self._spec.rope
        rotated = (
            "" if rope is None else f"RoPE: {'Q and K' if rope.keys else 'Q'}, {rope.rotary_dim} dims, {rope.pairs}"
        )
        return (
            *([rotated] if rotated else []),
            f"tiles: {tuning.rows} rows x {tuning.chunk_tokens} KV tokens; {tuning.num_warps} warps, {tuning.row_warps} of "
            f"them on a chunk; {tuning.num_stages} stages",
            f"work: {params.num_workers} workers, {split}, {len(layout.lists)} work lists",
            f"K and V: {loader}",
            f"planner: {self._planner}",
            f"slots for partial results: {layout.num_slots}, of {tuning.rows} rows each",
        )

    def _values(self, shared: Call, q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Any, ...]:
        addressing = self._addresses
        return (
            *shared.workspace,
            q.data_ptr(),
            *shared.cache,
            out.data_ptr(),
            address_of(lse),
            *addressing.addresses,
            *shared.layer_tensors,
            *q.stride()[:2],
            *shared.cache_strides,
            *out.stride()[:2],
            0 if lse is None else lse.stride(0),
            addressing.table_stride,
            *shared.numbers,
            *shared.maps,
        )

    def serves_as(self, num_workers: int, num_warps: int) -> bool:
        """Whether blocks of a kernel that has so many, of so many warps, can be this one's."""
        return self._num_workers == num_workers and self._tuning.num_warps <= num_warps

    def part_of(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool, boxes: bool = True) -> KernelPart:
        """The kernel of calls with this cache and layer; not ``boxes``: whatever the copy engine can bring."""
        lists, layout = self._lists[layer.window], self._layout
        scales = (layer.q_scale, kv.k_scale, kv.v_scale)
        q_scales, k_scales, v_scales = (isinstance(scale, Tensor) for scale in scales)
        addressing, maps = self._addresses, self._maps_of(kv) if boxes else None
        form = CallForm(
            windowed=layer.window is not None,
            lse=with_lse,
            q_scales=q_scales,
            k_scales=k_scales,
            v_scales=v_scales,
            table_row=addressing.has_rows,
            mask_columns=addressing.mask_columns,
            boxes=maps is not None,
        )
        slots = (region.of(self._buffer).data_ptr() for region in (layout.partials, layout.partial_rows))
        workspace = (*map(address_of, lists[:2]), *slots)
        return KernelPart(decode_spec(self._spec, self._tuning, form), workspace, maps or ())

    def _prepare(self, kv: KVCache, layer: ResolvedLayer, with_lse: bool) -> Call:
        """Find the kernel for calls with this cache and layer, and remember it with what they share."""
        q_scales, q_scale_stride, q_scale = scale_of(layer.q_scale)
        k_scales, k_scale_stride, k_scale = scale_of(kv.k_scale)
        v_scales, v_scale_stride, v_scale = scale_of(kv.v_scale)
        rope, part = layer.rope, self.part_of(kv, layer, with_lse)
        return Call(
            kv=weakref.ref(kv),
            layer=layer,
            kernel=kernel_for(part.spec, self._device),
            workspace=part.workspace,
            cache=(kv.k.data_ptr(), kv.v.data_ptr()),
            layer_tensors=(
                *(
                    address_of(layer.sinks),
                    address_of(layer.alibi_slopes),
                    address_of(None if rope is None else rope.inv_freq),
                ),
                *(q_scales, k_scales, v_scales),
            ),
            cache_strides=cache_strides_of(kv),
            numbers=(
                *(q_scale_stride, k_scale_stride, v_scale_stride, layer.window or 0),
                *(layer.scale * q_scale * k_scale, layer.soft_cap or 1.0, v_scale),
                1.0 if rope is None else rope.config.attention_factor,
            ),
            maps=part.maps,
        )

    def _maps_of(self, kv: KVCache) -> tuple[TensorMap, ...] | None:
        """Tensor maps of K and V, if the copy engine can bring them."""
        tokens = tokens_of_box(self._spec.page_size, self._tuning.chunk_tokens)
        return None if tokens is None else maps_of(kv, tokens)


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cache_strides_of(kv: KVCache) -> tuple[int, ...]:
    """Strides of page (0: ragged), token and head of K, then of V, in elements."""
    strides: list[int] = []
    for cache in kv.as_nhd():
        strides += [cache.stride(0) if kv.is_paged else 0, cache.stride(-3), cache.stride(-2)]
    return tuple(strides)


def near_strides_of(kv: KVCache) -> tuple[int, ...]:
    """The same for kernels that copy rows one by one, which count the bytes from page to page and from token to token in 32
    bits. Raises ArgumentError for a cache where they are more."""
    for cache in kv.as_nhd():
        steps = [stride for size, stride in zip(cache.shape[:-2], cache.stride(), strict=False) if size > 1]
        farthest = max(steps, default=0) * cache.element_size()
        if farthest >= _MAX_ROW_STRIDE_BYTES:
            raise ArgumentError(
                "kv", "pages and tokens less than 4 GiB apart, or that a tensor map describes", farthest
            )
    return cache_strides_of(kv)


def scale_of(scale: Any) -> tuple[int, int, float]:
    """(address, stride, value) of a cache's scale."""
    if isinstance(scale, Tensor):
        return scale.data_ptr(), int(scale.numel() > 1), 1.0
    return 0, 0, 1.0 if scale is None else float(scale)


attention_decode = DecodeAttention()
"""What the kernel entry loads."""
