"""Checked mode names the first bad index, and lets good batches through."""

from __future__ import annotations

import contextlib
import dataclasses

import fi_core as fi
import pytest
import torch
from fi_core import (
    AttentionSpec,
    Batch,
    DrawKeys,
    FilterParams,
    IndexCheckError,
    KVCache,
    PackedMask,
    PenaltyParams,
    RopeConfig,
    RopeTable,
    checks,
)
from fi_core.settings import settings


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setenv("FI_CHECK", "1")
    settings.cache_clear()
    checks.reset()
    yield
    monkeypatch.undo()
    settings.cache_clear()
    checks.reset()


def batch_of(**changes) -> Batch:
    table = ints(3, 1, 99, 0, 2, 99).view(2, 3)
    return dataclasses.replace(Batch(ints(0, 1, 3), ints(8, 6), table), **changes)


def cache_of(num_pages: int = 4) -> KVCache:
    return KVCache(torch.zeros(num_pages, 4, 2, 8), torch.zeros(num_pages, 4, 2, 8))


def attend(batch: Batch, kv: KVCache | None = None, **options) -> torch.Tensor:
    """Attention on a batch whose contents were spoiled after ``update``: the host's own checks saw good lengths."""
    spec = AttentionSpec(
        **{
            "num_qo_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 8,
            "dtype": torch.float32,
            "page_size": 4,
            "table": batch.table_form,
            **options,
        }
    )
    plan = fi.plan(spec, max_batch=4, max_q_tokens=4, max_q_len=3, max_kv_len=11, device="cpu")
    plan.batch = batch
    plan.state = type("NoKernel", (), {"run": lambda self, *arguments: None})()
    return fi.attention(torch.zeros(3, 2, 8), kv or cache_of(), plan)


def test_good_batches_pass_although_unused_entries_are_wild():
    attend(batch_of())
    attend(batch_of(table=ints(3, 1, 0, 2, 99), table_indptr=ints(0, 2, 4)))
    attend(batch_of(table_row=ints(1, 0)))
    attend(batch_of(table=ints(99, 1, 99, 0, 2, 99).view(2, 3)), windows=(3,))
    attend(Batch(ints(0), ints(), torch.zeros(0, 3, dtype=torch.int32)))
    ragged = KVCache(torch.zeros(20, 2, 8), torch.zeros(20, 2, 8))
    attend(batch_of(table=None, kv_indptr=ints(2, 12, 20)), ragged, page_size=None)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (r"batch\.table\[0, 1\]: 4 is outside its limit 3", {"table": ints(3, 4, 0, 7, 2, 99).view(2, 3)}),
        (r"batch\.table\[1, 0\]: -1 ", {"table": ints(3, 1, 99, -1, 2, 99).view(2, 3)}),
        (r"batch\.table\[2\]: 5 ", {"table": ints(3, 1, 5, 2), "table_indptr": ints(0, 2, 4)}),
        (r"batch\.table_row\[1\]: 2 is outside its limit 1", {"table_row": ints(0, 2)}),
        (r"batch\.table_row\[0\]: -1 ", {"table_row": ints(-1, 0)}),
        (r"batch\.table_indptr\[2\]: 5 ", {"table": ints(3, 1, 0, 2), "table_indptr": ints(0, 2, 5)}),
        (r"batch\.table_indptr\[2\]: 1 ", {"table": ints(3, 1, 0, 2), "table_indptr": ints(0, 2, 1)}),
        (r"batch\.kv_lens\[1\]: 12 is outside its limit 11", {"kv_lens": ints(8, 12)}),
        (r"batch\.kv_lens\[0\]: -8 ", {"kv_lens": ints(-8, 6)}),
        (
            r"batch\.kv_lens\[0\]: 9 is outside its limit 8",
            {"kv_lens": ints(9, 6), "table": ints(3, 1, 0, 2), "table_indptr": ints(0, 2, 4)},
        ),
        (r"batch\.q_indptr\[1\]: -1 ", {"q_indptr": ints(0, -1, 3)}),
        (r"batch\.q_indptr\[2\]: 4 is outside its limit 3", {"q_indptr": ints(0, 1, 4)}),
        (r"batch\.q_indptr\[2\]: 1 is outside its limit 2", {"q_indptr": ints(0, 2, 1)}),
        (r"batch\.q_indptr\[0\]: 1 ", {"q_indptr": ints(1, 2, 3)}),
    ],
)
def test_attention_names_the_first_bad_element(text, changes):
    with pytest.raises(IndexCheckError, match=text):
        attend(batch_of(**changes))
    attend(batch_of())


