"""Conformance cases of ``append_kv``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Tolerance, Trial
from ...protocols import AppendKV
from ...records import KV_FORMATS, Batch, KVCache, format_of
from ...reference import serving_dtype
from ...reference.append_kv import append_kv, appended, bytes_view
from ...rope import Llama3Scaling, RopeConfig, RopeTable, YarnScaling
from ...tolerances import append_tolerance
from .kv import CacheForm, CacheInputs, indptr_of, make_cache


@dataclass(frozen=True)
class Scenario:
    """Tokens to append to one cache. ``slots``: through a slot_mapping, of which some are -1; ``rotate_q``: query heads
    to rotate (0: no q); ``tabulated``: RoPE with a table; ``strided``: k, v and q are views of one wider tensor;
    ``far``: values beyond the largest FP8 number, infinities and NaN among them."""

    form: CacheForm
    dtype: torch.dtype
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    rope: RopeConfig | None = None
    tabulated: bool = True
    rotate_q: int = 0
    slots: bool = False
    strided: bool = False
    far: bool = False
    spare_rows: int = 3

    def values(self) -> dict[str, Any]:
        """The request's field values."""
        form = self.form
        source = "none" if self.rope is None else "table" if self.tabulated else "computed"
        return {
            "dtype": self.dtype,
            "kv_format": form.kv_format,
            "head_dim": form.head_dim,
            "head_dim_vo": form.head_dim_vo,
            "page_size": form.page_size,
            "kv_layout": form.kv_layout,
            "addressing": "slots" if self.slots else form.table,
            "rope": "none" if self.rope is None else self.rope.pairs,
            "rope_source": source,
        }


def _case(
    name: str,
    q_lens: tuple[int, ...] = (1, 6, 1),
    kv_lens: tuple[int, ...] = (17, 6, 33),
    tags: frozenset[str] = frozenset(),
    **options: Any,
) -> Case:
    """Options are fields of CacheForm and Scenario."""
    chosen: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, **options}
    if chosen.get("table") == "ragged":
        chosen["page_size"] = None
    chosen.setdefault("head_dim_vo", chosen["head_dim"])
    chosen.setdefault("kv_format", format_of(chosen["dtype"]))
    in_form = {key: chosen.pop(key) for key in list(chosen) if key in CacheForm.__dataclass_fields__}
    scenario = Scenario(CacheForm(**in_form), q_lens=q_lens, kv_lens=kv_lens, **chosen)
    return Case(name, scenario.values(), lambda device, seed: build(scenario, device, seed), tags)


@dataclass(frozen=True)
class _Inputs:
    k: Tensor
    v: Tensor
    q: Tensor | None
    cache: CacheInputs
    batch: Batch
    rope: RopeTable | None


def _inputs(scenario: Scenario, device: torch.device, seed: int) -> _Inputs:
    """The same inputs at every call, in new memory: a run changes the cache and q."""
    form = scenario.form
    generator = torch.Generator().manual_seed(seed)
    cache = make_cache(form, scenario.kv_lens, device, generator)
    num_tokens = sum(scenario.q_lens)
    rows = num_tokens + scenario.spare_rows
    num_q = scenario.rotate_q
    width = max(form.head_dim, form.head_dim_vo)
    wide = torch.randn(rows, num_q + 2 * form.num_heads, width, generator=generator)
    if scenario.far and num_tokens:
        wide[0, :, 0::4] *= 1e6
        wide[0, :, 1], wide[0, :, 2], wide[0, :, 3] = math.inf, -math.inf, math.nan
    wide[num_tokens:] = math.nan
    wide = wide.to(device=device, dtype=scenario.dtype)
    q, k = wide[:, :num_q, : form.head_dim], wide[:, num_q : num_q + form.num_heads, : form.head_dim]
    v = wide[:, num_q + form.num_heads :, : form.head_dim_vo]
    if not scenario.strided:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    slots = _slots(scenario, cache, rows) if scenario.slots else None
    lengths = torch.tensor(scenario.kv_lens, dtype=torch.int32, device=device)
    batch = Batch(
        indptr_of(scenario.q_lens, device), lengths, slot_mapping=slots, mask=None, levels=None, **cache.fields
    )
    table = None
    if scenario.rope is not None:
        table = RopeTable.make(scenario.rope, device, max([1, *scenario.kv_lens]) if scenario.tabulated else None)
    return _Inputs(k, v, q if scenario.rotate_q else None, cache, batch, table)


