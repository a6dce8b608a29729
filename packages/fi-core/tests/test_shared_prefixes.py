"""Shared prefixes: the cases share what they say, wrong nodes are named on the host and on the device."""

from __future__ import annotations

import dataclasses

import fi_core as fi
import pytest
import torch
from fi_core import AttentionSpec, Batch, KVCache, SharedPrefixes, checks
from fi_core.ops.cases.kv import CacheForm, indptr_of, make_cache
from fi_core.ops.cases.prefixes import forests, share
from fi_core.reference.append_kv import bytes_view
from fi_core.settings import settings

CPU = torch.device("cpu")
CAPACITY = {"max_batch": 4, "max_q_tokens": 8, "max_q_len": 2, "max_kv_len": 48, "device": "cpu"}
GOOD = ((0, 3, 0, 8), (1, 3, 8, 14))
KV_LENS = (9, 17, 16, 5)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def levels_of(*nodes: tuple[int, ...], order: tuple[int, ...] | None = None) -> SharedPrefixes:
    return SharedPrefixes(ints(*sum(nodes, ())).view(-1, 4), None if order is None else ints(*order))


def batch_of(levels: SharedPrefixes | None = None) -> Batch:
    """Requests 0 to 2 share pages 1 and 2 of 4 tokens, 1 and 2 another; the table has room for 20 tokens."""
    table = ints(1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2, 6, 9, 10, 11, 12, 13, 14, 15).view(4, 5)
    levels = levels_of(*GOOD) if levels is None else levels
    return Batch(ints(0, 1, 3, 4, 5), ints(*KV_LENS), table, levels=levels)


def plan_of(max_prefixes: int = 4, **changes) -> fi.Plan:
    spec = AttentionSpec(2, 2, 8, dtype=torch.float32, page_size=4)
    return fi.plan(spec, **{**CAPACITY, "max_prefixes": max_prefixes, **changes})


def spoiled(plan: fi.Plan, levels: SharedPrefixes | None = None, table: torch.Tensor | None = None) -> None:
    """Attention in checked mode on a batch that became bad after its update, as one on a device may."""
    batch = batch_of()
    plan.update(batch)
    plan.batch = dataclasses.replace(
        batch, levels=batch.levels if levels is None else levels, table=batch.table if table is None else table
    )
    cache = KVCache(torch.zeros(16, 4, 2, 8), torch.zeros(16, 4, 2, 8))
    fi.attention(torch.zeros(5, 2, 8), cache, plan)


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("FI_CHECK", "1")
    settings.cache_clear()
    checks.reset()
    yield
    monkeypatch.undo()
    settings.cache_clear()
    checks.reset()


