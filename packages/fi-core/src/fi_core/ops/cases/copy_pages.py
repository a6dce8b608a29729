"""Conformance cases of ``copy_pages``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...protocols import CopyPages
from ...records import KV_FORMATS, KVCache, KVFormat, KVLayout
from ...reference.copy_pages import copy_pages

Storage = Literal["separate", "interleaved", "padded", "unaligned"]

_PAIRS = ((3, 5), (0, 2), (6, 1))
_NUM_PAGES = 8


@dataclass(frozen=True)
class Scenario:
    """``pairs`` of source and target pages, between two caches or within one (``same``).

    ``source`` and ``target`` say how memory holds K and V: two tensors, views of one tensor with K and V in turn, rows
    wider than a head, or rows of an odd width that begin at an odd element. ``placement`` other than "device" puts one
    cache into pinned host memory, where the device is a GPU. ``first_page`` (with ``same``) leaves that many pages
    unwritten and unseen before the others.
    """

    kv_format: KVFormat
    pairs: tuple[tuple[int, int], ...] = _PAIRS
    num_heads: int = 2
    head_dim: int = 64
    head_dim_vo: int = 64
    page_size: int = 16
    kv_layout: KVLayout = "NHD"
    source: Storage = "separate"
    target: Storage = "separate"
    placement: Literal["device", "from_host", "to_host"] = "device"
    same: bool = False
    as_bytes: bool = False
    index_dtype: torch.dtype = torch.int64
    first_page: int = 0

    def values(self) -> dict[str, Any]:
        """The request's field values."""
        names = ("kv_format", "head_dim", "head_dim_vo", "page_size", "kv_layout", "placement")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Memory:
    """A cache and the whole tensors that it is a view of."""

    kv: KVCache
    whole: tuple[Tensor, ...]


def _cache(scenario: Scenario, storage: Storage, device: torch.device, pinned: bool, seed: int) -> _Memory:
    """Random bytes everywhere (NaN with payloads, infinities, subnormals among them), before and behind the pages too."""
    inner = (scenario.page_size, scenario.num_heads)
    shape = (_NUM_PAGES + scenario.first_page, *(inner if scenario.kv_layout == "NHD" else inner[::-1]))
    dims = (scenario.head_dim, scenario.head_dim_vo)
    extra = {"padded": 16, "unaligned": 3}.get(storage, 0)
    if storage == "interleaved":
        whole: tuple[Tensor, ...] = (_random((shape[0], 2, *shape[1:], max(dims)), scenario, device, pinned, seed),)
        k, v = (whole[0][:, part, ..., :dim] for part, dim in enumerate(dims))
    else:
        whole = tuple(
            _random((*shape, dim + extra), scenario, device, pinned, seed + part) for part, dim in enumerate(dims)
        )
        first = 1 if storage == "unaligned" else 0
        k, v = (tensor[..., first : first + dim] for tensor, dim in zip(whole, dims, strict=True))
    return _Memory(KVCache(k, v, scenario.kv_layout, scenario.kv_format), whole)


def _random(shape: tuple[int, ...], scenario: Scenario, device: torch.device, pinned: bool, seed: int) -> Tensor:
    dtype = KV_FORMATS[scenario.kv_format]
    generator = torch.Generator().manual_seed(seed)
    used = (shape[0] - scenario.first_page, *shape[1:-1], shape[-1] * dtype.itemsize)
    content = torch.randint(0, 256, used, dtype=torch.uint8, generator=generator)
    memory = torch.empty(
        (*shape[:-1], used[-1]), dtype=torch.uint8, device="cpu" if pinned else device, pin_memory=pinned
    )
    memory[scenario.first_page :] = content
    return memory if scenario.as_bytes else memory.view(dtype)