def _slots(scenario: Scenario, cache: CacheInputs, rows: int) -> Tensor:
    """Slots of the tokens in reverse order, so that they are not what the table says; every third is -1."""
    size = scenario.form.page_size
    slot = cache.block if size is None else cache.block * size + cache.offset
    slots = torch.full((rows,), -1, dtype=torch.int64, device=slot.device)
    num_tokens = sum(scenario.q_lens)
    slots[:num_tokens] = slot.flip(0)[:num_tokens]
    slots[::3] = -1
    return slots


def build(scenario: Scenario, device: torch.device, seed: int) -> Trial:
    """Without RoPE every byte of the cache is compared; with it the keys and q that it rotates within a tolerance, and
    every other byte exactly."""
    exact = scenario.rope is None
    limit = append_tolerance(scenario.dtype, scenario.form.kv_format)
    tolerance: dict[str, Tolerance] = {"k": EXACT if exact else limit, "v": EXACT, "rest of k": EXACT}
    if scenario.rotate_q:
        tolerance |= {"q": append_tolerance(scenario.dtype, ""), "rest of q": EXACT}

    def outputs(call: AppendKV) -> dict[str, Tensor]:
        given = _inputs(scenario, device, seed)
        before = appended(
            given.k, given.v, given.cache.kv, given.batch, given.rope, given.q, serving_dtype(scenario.dtype)
        )
        call(given.k, given.v, given.cache.kv, given.batch, given.rope, given.q)
        k, v = given.cache.kv.as_nhd()
        where = (before.block, before.offset) if given.cache.kv.is_paged else (before.block,)
        rest, v_bytes = bytes_view(k).clone(), bytes_view(v).clone()
        rest[where] = 0
        written = bytes_view(k)[where].view(k.dtype)
        v_bytes[where] = _comparable(v_bytes[where], scenario.form.kv_format)
        # Pages before the first used one may be unwritten memory.
        seen = slice(scenario.form.first_page, None)
        k_found = _comparable(bytes_view(written), scenario.form.kv_format) if exact else written
        found = {"k": k_found, "v": v_bytes[seen], "rest of k": rest[seen]}
        if given.q is not None:
            rest_q = given.q.clone()
            rest_q[before.q_rows] = 0
            found |= {"q": given.q[before.q_rows], "rest of q": rest_q}
        return found

    return Trial(outputs, lambda: outputs(_oracle), tolerance)


def _comparable(stored: Tensor, kv_format: str) -> Tensor:
    """The bytes of FP8 values, every NaN as the same one: a NaN stays NaN, but its sign and payload are the processor's.
    Values of other formats unchanged."""
    if stored.dtype != torch.uint8:
        return stored
    return torch.where(stored.view(KV_FORMATS[kv_format]).float().isnan(), _FP8_NAN, stored)


