"""Triton's append_kv against a plain loop over tokens in float64, with every other slot of the cache watched."""

from __future__ import annotations

import math

import pytest
import torch
from fi_core.records import KV_FORMATS, Batch, KVCache
from fi_core.rope import LinearScaling, RopeConfig, RopeTable, YarnScaling
from fi_triton.append_kv import append_kv

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HEADS, QUERY_HEADS, DIM, DIM_VO = 2, 5, 16, 24
Q_LENS, KV_LENS = [3, 0, 1, 2, 5], [7, 4, 0, 2, 21]
PADDING_ROWS = 2
POISON_BYTE = 0x5A


def empty_cache(kv_format: str, layout: str, page_size: int | None, num_blocks: int, scales=(None, None)) -> KVCache:
    """A cache whose every byte is POISON_BYTE."""
    caches = []
    for dim in (DIM, DIM_VO):
        shape = (num_blocks, HEADS, dim) if page_size is None else (num_blocks, page_size, HEADS, dim)
        size = KV_FORMATS[kv_format].itemsize
        cache = torch.full((*shape[:-1], dim * size), POISON_BYTE, dtype=torch.uint8)
        if layout == "HND":
            cache = cache.transpose(-2, -3).contiguous()
        caches.append(cache.view(KV_FORMATS[kv_format]))
    return KVCache(caches[0], caches[1], layout, kv_format, *scales)