@pytest.mark.parametrize("case", list(forests()), ids=lambda case: case[0])
def test_cases_share_what_they_say(case, checked):
    _, forest, q_lens, kv_lens, options = case
    page_size, table = options.get("page_size", 16), options.get("table", "dense")
    kv_format = options.get("kv_format", "fp32")
    form = CacheForm(2, 16, 16, kv_format, page_size, table=table, table_row=options.get("table_row", False))
    cache = make_cache(form, kv_lens, CPU, torch.Generator().manual_seed(1))
    share(cache, forest, form)
    batch = Batch(indptr_of(q_lens, CPU), ints(*kv_lens), levels=forest.levels(CPU), **cache.fields)
    spec = AttentionSpec(2, 2, 16, dtype=torch.float32, kv_format=kv_format, page_size=page_size, table=table)
    capacity = {"max_batch": 99, "max_q_tokens": 999, "max_q_len": 99, "max_kv_len": 9999, "max_prefix_depth": 5}
    plan = fi.plan(spec, **capacity, max_prefixes=99, device="cpu")
    plan.update(batch)
    fi.attention(torch.zeros(sum(q_lens), 2, 16), cache.kv, plan)

    def key(request: int, position: int) -> torch.Tensor:
        row = (
            batch.table[request if batch.table_row is None else batch.table_row[request]] if table == "dense" else None
        )
        entries = batch.table[batch.table_indptr[request] :] if row is None else row
        return bytes_view(cache.kv.k)[entries[position // page_size], position % page_size]

    for begin, end, kv_begin, kv_end in forest.nodes:
        for place in range(begin, end):
            for position in {kv_begin, (kv_begin + kv_end) // 2, kv_end - 1} if kv_end else ():
                mine, first = forest.request(place), forest.request(begin)
                assert torch.equal(key(mine, position), key(first, position))


def test_result_is_that_of_the_batch_without_levels():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((5, 2, 8), (16, 4, 2, 8), (16, 4, 2, 8)))
    outputs = []
    for batch in (batch_of(), dataclasses.replace(batch_of(), levels=None)):
        plan = plan_of()
        plan.update(batch)
        outputs.append(fi.attention(q, KVCache(k, v), plan))
    assert torch.equal(*outputs)


BAD = {
    "order of another length": (levels_of(*GOOD, order=(0, 1, 2)), "levels.order"),
    "order with a request twice": (levels_of(*GOOD, order=(0, 1, 2, 2)), "levels.order"),
    "members beyond the batch": (levels_of((0, 5, 0, 8)), r"levels.nodes\[0"),
    "descending members": (levels_of((3, 1, 0, 8)), r"levels.nodes\[0"),
    "descending tokens": (levels_of((0, 3, 8, 4)), r"levels.nodes\[0"),
    "members across a node's end": (levels_of((0, 2, 0, 4), (1, 3, 4, 8)), r"levels.nodes\[1"),
    "child before its parent": (levels_of(GOOD[1], GOOD[0]), r"levels.nodes\[[01]"),
    "gap in front of a child": (levels_of(GOOD[0], (1, 3, 9, 14)), r"levels.nodes\[1"),
    "a root that does not begin at 0": (levels_of((0, 3, 4, 8)), r"levels.nodes\[0"),
    "more than a member's old tokens": (levels_of((0, 3, 0, 9)), r"levels.nodes\[0"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_levels_on_the_host_are_named(name):
    levels, match = BAD[name]
    with pytest.raises(fi.ArgumentError, match=match):
        plan_of().update(batch_of(levels))


@pytest.mark.parametrize("name", [name for name in BAD if "length" not in name])
def test_wrong_levels_on_the_device_are_named_in_checked_mode(name, checked):
    levels, match = BAD[name]
    with pytest.raises(fi.IndexCheckError, match=match):
        spoiled(plan_of(), levels)


def test_good_levels_pass_checked_mode(checked):
    spoiled(plan_of())
    spoiled(plan_of(), levels_of((0, 0, 0, 0), (1, 3, 0, 14), (0, 0, 0, 0), order=(3, 2, 1, 0)))


@pytest.mark.parametrize("form", ["dense", "indptr"])
def test_tables_that_disagree_are_named_in_checked_mode(form, checked):
    batch = batch_of()
    assert batch.table is not None
    table = batch.table.clone()
    table[2, 1] = 11
    plan = plan_of()
    if form == "indptr":
        spec = dataclasses.replace(plan.spec, table="indptr")
        plan = fi.plan(spec, **CAPACITY, max_prefixes=2)
        indptr = ints(0, 5, 10, 15, 20)
        plan.update(dataclasses.replace(batch, table=batch.table.flatten(), table_indptr=indptr))
        plan.batch = dataclasses.replace(plan.batch, table=table.flatten())
        cache = KVCache(torch.zeros(16, 4, 2, 8), torch.zeros(16, 4, 2, 8))
        with pytest.raises(fi.IndexCheckError, match=r"batch.table\[6\]: page 2 .* has page 11"):
            fi.attention(torch.zeros(5, 2, 8), cache, plan)
        return
    with pytest.raises(fi.IndexCheckError, match=r"batch.table\[1, 1\]: page 2 .* has page 11"):
        spoiled(plan, table=table)


def test_the_page_in_which_a_prefix_ends_may_be_a_copy(checked):
    spoiled(plan_of(), levels_of((0, 3, 0, 8), (1, 3, 8, 14)))
    batch = batch_of()
    assert batch.table is not None and int(batch.table[1, 3]) != int(batch.table[2, 3])


def test_capacities_and_forms_are_named():
    with pytest.raises(fi.ArgumentError, match="max_prefixes is 0"):
        plan_of(0).update(batch_of())
    with pytest.raises(fi.CapacityError, match="max_prefixes=1"):
        plan_of(1).update(batch_of())
    with pytest.raises(fi.CapacityError, match="max_prefix_depth=1"):
        plan_of(max_prefix_depth=1).update(batch_of())
    with pytest.raises(fi.ArgumentError, match="levels.nodes"):
        plan_of().update(batch_of(SharedPrefixes(torch.zeros(2, 4))))
    mask = fi.PackedMask(torch.zeros(20, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    spec = AttentionSpec(2, 2, 8, dtype=torch.float32, page_size=4, features={"mask"})
    with pytest.raises(fi.ArgumentError, match="mask.columns"):
        fi.plan(spec, **CAPACITY, max_prefixes=4).update(dataclasses.replace(batch_of(), mask=mask))
    with pytest.raises(fi.ArgumentError, match="max_prefixes"):
        plan_of(-1)
    with pytest.raises(fi.ArgumentError, match="batch_invariant"):
        fi.plan(AttentionSpec(2, 2, 8, batch_invariant=True), **CAPACITY, max_prefixes=1)
    with pytest.raises(fi.ArgumentError, match="ragged"):
        fi.plan(AttentionSpec(2, 2, 8, table="ragged", page_size=None), **CAPACITY, max_prefixes=1)
