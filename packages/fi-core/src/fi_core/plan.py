"""Plans: a kernel chosen and its workspace made from capacities alone, then updated with each step's lengths."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable

import torch

from . import checks
from .batches import check_planned
from .contract import Request, target_of
from .devices import normal_device
from .errors import ArgumentError
from .protocols import AttentionKernel, AttentionState
from .records import AttentionSpec, Batch, Capacity, LayerArgs, ResolvedLayer
from .registry import KernelRegistry, Selection, registry
from .remembered import Remembered
from .settings import settings

_handles = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_MAX_REMEMBERED = 4096


def attention_values(spec: AttentionSpec, max_q_len: int, levels: bool = False) -> dict[str, Hashable]:
    """The request field values of ``attention`` for a spec; ``levels``: whether batches may share prefixes."""
    return {
        "dtype": spec.dtype,
        "q_format": spec.q_format,
        "kv_format": spec.kv_format,
        "head_dim": spec.head_dim,
        "head_dim_vo": spec.head_dim_vo,
        "group_size": spec.group_size,
        "page_size": spec.page_size,
        "kv_layout": spec.kv_layout,
        "table": spec.table,
        "causal": spec.causal,
        "windowed": any(window is not None for window in spec.windows),
        "features": spec.features,
        "batch_invariant": spec.batch_invariant,
        "rope": "none" if spec.rope is None else "qk" if spec.rope.keys else "q",
        "rope_pairs": "none" if spec.rope is None else spec.rope.pairs,
        "rotary_dim": 0 if spec.rope is None else spec.rope.rotary_dim,
        "max_q_len": max_q_len,
        "levels": levels,
    }


def attention_request(spec: AttentionSpec, max_q_len: int, device: torch.device | str, levels: bool = False) -> Request:
    """What a plan of ``spec`` asks of a kernel."""
    operation = registry().operations["attention"]
    return operation.request(target_of(device), **attention_values(spec, max_q_len, levels))


class Plan:
    """A kernel with its workspace for one (spec, capacity, device); made by ``plan``.

    One thread and one stream at a time: ``update`` and the calls of a step use the same workspace. Attributes: ``spec``,
    ``q_dtype`` (the spec's), ``capacity``, ``device``, ``selection`` (the kernel and why), ``state`` (the kernel's part),
    ``workspace_bytes``, ``batch`` (the last update's, None before), ``num_q_tokens`` (its tokens where its lengths are on
    the CPU, else 0: not known here), ``observed`` (made in checked or shadow mode), ``checked_caches`` (that fit the plan),
    ``handle`` (an integer that names the plan in compiled graphs).
    """

    def __init__(self, spec: AttentionSpec, capacity: Capacity, device: torch.device, selection: Selection) -> None:
        kernel = _kernel(registry(), selection)
        self.spec = spec
        self.q_dtype = spec.q_dtype
        self.capacity = capacity
        self.device = device
        self.selection = selection
        self.workspace_bytes = kernel.workspace_bytes(spec, capacity, str(device))
        self.state: AttentionState = kernel.plan(spec, capacity, str(device))
        self.batch: Batch | None = None
        self.num_q_tokens = 0
        self.observed = settings().check or settings().shadow > 0
        if settings().check:
            checks.prepare(device)
        self.handle = next(_handles)
        self._layers: dict[tuple[Hashable, ...], ResolvedLayer] = {}
        self.checked_caches: Remembered[bool] = Remembered()
        _plans[self.handle] = self

    def update(self, batch: Batch) -> None:
        """Plan the work of ``batch``, whose tensors are all on the plan's device, or all on the CPU (then one copy is
        made). Device tensors are judged by shape, dtype and device alone: no synchronisation, legal while a CUDA graph
        is captured. Lengths on the CPU are also compared with the capacities and with the table's width.

        The plan keeps references to the batch's tensors. Contents may change between steps, but a change of lengths
        takes effect with the next update only. Raises ArgumentError, or CapacityError naming the capacity exceeded.
        """
        # Records are frozen, so a batch on the device whose form was checked keeps it.
        if batch is not self.batch or batch.q_indptr.is_cpu:
            check_planned(batch, self.spec, self.capacity, self.device)
        self.state.update(batch)
        self.num_q_tokens = int(batch.q_indptr[-1]) if batch.q_indptr.is_cpu else 0
        self.batch = batch

    def explain(self) -> str:
        """The request, the kernel chosen and why, every other kernel with its reasons, and the kernel's own notes."""
        lines = [str(self.selection), f"  {self.capacity}", f"  workspace: {self.workspace_bytes} bytes"]
        return "\n".join(lines + [f"  {line}" for line in self.state.describe()])

    def resolve(self, layer: LayerArgs) -> ResolvedLayer:
        """``layer`` checked against the spec and completed; remembered by value, tensors by identity."""
        rope, q_scale = layer.rope, layer.q_scale
        key: tuple[Hashable, ...] = (
            layer.scale, layer.soft_cap, layer.window, id(layer.sinks), id(layer.alibi_slopes)
        )  # fmt: skip
        if rope is not None or q_scale is not None:
            scale = id(q_scale) if isinstance(q_scale, torch.Tensor) else q_scale
            key += (scale, None if rope is None else (id(rope.inv_freq), id(rope.cos_sin), rope.config))
        found = self._layers.get(key)
        if found is None:
            found = layer.resolve(self.spec)
            if rope is not None:
                rope.check("layer.rope", self.device)
            for name in ("sinks", "alibi_slopes", "q_scale"):
                tensor = getattr(layer, name)
                if isinstance(tensor, torch.Tensor) and (tensor.device != self.device or not tensor.is_contiguous()):
                    raise ArgumentError(f"layer.{name}", f"a contiguous tensor on {self.device}", tensor.device)
            if len(self._layers) >= _MAX_REMEMBERED:
                self._layers.clear()
            # The resolved record holds the tensors, so an id in a stored key cannot be given to another tensor.
            self._layers[key] = found
        return found