def _oracle(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """The definition: bit-exact float32 without RoPE, float64 with it (then rounded to what is stored)."""
    append_kv(k, v, kv, batch, rope, q, compute_dtype=None if rope is None else torch.float64)


_HOSTILE = frozenset({"hostile"})
_FP8_NAN = 0x7F
"""A NaN in both 8-bit formats."""


def cases() -> Iterator[Case]:
    """Cases cheap enough for a CPU, then one that needs a GPU with much memory, and some of so many tokens that kernels
    share the work in another way, which take long in an interpreter."""
    yield from _plain()
    yield from _rotated()
    yield from _quantised()
    far: Mapping[str, Any] = {"first_page": 1 << 17, "num_heads": 8, "head_dim": 128}
    large = frozenset({"large"})
    yield _case("far_pages_rope", tags=large, **far, rope=RopeConfig(128))
    wide: Mapping[str, Any] = {"q_lens": (900, 0, 1200), "kv_lens": (907, 3, 1200), "tags": large, "head_dim": 128}
    for kv_format in ("bf16", "fp8_e4m3"):
        for num_heads in (8, 3):
            many: Mapping[str, Any] = {**wide, "num_heads": num_heads, "kv_format": kv_format}
            yield _case(f"many_tokens_{kv_format}_heads_{num_heads}", **many)
            yield _case(f"many_tokens_{kv_format}_heads_{num_heads}_rope", **many, rope=RopeConfig(128))
            yield _case(f"many_tokens_{kv_format}_heads_{num_heads}_rope_q", **many, rope=RopeConfig(128), rotate_q=32)
    yield _case("many_tokens_fp8_e5m2_scale_of_heads", **{**wide, "num_heads": 8}, kv_format="fp8_e5m2", scale="heads")
    yield _case("many_tokens_hnd_rope_partial", **wide, num_heads=8, kv_layout="HND", rope=RopeConfig(64), rotate_q=8)


def _plain() -> Iterator[Case]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield _case(f"{format_of(dtype)}", dtype=dtype)
    yield _case("prefill", (40, 25), (40, 25))
    yield _case("chunk", (16, 5), (40, 70))
    yield _case("hnd", kv_layout="HND")
    yield _case("hnd_interleaved", kv_layout="HND", storage="interleaved", strided=True)
    yield _case("interleaved", storage="interleaved", strided=True)
    yield _case("padded_rows", storage="padded")
    yield _case("table_row", table_row=True)
    yield _case("table_indptr", table="indptr")
    yield _case("ragged", table="ragged")
    yield _case("ragged_hnd", table="ragged", kv_layout="HND", storage="interleaved")
    yield _case("slots", slots=True)
    yield _case("slots_hnd", slots=True, kv_layout="HND", page_size=64)
    yield _case("slots_ragged", slots=True, table="ragged")
    for page_size in (1, 3, 64, 256):
        yield _case(f"page_size_{page_size}", page_size=page_size)
    for head_dim in (80, 96, 128, 256):
        yield _case(f"head_dim_{head_dim}", head_dim=head_dim)
    yield _case("head_dim_192_128", head_dim=192, head_dim_vo=128, strided=True)
    yield _case("one_head", num_heads=1)
    yield _case("empty_batch", (), (), _HOSTILE)
    yield _case("padding_requests", (1, 0, 2, 1), (0, 5, 0, 9), _HOSTILE)
    yield _case("more_tokens_than_keys", (9, 2), (4, 2), _HOSTILE)
    yield _case("special_values", tags=_HOSTILE, far=True)
    yield _case("no_spare_rows", tags=_HOSTILE, spare_rows=0)


def _rotated() -> Iterator[Case]:
    half, interleaved = RopeConfig(64), RopeConfig(64, pairs="interleaved")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield _case(f"rope_{format_of(dtype)}", dtype=dtype, rope=half, rotate_q=4)
    yield _case("rope_computed", rope=half, tabulated=False, rotate_q=4)
    yield _case("rope_interleaved", rope=interleaved, rotate_q=4)
    yield _case("rope_interleaved_computed", rope=interleaved, tabulated=False)
    yield _case("rope_partial", rope=RopeConfig(32), rotate_q=3, strided=True, num_heads=1)
    yield _case("rope_partial_interleaved", rope=RopeConfig(32, pairs="interleaved"), rotate_q=4)
    yield _case("rope_llama3", rope=RopeConfig(64, 5e5, scaling=Llama3Scaling()), tabulated=False, rotate_q=4)
    yield _case("rope_yarn", rope=RopeConfig(64, scaling=YarnScaling(4.0, 32)), tabulated=False, rotate_q=4)
    yield _case("rope_slots", rope=half, slots=True, rotate_q=4)
    yield _case("rope_ragged", rope=half, table="ragged", rotate_q=4)
    yield _case("rope_more_tokens_than_keys", (9, 2), (4, 2), _HOSTILE, rope=half, rotate_q=4)
    yield _case("rope_padding_requests", (1, 0, 2, 1), (0, 5, 0, 9), _HOSTILE, rope=half, rotate_q=4)


def _quantised() -> Iterator[Case]:
    for kv_format in ("fp8_e4m3", "fp8_e5m2"):
        for scale in ("none", "float", "tensor", "heads"):
            yield _case(f"{kv_format}_{scale}", kv_format=kv_format, scale=scale)
        yield _case(f"{kv_format}_special_values", tags=_HOSTILE, kv_format=kv_format, scale="heads", far=True)
    yield _case("fp8_e4m3_bytes", kv_format="fp8_e4m3", scale="tensor", as_bytes=True, storage="interleaved")
    yield _case("fp8_e4m3_fp32", dtype=torch.float32, kv_format="fp8_e4m3", scale="heads", slots=True)
    yield _case("fp8_e4m3_rope", kv_format="fp8_e4m3", scale="heads", rope=RopeConfig(64), rotate_q=4)
    yield _case("fp8_e5m2_hnd_rope", kv_format="fp8_e5m2", scale="float", rope=RopeConfig(64), kv_layout="HND")
