"""What the decode kernel is tuned to and what it serves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from fi_core.contract import Target, check_entry
from fi_core.errors import ArgumentError
from fi_core.hookspecs import hookimpl
from fi_core.ops import OPERATIONS
from fi_core.records import AttentionSpec, Capacity, KVCache
from fi_core.registry import registry
from fi_core.rope import FusedRope
from fi_cuda.entries import ATTENTION_ENTRIES
from fi_cuda.kernels.attention import boxes, tuning
from fi_cuda.kernels.attention.call import MASK_FORMS, TABLE_FORMS, CallForm
from fi_cuda.kernels.attention.decode import decode_spec
from fi_cuda.kernels.attention.mixed_state import attention_mixed, attention_short
from fi_cuda.kernels.attention.prefix_state import attention_apart, attention_prefix
from fi_cuda.kernels.attention.tuning import (
    HOPPER_SHARED_BYTES,
    DecodeTuning,
    HeadForm,
    built_in_tuning,
    partition_params,
    shared_bytes,
    tuning_for,
)

CPU = torch.device("cpu")
SPEC = AttentionSpec(8, 2, 64)
CAPACITY = Capacity(max_batch=5, max_q_tokens=10, max_q_len=2, max_kv_len=500)

SHAPES = list(itertools.product((16, 64, 80, 128, 192, 256), (1, 3, 4, 8, 16, 128), (1, 4, 16), ("bf16", "fp8_e4m3")))


@pytest.mark.parametrize("limit", [HOPPER_SHARED_BYTES, 163 << 10, 99 << 10])
def test_every_served_shape_has_a_tile_and_two_stages(limit):
    for (head_dim, group, max_q_len, kv_format), rotated in itertools.product(SHAPES, (False, True)):
        rope = FusedRope(head_dim // 32 * 32, keys=True) if rotated and head_dim >= 32 else None
        spec = AttentionSpec(group * 2, 2, head_dim, kv_format=kv_format, rope=rope)
        capacity = Capacity(8, 8 * max_q_len, max_q_len, 4096)
        found = built_in_tuning(spec, capacity, limit)
        kernel = decode_spec(spec, found, CallForm())
        rows = max_q_len * group
        tallest = 16 if head_dim <= 128 else 8
        assert found.rows // found.row_warps <= tallest
        if limit == HOPPER_SHARED_BYTES:
            assert found.rows >= min(rows, 8 * tallest)
        assert found.rows == 8 or found.rows < 2 * rows
        assert 2 <= found.num_stages
        assert kernel.shared_bytes <= limit
        if found.num_stages < 6:
            assert replace(kernel, stages=found.num_stages + 1).shared_bytes > limit
        kind = found.kind(spec, capacity)
        assert (kind.max_packed_rows == found.rows) == (rows <= found.rows)


def test_decode_of_an_8b_model_keeps_128_kib_and_more_in_flight():
    assert built_in_tuning(AttentionSpec(32, 8, 128), CAPACITY) == DecodeTuning(8, 32, 4, 3, 1, 6, 1)
    fp8 = built_in_tuning(AttentionSpec(32, 8, 128, kv_format="fp8_e5m2"), CAPACITY)
    assert (fp8.num_warps, fp8.num_stages) == (8, 2)


@pytest.mark.parametrize(
    ("heads", "head_dim", "changes", "batch", "expected"),
    [
        ((32, 8), 128, {"page_size": 1}, 64, 4),
        ((32, 8), 128, {"page_size": 5}, 32, 4),
        ((32, 8), 128, {"page_size": 1}, 31, 1),
        ((32, 8), 128, {"page_size": 8}, 64, 1),
        ((8, 1), 128, {"page_size": 1}, 999, 1),
        ((32, 8), 256, {"page_size": 1}, 64, 1),
        ((32, 8), 128, {"page_size": 1, "batch_invariant": True}, 64, 1),
        ((64, 8), 64, {"windows": (None, 128)}, 64, 8),
        ((64, 4), 64, {"windows": (128,)}, 64, 1),  # 8 warps
        ((64, 8), 64, {"windows": (4096,)}, 64, 1),
        ((32, 8), 128, {"kv_format": "fp8_e4m3", "rope": FusedRope(128, keys=True)}, 64, 8),
        ((32, 8), 128, {"kv_format": "fp8_e4m3", "rope": FusedRope(128)}, 64, 1),
        ((32, 8), 128, {"rope": FusedRope(128, keys=True)}, 64, 1),
    ],
)
def test_which_warps_have_a_head_each(heads, head_dim, changes, batch, expected):
    spec, capacity = replace(AttentionSpec(*heads, head_dim), **changes), Capacity(batch, batch, 1, 2048)
    found = built_in_tuning(spec, capacity)
    assert found.head_warps == expected and expected in (1, found.num_warps)
    params = partition_params(spec, capacity, found, None, 132)
    assert params.num_kv_heads * expected == spec.num_kv_heads
    assert shared_bytes(found, HeadForm.of(spec)) <= HOPPER_SHARED_BYTES


@pytest.mark.parametrize(
    ("page_size", "chunk_tokens", "step"),
    [(1, 32, 16), (16, 32, 16), (8, 32, 16), (32, 32, 32), (64, 32, 32), (64, 16, 16), (48, 32, 16), (None, 32, 16)],
)
def test_items_begin_where_chunks_may(page_size, chunk_tokens, step):
    form = {"table": "ragged"} if page_size is None else {}
    kind = DecodeTuning(8, chunk_tokens, 4, 3, 1, 6, 2).kind(
        AttentionSpec(8, 2, 64, page_size=page_size, **form), CAPACITY
    )
    assert (kind.kv_tokens, kind.item_cost, kind.step_cost) == (step, 6 * chunk_tokens // step, 2)


class Override:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "attention_decode" else None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 3}, "fi_tuning: expected names among"),
        ({"rows": 64}, r"tuning.row_warps: expected 64 rows in parts of \(8, 16\)"),
        ({"rows": 24}, r"tuning.rows: expected one of \(8, 16, 32, 64, 128\)"),
        ({"rows": 64, "num_warps": 4, "row_warps": 8}, "tuning.row_warps"),
        ({"head_warps": 2}, r"tuning.head_warps: expected one of \(1, 8\)"),
        ({"num_warps": 8, "head_warps": 8}, "tuning.head_warps: expected 1, or a divisor of 2 KV heads"),
        ({"chunk_tokens": 64}, "tuning.chunk_tokens"),
        ({"num_stages": 1}, "tuning.num_stages: expected an int of at least 2"),
        ({"workers_per_processor": 2}, "tuning.workers_per_processor: expected at most 1"),  # in shared memory
        # In registers.
        ({"num_warps": 4, "num_stages": 2, "chunk_tokens": 16, "workers_per_processor": 3}, "expected at most 2"),
    ],
)
def test_bad_tuning_is_named(given, message, monkeypatch):
    monkeypatch.setattr(tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    manager = registry().manager
    plugin = Override(given)
    manager.register(plugin)
    try:
        with pytest.raises(ArgumentError, match=message):
            tuning_for(SPEC, CAPACITY, CPU)
    finally:
        manager.unregister(plugin)


@pytest.mark.parametrize("given", [{"num_warps": 8}, {"num_warps": 2}, {"rows": 16, "row_warps": 2}])
def test_who_gives_other_warps_need_not_know_of_heads_for_each(given, monkeypatch):
    monkeypatch.setattr(tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    spec, capacity = AttentionSpec(32, 8, 128, page_size=1), Capacity(256, 256, 1, 2048)
    assert built_in_tuning(spec, capacity).head_warps == 4
    manager, plugin = registry().manager, Override(given)
    manager.register(plugin)
    try:
        found = tuning_for(spec, capacity, CPU)
    finally:
        manager.unregister(plugin)
    assert found.head_warps == 1 and given.items() <= vars(found).items()


@pytest.fixture(scope="module")
def attention():
    return next(operation for operation in OPERATIONS if operation.name == "attention")


def test_the_entry_is_complete_and_registered(attention):
    kernels = {"attention_decode": attention_short}
    kernels |= dict.fromkeys(("attention_prefix", "attention_prefix_fp8", "attention_prefix_rotated"), attention_prefix)
    kernels["attention_prefix_apart"] = attention_apart
    for entry in ATTENTION_ENTRIES:
        check_entry(entry, {"attention": attention})
        assert entry.load() is kernels.get(entry.name, attention_mixed)
        assert entry.full_name in {item.full_name for item in registry().kernels("attention")}


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"max_q_len": 16, "group_size": 4}, True),
        ({"max_q_len": 17, "group_size": 1}, False),
        ({"dtype": torch.float16, "kv_format": "fp16"}, True),
        ({"dtype": torch.float16, "kv_format": "fp8_e5m2"}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32, "kv_format": "fp32"}, False),
        ({"head_dim": 256, "head_dim_vo": 128}, True),
        ({"head_dim": 272}, False),
        ({"head_dim_vo": 72}, False),
        ({"group_size": 64, "page_size": 1, "kv_layout": "HND", "table": "indptr"}, True),
        ({"group_size": 128, "max_q_len": 16}, True),
        ({"q_format": "fp8_e4m3", "kv_format": "fp8_e4m3"}, True),
        ({"q_format": "fp8_e5m2"}, True),
        ({"rope": "q", "rope_pairs": "half", "rotary_dim": 64}, True),
        ({"rope": "qk", "rope_pairs": "half", "rotary_dim": 96}, True),
        ({"rope": "qk", "rope_pairs": "half", "rotary_dim": 80}, False),
        ({"rope": "qk", "rope_pairs": "interleaved", "rotary_dim": 80}, True),
        ({"rope": "q", "rope_pairs": "interleaved", "rotary_dim": 40}, False),
        ({"page_size": None, "table": "ragged", "causal": False, "windowed": True}, True),
        ({"features": frozenset({"soft_cap", "sinks", "alibi", "mask", "lse"}), "batch_invariant": True}, True),
    ],
)
def test_what_is_served(changes, served, attention):
    entries = {item.name: item for item in ATTENTION_ENTRIES}
    entry, long_entry = entries["attention_decode"], entries["attention_prefill"]
    request = attention.request(Target("cuda", (9, 0)), **{**attention.typical, **changes})
    assert (not entry.reject(request)) == served
    assert not (served and not long_entry.reject(request))  # one kernel serves a request
    assert entry.reject(attention.request(Target("cpu"), **{**attention.typical, **changes}))
    assert entry.reject(attention.request(Target("cuda", (8, 9)), **{**attention.typical, **changes}))


def test_masks_and_tables_are_numbered_as_in_the_headers():
    assert TABLE_FORMS == {"ragged": 0, "dense": 1, "indptr": 2}
    assert MASK_FORMS == {None: 0, "kv": 1, "new": 2}


# Boxes


@pytest.mark.parametrize(
    ("page_size", "chunk_tokens", "tokens"),
    [(16, 16, 16), (64, 16, 16), (8, 16, 8), (4, 16, None), (1, 16, None), (48, 16, 16), (24, 16, None), (None, 32, 32),
     (16, 32, 16), (48, 32, None)],
)  # fmt: skip
def test_boxes_fit_pages_and_chunks(page_size, chunk_tokens, tokens):
    assert boxes.tokens_of_box(page_size, chunk_tokens) == tokens


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("paged", [True, False])
def test_maps_have_the_dims_that_the_kernel_indexes(layout, paged, monkeypatch):
    monkeypatch.setattr(
        boxes, "tensor_map_of", lambda tensor, box: (tensor.shape, tensor.stride(), tensor.data_ptr(), box)
    )
    nhd = torch.zeros(*((7, 16) if paged else (50,)), 3, 160, dtype=torch.bfloat16)
    wide = nhd if layout == "NHD" else nhd.transpose(-2, -3).contiguous()
    kv = KVCache(wide[..., :128], wide[..., 128:], layout)
    for found, tensor, columns, width in zip(boxes.maps_of(kv, 8), (kv.k, kv.v), (2, 1), (64, 32), strict=True):
        shape, strides, address, box = found
        pages, tokens = (7, 16) if paged else (1, 50)
        assert shape == (pages, 3, columns, tokens, width) and address == tensor.data_ptr()
        token, head = (480, 160) if layout == "NHD" else (160, tokens * 160)
        assert strides[1:] == (head, width, token, 1) and (not paged or strides[0] == 16 * 3 * 160)
        assert box.shape == (1, 1, columns, 8, width) and box.swizzle_bytes == width * 2


def test_no_map_describes_a_cache_without_pages():
    empty = torch.zeros(0, 16, 2, 64, dtype=torch.bfloat16)
    assert boxes.maps_of(KVCache(empty, empty), 16) is None


def test_no_map_describes_rows_that_columns_do_not_fill():
    kv = torch.zeros(3, 16, 2, 72, dtype=torch.bfloat16)
    assert boxes.maps_of(KVCache(kv, kv), 16) is None