def build(scenario: Scenario, device: torch.device, seed: int) -> Trial:
    """Every byte of both caches is compared, gaps included."""
    in_host = scenario.placement if device.type == "cuda" else "device"

    def outputs(call: CopyPages) -> dict[str, Tensor]:
        source = _cache(scenario, scenario.source, device, in_host == "from_host", seed)
        target = source
        if not scenario.same:
            target = _cache(scenario, scenario.target, device, in_host == "to_host", seed + 2)
        pages = torch.tensor(scenario.pairs, dtype=scenario.index_dtype).view(-1, 2)
        pages = torch.where(pages >= 0, pages + scenario.first_page, pages)
        call(source.kv, target.kv, *(part.contiguous().to(device) for part in pages.unbind(1)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = {f"source {part}": tensor for part, tensor in enumerate(source.whole)}
        found |= {f"target {part}": tensor for part, tensor in enumerate(target.whole)}
        return {name: tensor[scenario.first_page :].view(torch.uint8) for name, tensor in found.items()}

    num_parts = [1 if storage == "interleaved" else 2 for storage in (scenario.source, scenario.target)]
    names = [f"source {part}" for part in range(num_parts[0])]
    names += [f"target {part}" for part in range(num_parts[0 if scenario.same else 1])]
    return Trial(outputs, lambda: outputs(copy_pages), dict.fromkeys(names, EXACT))


_HOSTILE = frozenset({"hostile"})


def _case(name: str, tags: frozenset[str] = frozenset(), **options: Any) -> Case:
    """Options are fields of Scenario; head_dim_vo follows head_dim."""
    chosen = {"kv_format": "bf16", **options}
    chosen.setdefault("head_dim_vo", chosen.get("head_dim", 64))
    scenario = Scenario(**chosen)
    return Case(name, scenario.values(), lambda device, seed: build(scenario, device, seed), tags)


def cases() -> Iterator[Case]:
    """Cases cheap enough for a CPU, then one that needs a GPU with much memory."""
    for kv_format in KV_FORMATS:
        yield _case(f"{kv_format}", kv_format=kv_format)
        yield _case(f"{kv_format}_same_cache", kv_format=kv_format, same=True, source="interleaved")
    for page_size in (1, 3, 64, 256):
        yield _case(f"page_size_{page_size}", page_size=page_size)
    for head_dim in (7, 80, 128, 256):
        yield _case(f"head_dim_{head_dim}", head_dim=head_dim)
    yield _case("head_dim_192_128", head_dim=192, head_dim_vo=128, source="interleaved")
    yield _case("head_dim_192_128_hnd", head_dim=192, head_dim_vo=128, target="interleaved", kv_layout="HND")
    yield _case("one_head", num_heads=1, kv_layout="HND")
    yield _case("int32_ids", index_dtype=torch.int32)
    for kv_layout in ("NHD", "HND"):
        for storage in ("interleaved", "padded", "unaligned"):
            name = f"{kv_layout.lower()}_{storage}"
            yield _case(f"{name}_source", kv_layout=kv_layout, source=storage)
            yield _case(f"{name}_target", kv_layout=kv_layout, target=storage)
            yield _case(f"{name}_fp8", kv_layout=kv_layout, source=storage, target=storage, kv_format="fp8_e4m3")
    yield _case("fp8_e5m2_bytes", kv_format="fp8_e5m2", as_bytes=True, same=True)
    yield _case("no_pair", _HOSTILE, pairs=())
    yield _case("all_skipped", _HOSTILE, pairs=((-1, 2), (3, -1), (-1, -1)))
    yield _case("some_skipped", _HOSTILE, pairs=((-1, 5), (0, 2), (6, -1), (5, 7)), index_dtype=torch.int32)
    yield _case("skipped_twice", _HOSTILE, pairs=((-1, 5), (1, 5), (-1, 5)), same=True)
    yield _case("one_source_for_all", _HOSTILE, pairs=tuple((3, page) for page in (0, 1, 2, 4, 7)), same=True)
    yield _case("page_to_itself", _HOSTILE, pairs=((4, 4), (1, 2)), same=True)
    yield _case("every_page", _HOSTILE, pairs=tuple((page, 7 - page) for page in range(8)))
    for placement in ("from_host", "to_host"):
        yield _case(f"{placement}", placement=placement)
        yield _case(f"{placement}_hnd", placement=placement, kv_layout="HND", source="interleaved", page_size=64)
        yield _case(f"{placement}_fp8", placement=placement, kv_format="fp8_e4m3", target="padded", as_bytes=True)
    far: dict[str, Any] = {"first_page": 1 << 17, "num_heads": 8, "head_dim": 128, "kv_format": "fp8_e4m3"}
    yield _case("far_pages", frozenset({"large"}), **far, same=True, source="interleaved")