def addressing(form: str, page_size: int | None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
    """Batch fields, the flat cache row of every position of each request, and the number of blocks of the cache."""
    generator = torch.Generator().manual_seed(3)
    if form == "ragged":
        starts = [2 + 30 * request for request in range(len(KV_LENS))]
        rows = [start + torch.arange(kv_len) for start, kv_len in zip(starts, KV_LENS, strict=True)]
        return {"kv_indptr": torch.tensor([*starts, 200], dtype=torch.int32)}, rows, 200
    size = page_size or 1
    counts = [-(-kv_len // size) for kv_len in KV_LENS]
    pages = torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)].split(counts)
    rows = [
        own[torch.arange(kv_len) // size] * size + torch.arange(kv_len) % size
        for own, kv_len in zip(pages, KV_LENS, strict=True)
    ]
    if form == "indptr":
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        return {"table": torch.cat(pages).int(), "table_indptr": indptr}, rows, sum(counts) + 3
    order = [4, 2, 0, 1, 3]
    table = torch.full((6, max(counts)), -(10**6), dtype=torch.int32)
    for row, own in zip(order, pages, strict=True):
        table[row, : len(own)] = own.int()
    return {"table": table, "table_row": torch.tensor(order, dtype=torch.int32)}, rows, sum(counts) + 3


def rotated(x: torch.Tensor, position: int, table: RopeTable) -> torch.Tensor:
    """x [H, D] float64 turned at ``position``, pair by pair."""
    config = table.config
    result = x.clone()
    for pair, frequency in enumerate(config.inv_freq().tolist()):
        half = config.rotary_dim // 2
        a, b = (pair, pair + half) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        result[:, a] = (x[:, a] * cos - x[:, b] * sin) * config.attention_factor
        result[:, b] = (x[:, b] * cos + x[:, a] * sin) * config.attention_factor
    return result


def close(actual: torch.Tensor, expected: torch.Tensor, exact: bool, dtype: torch.dtype) -> None:
    """Equal bits, or equal up to a neighbouring value of ``dtype`` (rotations are computed in float32)."""
    if exact:
        assert torch.equal(actual.view(torch.uint8), expected.to(actual.dtype).view(torch.uint8))
    else:
        largest = float(expected.double().abs().max())  # a small result may be the difference of two large products
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=4e-7 * largest)


def expected_cache(world: dict, kv: KVCache, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(real values [rows, H, D] float64, whether each flat row is written)."""
    values, rope = world[which].double(), world["rope"] if which == "k" else None
    scale = getattr(kv, f"{which}_scale")
    flat = world["num_blocks"] * (kv.page_size or 1)
    result = torch.zeros(flat, HEADS, values.shape[-1], dtype=torch.float64)
    written = torch.zeros(flat, dtype=torch.bool)
    for row, position, slot in world["tokens"]:
        if slot < 0 or (world["rope"] is not None and position < 0):
            continue
        x = values[row] if rope is None else rotated(values[row], position, rope).to(world["k"].dtype).double()
        if kv.format.startswith("fp8"):
            divisor = 1.0 if scale is None else torch.as_tensor(scale, dtype=FP32).view(-1, 1)
            limit = torch.finfo(KV_FORMATS[kv.format]).max
            x = (x.float() / divisor).clamp(-limit, limit).double()
        result[slot], written[slot] = x, True
    return result, written


def make_world(form: str, page_size: int | None, dtype: torch.dtype, rope: RopeTable | None, slots: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    fields, rows, num_blocks = addressing(form, page_size)
    num_rows = sum(Q_LENS) + PADDING_ROWS
    k = (torch.randn(num_rows, HEADS, DIM, generator=generator) * 30).to(dtype)
    v = (torch.randn(num_rows, HEADS, DIM_VO, generator=generator) * 300).to(dtype)
    q = torch.randn(num_rows, QUERY_HEADS, DIM, generator=generator).to(dtype) if rope is not None else None
    free = torch.randperm(num_blocks * (page_size or 1), generator=generator)[:num_rows]
    free[1] = free[-1] = -1
    tokens, row = [], 0
    for request, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        for token in range(q_len):
            position = kv_len - q_len + token
            own = int(rows[request][position]) if position >= 0 else -1
            tokens.append((row, position, int(free[row]) if slots else own))
            row += 1
    if slots:
        fields = {**fields, "slot_mapping": free}
    lengths = (torch.tensor([0, *Q_LENS]).cumsum(0).int(), torch.tensor(KV_LENS, dtype=torch.int32))
    return {
        "k": k,
        "v": v,
        "q": q,
        "rope": rope,
        "tokens": tokens,
        "num_blocks": num_blocks,
        "batch": Batch(*lengths, **fields),
    }


def moved(record, device: str):
    """A record with its tensors on ``device``."""
    values = {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in vars(record).items()}
    return type(record)(**values)


def run(world: dict, kv: KVCache, device: str, exact: bool) -> None:
    there, batch = moved(kv, device), moved(world["batch"], device)
    rope = None if world["rope"] is None else moved(world["rope"], device)
    q = None if world["q"] is None else world["q"].clone().to(device)
    append_kv(world["k"].to(device), world["v"].to(device), there, batch, rope, q)
    for which, cache in zip(("k", "v"), there.as_nhd(), strict=True):
        flat = cache.cpu().reshape(-1, HEADS, cache.shape[-1])
        values, written = expected_cache(world, kv, which)
        untouched = flat.view(torch.uint8).flatten(1)[~written]
        assert (untouched == POISON_BYTE).all()
        assert written.any()
        rotates = which == "k" and world["rope"] is not None
        stored = values[written].float().to(flat.dtype)
        close(flat[written], stored, exact or not rotates, flat.dtype if flat.element_size() == 1 else world["k"].dtype)
    if q is not None:
        positions = {row: position for row, position, _ in world["tokens"] if position >= 0}
        for row in range(q.shape[0]):
            given = world["q"][row]
            if row in positions:
                close(q[row].cpu(), rotated(given.double(), positions[row], world["rope"]), False, given.dtype)
            else:
                assert torch.equal(q[row].cpu(), given)


@pytest.mark.parametrize(
    ("form", "page_size", "layout", "kv_format", "dtype"),
    [
        ("dense", 16, "NHD", "bf16", BF16),
        ("dense", 3, "HND", "fp16", FP32),
        ("dense", 1, "NHD", "bf16", FP32),
        ("indptr", 5, "NHD", "fp32", FP16),
        ("ragged", None, "HND", "fp16", FP16),
        ("indptr", 256, "HND", "fp8_e5m2", BF16),
    ],
)
def test_writes_each_token_to_its_place(form, page_size, layout, kv_format, dtype, device):
    world = make_world(form, page_size, dtype, None, slots=False)
    run(world, empty_cache(kv_format, layout, page_size, world["num_blocks"]), device, exact=True)


@pytest.mark.parametrize(("form", "page_size"), [("dense", 4), ("ragged", None)])
@pytest.mark.parametrize("rotate", [False, True])
def test_slot_mapping_overrides_the_table(form, page_size, rotate, device):
    rope = RopeTable.make(RopeConfig(DIM), "cpu") if rotate else None
    world = make_world(form, page_size, FP32, rope, slots=True)
    run(world, empty_cache("fp32", "NHD", page_size, world["num_blocks"]), device, exact=not rotate)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("rotary_dim", [DIM, 6])
def test_rotates_k_and_q(pairs, tabled, rotary_dim, device):
    scaling = YarnScaling(4.0, 64) if rotary_dim == DIM else LinearScaling(2.0)
    rope = RopeTable.make(RopeConfig(rotary_dim, pairs=pairs, scaling=scaling), "cpu", 64 if tabled else None)
    for dtype, layout in ((FP32, "NHD"), (BF16, "HND")):
        world = make_world("indptr", 3, dtype, rope, slots=False)
        kv_format = "fp32" if dtype == FP32 else "bf16"
        run(world, empty_cache(kv_format, layout, 3, world["num_blocks"]), device, exact=False)


def rounding_traps(dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Float32 values that an inexact division by ``scale`` puts on the other side of a rounding boundary of ``dtype``."""
    codes = torch.arange(1, 120, dtype=torch.uint8).view(dtype).float()
    ties = (codes[1:] + codes[:-1]) / 2 * torch.tensor(scale)
    values = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(1e9))])
    divided, multiplied = values / torch.tensor(scale), values * (1 / torch.tensor(scale))
    return values[divided.to(dtype).view(torch.uint8) != multiplied.to(dtype).view(torch.uint8)]