def plan_of(handle: int) -> Plan:
    """The living plan with that handle; raises ArgumentError."""
    found = _plans.get(handle)
    if found is None:
        raise ArgumentError("plan", "the handle of a living plan", handle)
    return found


def plan(
    spec: AttentionSpec,
    *,
    max_batch: int,
    max_q_tokens: int,
    max_q_len: int,
    max_kv_len: int,
    max_prefixes: int = 0,
    max_prefix_depth: int = 4,
    device: torch.device | str,
    backend: str | None = None,
) -> Plan:
    """Choose a kernel for ``spec`` and allocate its workspace on ``device``, from capacities alone (see Capacity).

    ``backend`` admits that backend only. Raises ArgumentError, UnknownBackendError, or UnsupportedError holding every
    kernel's reasons.
    """
    capacity = Capacity(max_batch, max_q_tokens, max_q_len, max_kv_len, max_prefixes, max_prefix_depth)
    where = normal_device(device)
    return Plan(spec, capacity, where, _select(spec, capacity, where, backend))


def workspace_bytes(
    spec: AttentionSpec,
    *,
    max_batch: int,
    max_q_tokens: int,
    max_q_len: int,
    max_kv_len: int,
    max_prefixes: int = 0,
    max_prefix_depth: int = 4,
    device: torch.device | str,
    backend: str | None = None,
) -> int:
    """Bytes of device memory that ``plan`` with the same arguments takes; allocates nothing. Raises like ``plan``."""
    capacity = Capacity(max_batch, max_q_tokens, max_q_len, max_kv_len, max_prefixes, max_prefix_depth)
    where = normal_device(device)
    selection = _select(spec, capacity, where, backend)
    return _kernel(registry(), selection).workspace_bytes(spec, capacity, str(where))


def _select(spec: AttentionSpec, capacity: Capacity, device: torch.device, backend: str | None) -> Selection:
    levels = capacity.max_prefixes > 0
    if levels and spec.batch_invariant:
        expected = "0 with batch_invariant (who shares a prefix is the rest of the batch)"
        raise ArgumentError("max_prefixes", expected, capacity.max_prefixes)
    if levels and spec.table == "ragged":
        raise ArgumentError("max_prefixes", "0 with ragged K and V, which requests cannot share", capacity.max_prefixes)
    return registry().select(attention_request(spec, capacity.max_q_len, device, levels), backend)


def _kernel(owner: KernelRegistry, selection: Selection) -> AttentionKernel:
    kernel: AttentionKernel = owner.implementation(selection.entry)
    return kernel
