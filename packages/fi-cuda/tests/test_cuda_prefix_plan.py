"""The list of attention with shared prefixes, its planning kernel in the emulation: it covers every visible key of every
token once and merges just the parts that its items leave."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulated_kernels import EmulatedKernel
from fi_core.ops.cases.prefixes import Forest, forests
from fi_core.prefixes import SharedPrefixes
from fi_core.records import AttentionSpec, Batch, Capacity
from fi_cuda.kernels.attention import layout, prefix_plan, tuning
from fi_cuda.kernels.attention.layout import Layout
from fi_cuda.kernels.attention.plan import DevicePlanner, fill_on_host
from fi_cuda.kernels.attention.prefill_tuning import WARPGROUP_ROWS, box_tokens
from fi_cuda.kernels.attention.prefix import PrefixTuning, built_in_prefix_tuning
from fi_cuda.kernels.attention.prefix_plan import MAX_DEPTH, PrefixLayout, PrefixPlanner, prefix_plan_spec
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES

pytestmark = pytest.mark.timeout(120)

SPEC = AttentionSpec(8, 2, 64)
WORKERS = 12
TUNING = built_in_prefix_tuning(SPEC)
REQUEST, NODE = 0, 1


# The plan


class Planned(NamedTuple):
    """What the planning kernel left: rows of the list, tokens of nodes and their positions, segments of merged tokens."""

    rows: list[list[int]]
    tokens: list[int]
    positions: list[int]
    segments: list[list[list[int]]]
    layout: PrefixLayout


def plan(spec: AttentionSpec, capacity: Capacity, batch: Batch, own: PrefixTuning) -> Planned:
    """Run the planning kernel in the emulation."""
    made = PrefixLayout.of(spec, capacity, own, WORKERS)
    buffer = torch.full((made.num_bytes,), 0xA5, dtype=torch.uint8)
    planner = PrefixPlanner(prefix_plan_spec(spec, capacity, own, WORKERS), capacity, made, buffer)
    planner.__dict__["_kernel"] = EmulatedKernel(planner.spec)
    planner(batch)
    num_rows, num_merged, taken, _ = made.header.of(buffer).tolist()
    assert num_rows > 0 or num_merged == 0
    assert taken == 0 and num_rows <= made.max_rows and num_merged <= capacity.max_q_tokens
    rows, segments = made.rows.of(buffer)[:num_rows], made.segments.of(buffer)[:num_merged]
    tokens, positions = (region.of(buffer).tolist() for region in (made.tokens, made.positions))
    return Planned(rows.tolist(), tokens, positions, segments.tolist(), made)


def capacity_of(q_lens, kv_lens, forest: Forest, **more) -> Capacity:
    sizes = {"max_batch": max(1, len(q_lens)), "max_q_tokens": max(1, sum(q_lens)), "max_q_len": max([1, *q_lens])}
    sizes |= {
        "max_kv_len": max([1, *kv_lens]),
        "max_prefixes": max(1, len(forest.nodes)),
        "max_prefix_depth": forest.depth,
    }
    return Capacity(**{**sizes, **more})


def batch_of(q_lens, kv_lens, forest: Forest) -> Batch:
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    table = torch.zeros(max(1, len(q_lens)), 4, dtype=torch.int32)
    return Batch(q_indptr, torch.tensor(kv_lens, dtype=torch.int32), table, levels=forest.levels(torch.device("cpu")))


def check(spec: AttentionSpec, q_lens, kv_lens, forest: Forest, changes=None, **more) -> Planned:
    """Every key that a token sees is in one of its items, and what items leave is merged or the output, once."""
    batch = batch_of(q_lens, kv_lens, forest)
    own = replace(built_in_prefix_tuning(spec), **(changes or {}))
    planned = plan(spec, capacity_of(q_lens, kv_lens, forest, **more), batch, own)
    starts, tokens = batch.q_indptr.tolist(), sum(q_lens)
    request_of = np.repeat(np.arange(len(q_lens)), q_lens)
    position = [kv_lens[r] - q_lens[r] + token - starts[r] for token, r in enumerate(request_of)]
    seen = [np.zeros(kv_lens[r], dtype=int) for r in request_of]
    left, direct = Counter(), Counter()
    tile = own.tiles.consumers * (WARPGROUP_ROWS // spec.group_size)
    align = box_tokens(spec.page_size, own.tiles.tokens) or 1
    parts = Counter()
    for row in planned.rows:
        request, _, q_tile, kind, kv_begin, kv_end, slot, kv_first, q_begin, q_len, kv_len, *_ = row
        assert 0 <= kv_begin <= kv_end <= kv_len and (kv_begin % align == 0 or kv_begin == kv_end)
        assert q_tile * tile < q_len
        for place in range(q_tile * tile, min((q_tile + 1) * tile, q_len)):
            token = planned.tokens[q_begin + place] if kind == NODE else q_begin + place
            its = request_of[token]
            if kind == NODE:
                assert request in members_of(forest, its, kv_first) and kv_len - q_len >= kv_end
                assert planned.positions[q_begin + place] == position[token]
            else:
                assert its == request
            sees = kv_len - q_len + place + 1 if spec.causal else kv_len  # as the kernel masks
            seen[token][max(kv_begin, kv_first) : min(kv_end, sees)] += 1
            if slot < 0:
                direct[token] += 1
                continue
            for head in range(spec.num_kv_heads):
                for group in range(spec.group_size):
                    part = slot + (head * q_len + place) * spec.group_size + group
                    parts[part] += 1
                    left[token, head, group, part] += 1
    for token in range(tokens):
        visible = position[token] + 1 if spec.causal else kv_lens[request_of[token]]
        wanted = (np.arange(len(seen[token])) < visible).astype(int)
        assert np.array_equal(seen[token], wanted), (token, seen[token])
    assert not parts or (max(parts.values()) == 1 and max(parts) < planned.layout.max_parts and min(parts) >= 0)
    merged = Counter()
    for segments in planned.segments:
        token = segments[0][3]
        for idx, (first, head_rows, pieces, later) in enumerate(segments):
            if pieces == 0:
                break
            if idx > 0:  # a node's tokens stand one after the other behind its keys
                ends = {kv_end for begin, end, _, kv_end in forest.nodes if begin < end}
                assert any(0 <= position[token] + later - kv_end < tokens for kv_end in ends)
            for piece in range(pieces):
                for head in range(spec.num_kv_heads):
                    for group in range(spec.group_size):
                        part = first + (piece * spec.num_kv_heads + head) * head_rows + group
                        merged[token, head, group, part] += 1
    assert merged == left
    in_parts = {token for token, *_ in left}
    assert all(direct[token] == (token not in in_parts) for token in range(tokens))
    return planned


def members_of(forest: Forest, request: int, kv_first: int) -> set[int]:
    """Requests that share the node of ``request`` that begins at ``kv_first``."""
    for begin, end, kv_begin, kv_end in forest.nodes:
        members = {forest.request(place) for place in range(begin, end)}
        if request in members and kv_begin == kv_first and kv_end > kv_begin:
            return members
    return set()


@pytest.mark.parametrize("choose", [False, True])
@pytest.mark.parametrize(
    "case", [case for case in forests() if case[4].get("kv_format") is None], ids=lambda case: case[0]
)
def test_lists_of_the_conformance_cases(case, choose):
    _, forest, q_lens, kv_lens, options = case
    heads = options.get("heads", (4, 2))
    spec = AttentionSpec(*heads, options.get("head_dim", 64), page_size=options.get("page_size", 16),
                         causal=options.get("causal", True))  # fmt: skip
    check(spec, q_lens, kv_lens, forest, {"choose": choose})


@pytest.mark.parametrize("seed", range(60))
def test_lists_of_random_batches(seed):
    chance = random.Random(seed)
    count = chance.choice([1, 2, 5, 30, 90])
    forest = random_forest(chance, count)
    q_lens = [chance.choice([0, 1, 1, 1, 2, 5, chance.choice([16, 60, 130])]) for _ in range(count)]
    shared = [0] * count
    for begin, end, _, kv_end in forest.nodes:
        for place in range(begin, end):
            shared[forest.request(place)] = max(shared[forest.request(place)], kv_end)
    own = chance.choice([20, 300, 3000])
    kv_lens = [
        first + chance.choice([0, chance.randint(0, own)]) + new for first, new in zip(shared, q_lens, strict=True)
    ]
    kv_lens = [0 if not q_len and chance.random() < 0.5 and not first else kv_len
               for q_len, kv_len, first in zip(q_lens, kv_lens, shared, strict=True)]  # fmt: skip
    spec = chance.choice([SPEC, replace(SPEC, causal=False), replace(SPEC, page_size=5), AttentionSpec(7, 1, 128)])
    cheap = {"item_cost": 1, "node_item_cost": 1, "group_cost": 0}
    changes = chance.choice([{}, {"choose": False}, cheap, {"item_cost": 200, "node_item_cost": 400}])
    check(spec, q_lens, kv_lens, forest, changes)


def random_forest(chance: random.Random, count: int) -> Forest:
    nodes: list[tuple[int, int, int, int]] = []

    def grow(begin: int, end: int, kv_begin: int, level: int) -> None:
        kv_end = kv_begin + chance.choice([1, chance.randint(1, 40), chance.randint(1, 2000)])
        nodes.append((begin, end, kv_begin, kv_end))
        while level < 5 and begin < end:
            stop = chance.randint(begin + 1, end)
            if chance.random() < 0.6:
                grow(begin, stop, kv_end, level + 1)
            begin = stop

    place = 0
    while place < count:
        stop = chance.randint(place + 1, count)
        if chance.random() < 0.8:
            grow(place, stop, 0, 1)
        place = stop
        if chance.random() < 0.2:
            nodes.append((0, 0, 0, 0))
    order = list(range(count))
    chance.shuffle(order)
    return Forest(tuple(nodes), tuple(order) if chance.random() < 0.7 else None)


def test_a_batch_that_shares_nothing_is_neither_cut_nor_merged():
    many = check(SPEC, [1] * 40, [100] * 40, Forest(()))
    assert len(many.rows) == 40 and not many.segments and all(row[6] == -1 for row in many.rows)


def test_tables_of_many_requests_lie_in_global_memory():
    q_lens, kv_lens, forest = [1, 2, 1, 1], [90, 95, 120, 40], Forest(((0, 3, 0, 64), (1, 3, 64, 80)), (2, 0, 1, 3))
    few = check(SPEC, q_lens, kv_lens, forest)
    assert check(SPEC, q_lens, kv_lens, forest, max_batch=5000).rows == few.rows


def test_long_requests_read_their_keys_alone():
    planned = check(SPEC, [200, 150, 1, 1], [600, 550, 401, 410], Forest(((0, 4, 0, 400),)))
    assert {row[9] for row in planned.rows if row[3] == NODE} == {2}
    assert {row[0] for row in planned.rows if row[3] == REQUEST and row[4] == 0} == {0, 1}


def test_prefixes_are_cut_for_all_workers_and_suffixes_only_if_they_take_long():
    planned = check(SPEC, [1] * 64, [8192 + 256] * 64, Forest(((0, 64, 0, 8192),)))
    nodes = [row for row in planned.rows if row[3] == NODE]
    # Two tiles of 2 heads, of 48 and of 16 tokens; what is left of 12 workers takes the suffixes meanwhile.
    assert len(nodes) * SPEC.num_kv_heads >= WORKERS // 2 and len(planned.rows) - len(nodes) == 64
    long = check(SPEC, [1] * 4, [20000, 100, 100, 100], Forest(((0, 4, 0, 50),)))
    assert len([row for row in long.rows if row[3] == REQUEST and row[0] == 0]) >= WORKERS // 2


def test_nodes_that_do_not_pay_are_left_to_those_within_them():
    # Of two requests a step is worth less than the parts that it leaves, of ten it is not.
    forest = Forest(((0, 2, 0, 100), (0, 2, 100, 3000), (2, 12, 0, 100), (12, 14, 0, 100)))
    planned = check(SPEC, [1] * 14, [3040] * 14, forest)
    nodes = {(row[0], row[7]) for row in planned.rows if row[3] == NODE}
    assert nodes == {(0, 0), (2, 0)} and max(row[5] for row in planned.rows if row[3] == NODE) == 3000
    given = check(SPEC, [1] * 14, [3040] * 14, forest, {"choose": False})
    assert {(row[0], row[7]) for row in given.rows if row[3] == NODE} == {(0, 0), (0, 100), (2, 0), (12, 0)}


def test_nodes_deeper_than_a_warp_has_lanes_are_read_by_each_request():
    deep = Forest(tuple((0, 3, 16 * level, 16 * level + 16) for level in range(40)))
    planned = check(SPEC, [1] * 3, [700] * 3, deep, {"choose": False})
    assert sorted(row[7] for row in planned.rows if row[3] == NODE) == [16 * level for level in range(MAX_DEPTH)]


def test_tokens_beyond_the_room_share_nothing(monkeypatch):
    monkeypatch.setattr(prefix_plan, "_LEAST_SHARING_TOKENS", 20)
    q_lens, kv_lens, forest = [6] * 4, [3040] * 4, Forest(((0, 2, 0, 1000), (0, 2, 1000, 2000), (2, 4, 0, 2000)))
    capacity = {"max_batch": 8, "max_q_tokens": 40}
    found = [
        {
            (row[0], row[7])
            for row in check(SPEC, q_lens, kv_lens, forest, **capacity, max_prefix_depth=depth).rows
            if row[3]
        }
        for depth in (2, 1)
    ]
    assert found == [{(0, 0)}, {(0, 0)}]


class Yielding(NamedTuple):
    has_list: bool
    decode: DevicePlanner


@pytest.fixture
def yielding(monkeypatch):
    """The planning kernel beside the decode kernel's, for 132 blocks."""
    monkeypatch.setattr(layout, "num_processors", lambda device: 132)
    monkeypatch.setattr(tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)

    def run(spec: AttentionSpec, q_lens, kv_lens, forest: Forest) -> Yielding:
        capacity, cpu = capacity_of(q_lens, kv_lens, forest), torch.device("cpu")
        regions, own = Layout.of(spec, capacity, cpu), built_in_prefix_tuning(spec)
        memory = torch.full((regions.num_bytes,), 0xA5, dtype=torch.uint8)
        lists, scratch = regions.lists[None].of(memory), regions.scratch.of(memory)
        decode = DevicePlanner(regions.params[None], capacity, regions.bounds.max_tiles, lists, scratch)
        made = PrefixLayout.of(spec, capacity, own, 132)
        buffer = torch.full((made.num_bytes,), 0xA5, dtype=torch.uint8)
        planner = PrefixPlanner(prefix_plan_spec(spec, capacity, own, 132, decode.spec), capacity, made, buffer, decode)
        planner.__dict__["_kernel"] = EmulatedKernel(planner.spec)
        planner(batch_of(q_lens, kv_lens, forest))
        return Yielding(int(made.header.of(buffer)[0]) > 0, decode)

    return run