def test_what_a_huge_table_holds_is_counted_in_64_bits():
    table = torch.zeros(1, dtype=torch.int32).expand(1, 2**24)
    batch = Batch(ints(0, 1), ints(300), table)
    kv = KVCache(torch.zeros(1, 256, 1, 8), torch.zeros(1, 256, 1, 8))
    checks.check_append(torch.zeros(1, 1, 8), kv, batch, None)


def test_attention_checks_ragged_rows():
    ragged = KVCache(torch.zeros(20, 2, 8), torch.zeros(20, 2, 8))
    with pytest.raises(IndexCheckError, match=r"kv_indptr\[2\]: 21 is outside its limit 20"):
        attend(batch_of(table=None, kv_indptr=ints(2, 12, 21)), ragged, page_size=None)


@pytest.mark.parametrize(
    ("columns", "indptr", "text"),
    [
        ("kv", [0, 1, 3], None),
        ("kv", [0, 2, 9], r"mask\.indptr\[1\]: 2 is outside its limit 1"),
        ("kv", [-1, 1, 3], r"mask\.indptr\[0\]: -1 "),
        ("new", [0, 1, 9], None),
        ("new", [3, 1, 9], r"mask\.indptr\[0\]: 3 is outside its limit 2"),
    ],
)
def test_attention_checks_where_mask_rows_lie(columns, indptr, text):
    mask = PackedMask(torch.zeros(3, dtype=torch.uint8), torch.tensor(indptr), columns)
    found = contextlib.nullcontext() if text is None else pytest.raises(IndexCheckError, match=text)
    with found:
        attend(batch_of(mask=mask), features={"mask"})


@pytest.mark.parametrize("bad", [-1, 3])
def test_sample_checks_rows(bad):
    keys = DrawKeys(torch.zeros(2, dtype=torch.int64), ints(0, 0), torch.zeros(2, dtype=torch.int64))
    fi.sample(torch.zeros(3, 5), FilterParams(), keys, rows=ints(2, 0))
    with pytest.raises(IndexCheckError, match=rf"^rows\[1\]: {bad} is outside its limit 2"):
        fi.sample(torch.zeros(3, 5), FilterParams(), keys, rows=ints(0, bad))


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (r"penalties\.rows\[0\]: 4 is outside its limit 3", {"rows": ints(4, 0)}),
        (r"penalties\.rows\[1\]: 3 is outside its limit 2", {"rows": ints(0, 3), "prompt_counts": 3}),
        (r"penalties\.rows\[1\]: -1 ", {"rows": ints(0, -1)}),
        (r"penalties\.bias_indptr\[2\]: 3 is outside its limit 2", {"bias_indptr": ints(0, 1, 3)}),
        (r"penalties\.bias_indptr\[2\]: 0 is outside its limit 1", {"bias_indptr": ints(0, 1, 0)}),
    ],
)
def test_penalties_are_checked(text, changes):
    good = {"repetition": torch.ones(2), "rows": ints(3, 0), "output_counts": 4, "bias_indptr": ints(0, 1, 2)}
    good |= {"bias_tokens": ints(1, 2), "bias_values": torch.ones(2)}

    def penalize(**values):
        counts = {name: torch.zeros(values[name], 5, dtype=torch.int32) for name in values if name.endswith("counts")}
        fi.penalize_logits(torch.zeros(2, 5), PenaltyParams(**values | counts))

    penalize(**good)
    with pytest.raises(IndexCheckError, match=text):
        penalize(**good | changes)


def test_append_checks_slots_pages_and_positions():
    k = torch.zeros(5, 2, 8)
    good = torch.tensor([15, -1, 0, 999, 999])
    fi.append_kv(k, k, cache_of(), batch_of(slot_mapping=good))
    with pytest.raises(IndexCheckError, match=r"slot_mapping\[2\]: 16 is outside its limit 15"):
        fi.append_kv(k, k, cache_of(), batch_of(slot_mapping=torch.tensor([15, -1, 16, -1, -1])))
    with pytest.raises(IndexCheckError, match=r"table\[0, 1\]: 7 is outside its limit 3"):
        fi.append_kv(k, k, cache_of(), batch_of(table=ints(99, 7, 99, 99, 2, 99).view(2, 3)))
    table = RopeTable.make(RopeConfig(8), "cpu", 7)
    with pytest.raises(IndexCheckError, match=r"kv_lens\[0\]: 8 is outside its limit 7"):
        fi.append_kv(k, k, cache_of(), batch_of(), rope=table)


def test_a_record_keeps_the_first_finding_until_it_is_raised():
    record = checks.Record(torch.device("cpu"))
    values = torch.tensor([1, 20, 30])
    record.note("batch.kv_lens", values > 10, values, 10)
    record.note("batch.table", values > 0, values, 0)
    with pytest.raises(IndexCheckError, match=r"batch\.kv_lens\[1\]: 20 is outside its limit 10"):
        record.publish()
    record.publish()
    checks.raise_pending("cpu")
