"""The search for shared prefixes: the reference against brute force, its levels in attention, arguments and checks."""

from __future__ import annotations

import random

import fi_core as fi
import pytest
import torch
from fi_core import checks
from fi_core.errors import ArgumentError, IndexCheckError
from fi_core.prefixes import SharedPrefixes, check_values
from fi_core.settings import settings

PAGE = 4


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of(paths: list[list[int]], q_len: int = 1) -> fi.Batch:
    """Requests with these pages before their new tokens, and a page of their own behind."""
    width = max(map(len, paths)) + 1
    table = ints([[*path, 1000 + row, *[-1] * (width - len(path) - 1)] for row, path in enumerate(paths)])
    lens = ints([len(path) * PAGE + q_len for path in paths])
    return fi.Batch(torch.arange(len(paths) + 1, dtype=torch.int32) * q_len, lens, table)


def random_paths(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(2) for _ in range(chance.randint(0, 6))] for _ in range(chance.randint(1, 14))]


@pytest.mark.parametrize("seed", range(30))
def test_nodes_are_what_groups_agree_in(seed):
    paths = random_paths(seed)
    batch = batch_of(paths)
    depth, least = 1 + seed % 4, (1, 2 * PAGE, 5 * PAGE)[seed % 3]
    found = fi.find_shared_prefixes(batch, PAGE, max_depth=depth, min_saved_tokens=least)
    # The contract of levels: nested, parents first, within the depth and before the new tokens.
    check_values(found, [len(path) * PAGE for path in paths], depth)
    order = found.order.tolist()
    rows = [row for row in found.nodes.tolist() if any(row)]
    assert found.nodes[len(rows) :].eq(0).all()
    for begin, end, kv_begin, kv_end in rows:
        members = [paths[request] for request in order[begin:end]]
        prefix = members[0][: kv_end // PAGE]
        assert all(path[: len(prefix)] == prefix for path in members)
        assert (end - begin - 1) * (kv_end - kv_begin) >= least
        # All that agree in so much, and as much as all agree in.
        assert sum(path[: len(prefix)] == prefix for path in paths) == end - begin
        longer = {tuple(path[: len(prefix) + 1]) for path in members}
        assert len(longer) > 1 or len(prefix) in map(len, members)


def test_every_group_is_found_when_depth_and_least_allow_it():
    paths = random_paths(5)
    found = fi.find_shared_prefixes(batch_of(paths), PAGE, max_depth=8, min_saved_tokens=1)
    groups = set()
    for path in paths:
        for length in range(1, len(path) + 1):
            members = frozenset(row for row, other in enumerate(paths) if other[:length] == path[:length])
            if len(members) > 1:
                groups.add(members)
    order = found.order.tolist()
    assert {frozenset(order[begin:end]) for begin, end, *_ in found.nodes.tolist() if end} == groups


def test_its_levels_change_nothing_in_attention():
    paths = [[1, 2, 3], [4], [1, 2, 5], [1, 2, 3, 6], [4, 7]]
    batch = batch_of(paths)
    lens = batch.table.clamp(min=0)
    table = torch.where(lens >= 1000, lens - 1000 + 10, lens)
    batch = fi.Batch(batch.q_indptr, batch.kv_lens, table)
    levels = fi.find_shared_prefixes(batch, PAGE, min_saved_tokens=1, max_prefixes=4)
    torch.manual_seed(1)
    k, v, q = torch.randn(20, PAGE, 2, 16), torch.randn(20, PAGE, 2, 16), torch.randn(5, 4, 16)
    spec = fi.AttentionSpec(4, 2, 16, dtype=torch.float32, page_size=PAGE)
    sizes = {"max_batch": 5, "max_q_tokens": 5, "max_q_len": 1, "max_kv_len": 64, "device": "cpu"}
    plain, shared = fi.plan(spec, **sizes), fi.plan(spec, **sizes, max_prefixes=4)
    plain.update(batch)
    shared.update(fi.Batch(batch.q_indptr, batch.kv_lens, table, levels=levels))
    kv = fi.KVCache(k, v)
    assert torch.equal(fi.attention(q, kv, plain), fi.attention(q, kv, shared))


def test_outputs_are_reused_and_arguments_named():
    batch = batch_of([[1, 2], [1, 3]])
    out = SharedPrefixes(torch.full((3, 4), 9, dtype=torch.int32), torch.full((2,), 9, dtype=torch.int32))
    assert fi.find_shared_prefixes(batch, PAGE, out=out) is out
    assert out.nodes.eq(0).all() and out.order.tolist() == [0, 1]  # too little to save
    fi.find_shared_prefixes(batch, PAGE, out=out, min_saved_tokens=1)
    assert out.nodes.tolist() == [[0, 2, 0, PAGE], [0] * 4, [0] * 4]
    for options, name in (
        ({"max_depth": 9}, "max_depth"),
        ({"max_prefixes": 0}, "max_prefixes"),
        ({"min_saved_tokens": 0}, "min_saved_tokens"),
        ({"out": SharedPrefixes(out.nodes)}, "out.order"),
        ({"out": SharedPrefixes(out.nodes.long(), out.order)}, "out.nodes"),
        ({"out": SharedPrefixes(out.nodes, out.order[:1])}, "out.order"),
        ({"out": SharedPrefixes(torch.zeros(3, 5, dtype=torch.int32)[:, :4], out.order)}, "out.nodes"),
    ):
        with pytest.raises(ArgumentError, match=name):
            fi.find_shared_prefixes(batch, PAGE, **options)
    with pytest.raises(ArgumentError, match="page_size"):
        fi.find_shared_prefixes(batch, 0)
    with pytest.raises(ArgumentError, match="table of pages"):
        fi.find_shared_prefixes(fi.Batch(batch.q_indptr, batch.kv_lens, kv_indptr=batch.q_indptr), PAGE)


def test_checked_mode_names_lengths_and_rows_beyond_the_table(monkeypatch):
    monkeypatch.setenv("FI_CHECK", "1")
    settings.cache_clear()
    checks.reset()
    batch = batch_of([[1, 2], [1, 3]])
    try:
        for bad, name in (
            (fi.Batch(batch.q_indptr, batch.kv_lens + 9, batch.table), "batch.kv_lens"),
            (fi.Batch(batch.q_indptr, batch.kv_lens, batch.table, ints([0, 7])), "batch.table_row"),
        ):
            with pytest.raises((IndexCheckError, IndexError), match=name):
                fi.find_shared_prefixes(bad, PAGE)
                checks.raise_pending("cpu")
    finally:
        monkeypatch.undo()
        settings.cache_clear()
        checks.reset()


def test_it_compiles():
    torch._dynamo.reset()
    batch = batch_of([[1, 2, 3], [1, 2], [4]])
    levels = torch.compile(
        lambda: fi.find_shared_prefixes(batch, PAGE, min_saved_tokens=1), fullgraph=True, backend="aot_eager"
    )()
    expected = fi.find_shared_prefixes(batch, PAGE, min_saved_tokens=1)
    assert torch.equal(levels.nodes, expected.nodes) and torch.equal(levels.order, expected.order)
    assert expected.nodes[0].tolist() == [0, 2, 0, 2 * PAGE]