def test_batches_that_are_through_sooner_without_levels_are_left_to_decode(yielding):
    spec = AttentionSpec(32, 8, 128)
    for count, shared, own, wanted in (
        *((64, 8192, 256, True), (32, 4096, 1024, True), (16, 2048, 256, False), (8, 1024, 512, False)),
        *((64, 0, 2048, False), (2, 64, 2048, False)),
    ):
        forest = Forest(((0, count, 0, shared),) if shared else ((0, 1, 0, 64),))
        found = yielding(spec, [1] * count, [shared + own] * count, forest)
        assert found.has_list == wanted, (count, shared, own)


def test_the_decode_kernels_plan_is_made_whoever_has_the_batch(yielding):
    for kv_lens in ([100, 300, 40], [9000] * 48):
        q_lens = [1] * len(kv_lens)
        decode = yielding(AttentionSpec(32, 8, 128), q_lens, kv_lens, Forest(((0, len(q_lens), 0, 30),))).decode
        expected = Layout.of(AttentionSpec(32, 8, 128), decode.capacity, torch.device("cpu"))
        lists = expected.lists[None].of(torch.zeros(expected.num_bytes, dtype=torch.uint8))
        batch = batch_of(q_lens, kv_lens, Forest(()))
        fill_on_host(batch.q_indptr, batch.kv_lens, decode.params, lists)
        num_items = int(lists.worker_indptr[-1])
        assert num_items > 0 and torch.equal(decode.lists.items[:num_items], lists.items[:num_items])