@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scales", ["none", "float", "scalar", "head"])
def test_quantises(kv_format, scales, device):
    world = make_world("dense", 16, FP32, None, slots=False)
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e9, -1e9, 0.0, -0.0, 1e-9, 448.0, 464.0, 57344.0, 61440.0])
    world["k"][0, 0, : len(values)] = values
    traps = rounding_traps(KV_FORMATS[kv_format], 0.3)[:DIM]
    assert len(traps) >= 4
    world["k"][1, 0, : len(traps)] = traps
    pairs = {
        "none": (None, None),
        "float": (0.3, 3.0),
        "scalar": (torch.tensor(0.3), torch.tensor(3.0)),
        "head": (torch.tensor([0.3, 7.0]), torch.tensor([3.0, 0.01])),
    }
    run(world, empty_cache(kv_format, "NHD", 16, world["num_blocks"], pairs[scales]), device, exact=True)


def test_quantises_after_rotating(device):
    rope = RopeTable.make(RopeConfig(DIM), "cpu", 64)
    world = make_world("dense", 16, BF16, rope, slots=False)
    run(world, empty_cache("fp8_e4m3", "NHD", 16, world["num_blocks"], (0.5, 2.0)), device, exact=False)


def test_nothing_to_write(device):
    kv = moved(empty_cache("bf16", "NHD", 16, 2), device)
    lengths = [torch.zeros(size, dtype=torch.int32, device=device) for size in (1, 0)]
    batch = Batch(*lengths, table=torch.zeros(0, 1, dtype=torch.int32, device=device))
    k, v = (torch.ones(3, HEADS, dim, dtype=BF16, device=device) for dim in (DIM, DIM_VO))
    append_kv(k, v, kv, batch, None, None)
    assert all((cache.contiguous().view(torch.uint8) == POISON_BYTE).all() for cache in (kv.k, kv.v))
