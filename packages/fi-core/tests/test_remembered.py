"""What is remembered about records: by identity, never for another record, and no check is lost by it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, Batch, KVCache, RopeConfig, RopeTable
from fi_core.remembered import Remembered


@dataclass(frozen=True)
class Record:
    number: int


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache_of(heads: int = 2, dim: int = 8, layout: str = "NHD") -> KVCache:
    shape = (4, 4, heads, dim) if layout == "NHD" else (4, heads, 4, dim)
    return KVCache(torch.zeros(shape), torch.zeros(shape), layout)


def batch_of(**changes: torch.Tensor) -> Batch:
    return Batch(**{"q_indptr": ints(0, 1, 3), "kv_lens": ints(1, 2), "table": ints(0, 1).view(2, 1), **changes})


def test_value_belongs_to_one_record_not_to_its_equals():
    known: Remembered[str] = Remembered()
    record, equal = Record(1), Record(1)
    known.put(record, "seen")
    assert known.get(record) == "seen" and known.get(equal) is None
    known.put(record, "again")
    assert known.get(record) == "again"


def test_record_at_the_address_of_a_dead_one_is_unknown():
    known: Remembered[str] = Remembered()
    reused = 0
    for number in range(200):
        record = Record(number)
        address = id(record)
        known.put(record, "seen")
        del record
        record = Record(number)
        reused += id(record) == address
        assert known.get(record) is None
    assert reused > 0


def test_remembering_is_bounded_and_keeps_nothing_alive():
    known: Remembered[int] = Remembered()
    records = [Record(number) for number in range(5000)]
    for record in records:
        known.put(record, record.number)
    assert known.get(records[-1]) == 4999 and known.get(records[0]) is None
    dead = weakref.ref(records.pop())
    del record
    gc.collect()
    assert dead() is None


def test_append_and_copy_keep_no_record_alive():
    kv, batch, rope = cache_of(), batch_of(), RopeTable.make(RopeConfig(8), "cpu")
    k = torch.randn(3, 2, 8)
    fi.append_kv(k, k, kv, batch, rope=rope)
    fi.copy_pages(kv, kv, ints(0), ints(1))
    references = [weakref.ref(record) for record in (kv, batch, rope)]
    del kv, batch, rope
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_append_checks_the_cache_at_the_address_of_a_dead_one():
    k, batch, reused = torch.randn(3, 2, 8), batch_of(), 0
    parts = torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8)
    wrong = torch.zeros(4, 4, 2, 4), torch.zeros(4, 4, 2, 4)
    for _ in range(50):
        kv = KVCache(*parts)
        address = id(kv)
        fi.append_kv(k, k, kv, batch)
        del kv
        kv = KVCache(*wrong)
        reused += id(kv) == address
        with pytest.raises(ArgumentError, match=r"kv\.k"):
            fi.append_kv(k, k, kv, batch)
        del kv
    assert reused > 0


def test_append_checks_a_known_cache_against_other_heads_and_dims():
    kv, batch = cache_of(), batch_of()
    fi.append_kv(torch.randn(3, 2, 8), torch.randn(3, 2, 8), kv, batch)
    for k_shape, v_shape, name in (
        ((3, 1, 8), (3, 1, 8), "k"),
        ((3, 2, 4), (3, 2, 8), r"kv\.k"),
        ((3, 2, 8), (3, 2, 4), r"kv\.v"),
    ):
        with pytest.raises(ArgumentError, match=name):
            fi.append_kv(torch.randn(k_shape), torch.randn(v_shape), kv, batch)
    fi.append_kv(torch.randn(3, 2, 8), torch.randn(3, 2, 8), kv, batch)


def test_append_names_the_same_fault_each_time():
    k = torch.randn(3, 2, 8)
    expanded = KVCache(torch.zeros(1, 4, 2, 8).expand(4, 4, 2, 8), torch.zeros(4, 4, 2, 8))
    short = batch_of(table=ints(0).view(1, 1))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"kv\.k"):
            fi.append_kv(k, k, expanded, batch_of())
        with pytest.raises(ArgumentError, match=r"batch\.table"):
            fi.append_kv(k, k, cache_of(), short)


def test_append_checks_a_batch_with_another_slot_mapping():
    k, kv = torch.randn(3, 2, 8), cache_of()
    batch = batch_of(slot_mapping=torch.tensor([0, 5, -1]))
    fi.append_kv(k, k, kv, batch)
    for wrong in (torch.tensor([0, 5]), torch.tensor([0.0, 5.0, 1.0]), torch.tensor([[0, 5, 1]])):
        with pytest.raises(ArgumentError, match=r"batch\.slot_mapping"):
            fi.append_kv(k, k, kv, replace(batch, slot_mapping=wrong))
    # A known batch, but k of another length than its slots.
    with pytest.raises(ArgumentError, match=r"batch\.slot_mapping"):
        fi.append_kv(torch.randn(4, 2, 8), torch.randn(4, 2, 8), kv, batch)
    with pytest.raises(ArgumentError, match=r"batch\.q_indptr"):
        fi.append_kv(k.to("meta"), k.to("meta"), kv, batch)


def test_append_reads_lengths_of_a_known_batch_again():
    k, kv, batch = torch.randn(3, 2, 8), cache_of(), batch_of()
    fi.append_kv(k, k, kv, batch)
    batch.kv_lens[1] = -1
    with pytest.raises(ArgumentError, match=r"batch\.kv_lens"):
        fi.append_kv(k, k, kv, batch)


def test_rope_table_that_fits_one_device_is_checked_for_another():
    table = RopeTable.make(RopeConfig(8), "cpu")
    for _ in range(2):
        table.check("rope", torch.device("cpu"))
        with pytest.raises(ArgumentError, match=r"rope\.inv_freq"):
            table.check("rope", torch.device("meta"))
    wrong = RopeTable(RopeConfig(8), torch.zeros(3))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"rope\.inv_freq"):
            wrong.check("rope", torch.device("cpu"))


def test_copy_checks_a_known_target_with_another_source():
    source, target, pages = cache_of(), cache_of(), ints(0)
    fi.copy_pages(source, target, pages, pages)
    for other in (cache_of(heads=1), cache_of(dim=4), cache_of(layout="HND")):
        with pytest.raises(ArgumentError, match="target"):
            fi.copy_pages(other, target, pages, pages)
    fi.copy_pages(source, target, pages, pages)
    expanded = KVCache(torch.zeros(1, 4, 2, 8).expand(4, 4, 2, 8), torch.zeros(4, 4, 2, 8))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"target\.k"):
            fi.copy_pages(source, expanded, pages, pages)