HOSTILE = {
    "beyond the tokens": ([3, 3], [9, 9], {"max_q_tokens": 5, "max_q_len": 3}),
    "longer than a request may be": ([3, 3], [9, 9], {"max_q_len": 2}),
    "more keys than planned": ([1, 1], [9, 90], {"max_kv_len": 80}),
    "negative keys": ([1, 1], [9, -3], {"max_kv_len": 80}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_batches_beyond_the_limits_have_no_work(name):
    q_lens, kv_lens, limits = HOSTILE[name]
    forest = Forest(((0, 2, 0, 4),))
    planned = plan(SPEC, capacity_of(q_lens, kv_lens, forest, **limits), batch_of(q_lens, kv_lens, forest), TUNING)
    assert not planned.rows and not planned.segments


BAD_NODES = {
    "a gap": ((0, 4, 0, 40), (1, 3, 50, 60)),
    "members beyond the batch": ((0, 9, 0, 40),),
    "negative": ((-5, 4, 0, 40), (0, 4, -7, 40)),
    "descending": ((3, 1, 0, 40), (0, 4, 40, 0)),
    "huge": ((0, 4, 0, 2**31 - 1), (0, 2**31 - 1, 0, 40)),
}


@pytest.mark.parametrize("name", BAD_NODES)
def test_nodes_that_are_none_leave_their_members_alone(name):
    given = Forest(BAD_NODES[name])
    batch = batch_of([1] * 4, [100] * 4, given)
    planned = plan(SPEC, replace(capacity_of([1] * 4, [100] * 4, Forest(())), max_prefixes=4), batch, TUNING)
    used = [row for row in planned.rows if row[3] == NODE]
    assert len(used) == (name == "a gap") and len(planned.rows) >= 4


def test_an_order_that_is_none_writes_nothing_outside():
    batch = batch_of([1] * 4, [100] * 4, Forest(((0, 4, 0, 40),)))
    for order in ([0, 0, 0, 0], [9, 1, 2, 3], [-1, 1, 2, 3]):
        levels = SharedPrefixes(batch.levels.nodes, torch.tensor(order, dtype=torch.int32))
        plan(SPEC, capacity_of([1] * 4, [100] * 4, Forest(((0, 4, 0, 40),))), replace(batch, levels=levels), TUNING)
