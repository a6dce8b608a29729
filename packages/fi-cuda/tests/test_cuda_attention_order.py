"""Tiles in order and in pieces: the host's list, the kernel's beside it, and calls that merge pieces."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from emulated_kernels import emulate
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_core.reference.attention import oracle
from fi_cuda.kernels.attention import layout, order, plan, prefill_state, prefill_tuning
from fi_cuda.kernels.attention.order import (
    HEADER_WIDTH,
    OrderList,
    OrderPlanner,
    arrangement,
    fill_order_on_host,
    has_fast_memory,
    order_rows,
    order_slots,
    order_spec,
)
from fi_cuda.kernels.attention.plan import ITEM_WIDTH
from fi_cuda.kernels.attention.prefill_tuning import built_in_prefill_tuning, prefill_params
from fi_scheduler.partition import PartitionBounds

CAPACITY = Capacity(max_batch=64, max_q_tokens=2**14, max_q_len=2**13, max_kv_len=2**16)
SPECS = {
    "causal": AttentionSpec(32, 8, 128),
    "one head": AttentionSpec(8, 1, 128),
    "full": AttentionSpec(32, 8, 128, causal=False),
    "window": AttentionSpec(28, 4, 128, windows=(1000,)),
    "no groups": AttentionSpec(2, 2, 256),
}


class Lists:
    """What lists of a spec need, for tiles of up to ``pieces`` pieces."""

    def __init__(self, spec, pieces, workers=132, fast_memory=False):
        self.window = spec.windows[0]
        self.tuning = replace(built_in_prefill_tuning(spec), pieces=pieces)
        self.params = prefill_params(spec, CAPACITY, self.tuning, self.window, workers)
        self.spec = order_spec(self.params, CAPACITY, self.tuning, spec.page_size, fast_memory=fast_memory)
        self.max_tiles = PartitionBounds.from_capacity(self.params, CAPACITY).max_tiles

    def empty(self, device="cpu"):
        rows = order_rows(self.params, self.tuning, self.max_tiles)
        shapes = ((rows, ITEM_WIDTH), (HEADER_WIDTH,), (CAPACITY.max_batch + 1,))
        return OrderList(*(torch.full(shape, -7, dtype=torch.int32, device=device) for shape in shapes))

    def on_host(self, q_indptr, kv_lens):
        made = self.empty()
        fill_order_on_host(q_indptr, kv_lens, self.spec, self.window, made)
        num_rows, used, *_ = made.header.tolist()
        return num_rows, used, made.items[: num_rows * used].tolist()


def random_batch(rng):
    q_lens = [rng.choice([0, 1, 5, 128, 200, 512, 2048]) for _ in range(rng.choice([1, 1, 2, 4, 16, 64]))]
    while sum(q_lens) > CAPACITY.max_q_tokens:
        q_lens[q_lens.index(max(q_lens))] = 1
    kv_lens = [q_len + rng.choice([0, 10, 1000, 8192, 32768]) for q_len in q_lens]
    if rng.random() < 0.4:  # equal requests, with few lengths of tiles
        q_lens, kv_lens = [q_lens[0] % 300] * len(q_lens), [kv_lens[0]] * len(q_lens)
    return torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor(kv_lens, dtype=torch.int32)


# 16 pieces have to leave each step of each tile to exactly one of them, and to each a slot.
@pytest.mark.parametrize("name", SPECS)
def test_pieces_make_up_their_tiles(name):
    rng, whole, pieces = random.Random(name), Lists(SPECS[name], 1), Lists(SPECS[name], 16)
    heads, tokens, cut = pieces.spec.heads, pieces.spec.tokens, 0
    for _ in range(60):
        batch = random_batch(rng)
        num_tiles, _, _ = whole.on_host(*batch)
        num_rows, used, rows = pieces.on_host(*batch)
        if not used:
            continue
        assert num_rows * heads <= num_tiles * heads + order_slots(pieces.params, pieces.tuning)
        found, slots, counters = defaultdict(list), [], set()
        for row in rows:
            found[row[0], row[2]].append(row)
        assert len(found) == num_tiles
        for (request, q_tile), parts in found.items():
            q_begin, q_end, kv_len = *batch[0][request : request + 2].tolist(), batch[1][request].item()
            end = min((q_tile + 1) * pieces.spec.tile_tokens, q_end - q_begin)
            stop = kv_len - (q_end - q_begin) + end if SPECS[name].causal else kv_len
            assert all(part[8:11] == [q_begin, q_end - q_begin, kv_len] for part in parts)
            ranges = [tuple(part[4:6]) for part in parts]
            assert all(first[1] == second[0] for first, second in zip(ranges, ranges[1:], strict=False))
            assert all((begin - ranges[0][0]) % tokens == 0 or begin == stop for begin, _ in ranges)
            assert ranges[-1][1] == stop and (pieces.window is not None or ranges[0][0] == 0)
            if len(parts) == 1:
                assert parts[0][6] == -1 and parts[0][11:] == [-1, 0, 0, 0, 0]
                continue
            cut += 1
            (first, *_), count = parts, len(parts)
            assert [part[6] for part in parts] == list(range(first[6], first[6] + count))
            assert all(part[11:] == first[11:] for part in parts)
            assert first[12:] == [first[6], first[6] + 1, first[6] + count, count]
            counters.update(range(first[11], first[11] + heads))
            slots += [first[6] + head * count + piece for head in range(heads) for piece in range(count)]
        assert sorted(slots) == list(range(len(slots))) and len(slots) <= pieces.spec.slots
        assert counters == set(range(len(counters))) and len(counters) <= max(pieces.spec.slots // 2, 0)
    assert cut > 10


def test_what_is_left_after_whole_rounds_is_taken_in_pieces():
    spec, whole = (Lists(SPECS["causal"], pieces).spec for pieces in (16, 1))
    long = spec.bin_of(256)
    assert arrangement([long] * 12, spec) == (True, 0, 4)  # 96 tiles: 384 pieces are 2.9 rounds of a quarter
    assert arrangement([long] * 12, whole)[0] is False
    assert arrangement([long] * 43, spec) == (True, 33, 3)  # two rounds, and 80 tiles
    assert arrangement([long] * 33, spec) == (True, 33, 1)
    assert arrangement([spec.bin_of(3)] * 12, spec) == (True, 12, 1)  # a piece's way through memory takes longer
    assert arrangement([], spec) == (True, 0, 1)


def test_memory_that_feeds_every_block_has_shares_in_the_place_of_pieces():
    tuning = built_in_prefill_tuning(SPECS["causal"])
    assert has_fast_memory(SPECS["causal"], tuning, 4915)
    assert not has_fast_memory(SPECS["causal"], tuning, 3352)
    assert not has_fast_memory(replace(SPECS["causal"], kv_format="fp8_e4m3"), tuning, 4915)
    slow, fast = (Lists(SPECS["causal"], 16, fast_memory=fast).spec for fast in (False, True))
    long, half_empty = slow.bin_of(256), slow.bin_of(205)
    tiles = [long] * 8 + [half_empty] * 4
    assert arrangement(tiles, slow) == (True, 0, 4)
    assert arrangement(tiles, fast)[0] is False
    assert arrangement([long] * 11, fast) == arrangement([long] * 11, slow) == (True, 0, 3)  # two rounds, all full
    assert arrangement([long] * 43, fast) == (True, 33, 3)  # after whole rounds


# A third of the tiles has 32 tokens and takes less time: 11, 11 and 10 rows of the others and 6, 5 and 5 of these are a round.
def test_pieces_of_a_request_are_in_work_at_the_same_time():
    q_indptr = torch.tensor([0, 128, 256, 384, 512], dtype=torch.int32)
    _, _, rows = Lists(SPECS["causal"], 16).on_host(q_indptr, torch.full((4,), 2**15, dtype=torch.int32))
    is_short = [row[2] == 2 for row in rows]
    assert is_short == [
        short for short, count in enumerate([11, 6, 11, 5, 10, 5]) for short in [short % 2 == 1] * count
    ]
    for short, count in ((False, 8), (True, 4)):
        numbers = [row[6] - row[12] for row, its in zip(rows, is_short, strict=True) if its is short]
        assert numbers == [0] * count + [1] * count + [2] * count + [3] * count


def check_the_kernel(name, pieces, device, num_batches):
    rng, lists = random.Random(name), Lists(SPECS[name], pieces, fast_memory=name == "causal")
    made = lists.empty(device)
    planner = OrderPlanner(lists.spec, CAPACITY, lists.window, made)
    for _ in range(num_batches):
        q_indptr, kv_lens = random_batch(rng)
        num_rows, used, rows = lists.on_host(q_indptr, kv_lens)
        planner(q_indptr.to(device), kv_lens.to(device))
        assert made.header.tolist() == [num_rows, used, 0, 0]
        assert made.items[: len(rows)].tolist() == rows


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 16])
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_makes_the_same_list(name, pieces):
    check_the_kernel(name, pieces, "cuda", 60)


@pytest.mark.parametrize("pieces", [1, 16])
@pytest.mark.parametrize("name", SPECS)
def test_the_emulated_kernel_makes_the_same_list(name, pieces, monkeypatch):
    emulate(monkeypatch, [order])
    check_the_kernel(name, pieces, "cpu", 12)


# Pieces of tiles that cost nothing to make, so that short ones have some too.
@pytest.mark.parametrize("page_size", [1, 16])
def test_an_emulated_call_merges_pieces(page_size, monkeypatch):
    emulate(monkeypatch, [order, layout, plan, prefill_state, prefill_tuning])
    monkeypatch.setattr(order, "_PIECE_STEPS", 0)
    spec = AttentionSpec(2, 1, 64, page_size=page_size, features=frozenset({"lse"}))
    q_lens, kv_lens = [90, 80, 70, 65], [900, 910, 920, 930]  # a round of 3 workers, and one tile
    counts = [-(-kv_len // page_size) for kv_len in kv_lens]
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(sum(counts), page_size, 1, 64, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(sum(q_lens), 2, 64, generator=generator).bfloat16()
    table = torch.zeros(4, max(counts), dtype=torch.int32)
    for row, part in zip(table, torch.randperm(sum(counts), generator=generator).int().split(counts), strict=True):
        row[: part.shape[0]] = part
    batch = Batch(torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor(kv_lens, dtype=torch.int32), table)
    made = prefill_state.attention_prefill.plan(spec, Capacity(4, 305, 90, 1000), "cpu")
    made.update(batch)
    num_rows, used, *_ = made._orders[None].header.tolist()
    assert used and made._orders[None].items[:num_rows, 15].max() > 1  # pieces of a tile
    kv, layer = KVCache(k, v), LayerArgs().resolve(spec)
    wanted, wanted_lse = oracle(spec, batch, q, kv, layer)
    for _ in range(2):  # the second call finds the counters as the first left them
        out, lse = torch.full_like(q, torch.nan), torch.full((305, 2), torch.nan)
        made.run(q, kv, layer, out, lse)
        torch.testing.assert_close(out.double(), wanted.double(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=1e-3, atol=1e-3)
