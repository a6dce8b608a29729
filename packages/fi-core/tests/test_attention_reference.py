"""The attention oracle against a plain formula written token by token and head by head in Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fi_core import AttentionSpec, Batch, FusedRope, KVCache, LayerArgs, PackedMask, RopeConfig, RopeTable, YarnScaling
from fi_core.ops.cases.attention import cases
from fi_core.ops.cases.kv import CacheForm, make_cache
from fi_core.reference.attention import ReferenceState, oracle

Q_LENS = (1, 5, 0, 1, 9, 2)
KV_LENS = (12, 5, 3, 0, 4, 20)


def key_of(
    batch: Batch, cache: torch.Tensor, layout: str, page_size: int | None, request: int, position: int, head: int
):
    """The stored vector, found by walking the table with Python ints."""
    if batch.kv_indptr is not None:
        block, offset = int(batch.kv_indptr[request]) + position, None
    elif batch.table_indptr is not None:
        block = int(batch.table[int(batch.table_indptr[request]) + position // page_size])
        offset = position % page_size
    else:
        row = request if batch.table_row is None else int(batch.table_row[request])
        block, offset = int(batch.table[row, position // page_size]), position % page_size
    if offset is None:
        return cache[block, head] if layout == "NHD" else cache[head, block]
    return cache[block, offset, head] if layout == "NHD" else cache[block, head, offset]


def scale_of(scale, head: int) -> float:
    if scale is None:
        return 1.0
    if isinstance(scale, float):
        return scale
    return float(scale[head]) if scale.dim() else float(scale)


def mask_bit(mask: PackedMask, request: int, q_len: int, kv_len: int, token: int, position: int) -> bool:
    column, columns = position, kv_len
    if mask.columns == "new":
        column, columns = position - (kv_len - q_len), q_len
        if column < 0:
            return True
    byte = int(mask.indptr[request]) + token * math.ceil(columns / 8) + column // 8
    return bool(int(mask.bits[byte]) >> (column % 8) & 1)


def turned(vector: list[float], position: int, rope) -> list[float]:
    """The vector with its pairs rotated, one after the other."""
    out, config = list(vector), rope.config
    half = config.rotary_dim // 2
    for pair in range(half):
        first, second = (pair, pair + half) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
        angle = position * float(rope.inv_freq[pair])
        cos, sin = math.cos(angle) * config.attention_factor, math.sin(angle) * config.attention_factor
        out[first] = vector[first] * cos - vector[second] * sin
        out[second] = vector[second] * cos + vector[first] * sin
    return out


def plain_row(spec, batch, q_row, kv, layer, request, token, head):
    """(output vector, lse) of one query head of one token."""
    q_len = int(batch.q_indptr[request + 1] - batch.q_indptr[request])
    kv_len = int(batch.kv_lens[request])
    position = kv_len - q_len + token
    kv_head = head // (spec.num_qo_heads // spec.num_kv_heads)
    k, v = kv.typed()
    query = [value * scale_of(layer.q_scale, head) for value in q_row.tolist()]
    if spec.rope is not None:
        query = turned(query, position, layer.rope)
    logits, values = [], []
    for key in range(kv_len):
        if spec.causal and key > position:
            continue
        if layer.window is not None and position - key >= layer.window:
            continue
        if batch.mask is not None and not mask_bit(batch.mask, request, q_len, kv_len, token, key):
            continue
        where = (kv.layout, spec.page_size, request, key, kv_head)
        key_vector = key_of(batch, k, *where).double() * scale_of(kv.k_scale, kv_head)
        keys = key_vector.tolist()
        if spec.rope is not None and spec.rope.keys:
            keys = turned(keys, key, layer.rope)
        logit = layer.scale * sum(a * b for a, b in zip(query, keys, strict=True))
        if layer.soft_cap is not None:
            logit = layer.soft_cap * math.tanh(logit / layer.soft_cap)
        if layer.alibi_slopes is not None:
            logit += float(layer.alibi_slopes[head]) * (key - position)
        logits.append(logit)
        values.append(key_of(batch, v, *where).double() * scale_of(kv.v_scale, kv_head))
    sink = [] if layer.sinks is None else [float(layer.sinks[head])]
    total = sum(math.exp(x) for x in logits + sink)
    out = torch.zeros(spec.head_dim_vo, dtype=torch.float64)
    for logit, value in zip(logits, values, strict=True):
        out += math.exp(logit) / total * value
    return out, math.log(total) if total > 0 else -math.inf


def check_against_plain(spec, batch, q, kv, layer) -> None:
    out, lse = oracle(spec, batch, q, kv, layer)
    rows = int(batch.q_indptr[-1])
    assert out.dtype == torch.float64 and out.shape == (q.shape[0], spec.num_qo_heads, spec.head_dim_vo)
    for request in range(batch.size):
        start = int(batch.q_indptr[request])
        for token in range(int(batch.q_indptr[request + 1]) - start):
            for head in range(spec.num_qo_heads):
                row = q[start + token, head].double()
                wanted, log_sum = plain_row(spec, batch, row, kv, layer, request, token, head)
                torch.testing.assert_close(out[start + token, head], wanted, rtol=1e-9, atol=1e-11)
                found = float(lse[start + token, head])
                assert found == log_sum or math.isclose(found, log_sum, rel_tol=1e-9, abs_tol=1e-11)
    assert out[rows:].isnan().all() and lse[rows:].isnan().all()


def make(
    spec: AttentionSpec, mask_columns: str | None = None, q_lens=Q_LENS, kv_lens=KV_LENS, q_scale: str = "none", **form
):
    generator = torch.Generator().manual_seed(7)
    names = ("head_dim", "head_dim_vo", "kv_format", "page_size", "kv_layout", "table")
    cache_form = CacheForm(num_heads=spec.num_kv_heads, **{name: getattr(spec, name) for name in names}, **form)
    cache = make_cache(cache_form, kv_lens, torch.device("cpu"), generator)
    indptr = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    mask = None
    if mask_columns is not None:
        widths = [math.ceil((kv if mask_columns == "kv" else q) / 8) * q for q, kv in zip(q_lens, kv_lens, strict=True)]
        starts = torch.tensor([0, *itertools.accumulate(widths)])
        bits = torch.randint(0, 256, (sum(widths),), generator=generator, dtype=torch.int64).to(torch.uint8)
        mask = PackedMask(bits, starts, mask_columns)
    batch = Batch(indptr, torch.tensor(kv_lens, dtype=torch.int32), mask=mask, **cache.fields)
    q = torch.randn(sum(q_lens) + 2, spec.num_qo_heads, spec.head_dim, generator=generator).to(spec.q_dtype)
    heads = spec.num_qo_heads
    rope = None
    if spec.rope is not None:
        scaling = YarnScaling(2.0, 16, attention_factor=1.25)
        config = RopeConfig(spec.rope.rotary_dim, base=50.0, pairs=spec.rope.pairs, scaling=scaling)
        rope = RopeTable.make(config, "cpu")
    q_scales = {"none": None, "float": 0.75, "tensor": torch.tensor(0.75), "heads": torch.rand(heads) + 0.5}
    layer = LayerArgs(
        scale=0.3 if "soft_cap" in spec.features else None,
        soft_cap=1.5 if "soft_cap" in spec.features else None,
        window=spec.windows[-1],
        sinks=torch.randn(heads, generator=generator) if "sinks" in spec.features else None,
        alibi_slopes=torch.rand(heads, generator=generator) if "alibi" in spec.features else None,
        q_scale=q_scales[q_scale],
        rope=rope,
    ).resolve(spec)
    return batch, q, cache.kv, layer


def spec_of(**options) -> AttentionSpec:
    return AttentionSpec(**{"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32, **options})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_oracle_masks(causal, window):
    spec = spec_of(causal=causal, windows=(window,), page_size=4, features={"lse"})
    check_against_plain(spec, *make(spec))


@pytest.mark.parametrize("table", ["dense", "indptr", "ragged"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("storage", ["separate", "interleaved", "padded"])
def test_oracle_layouts(table, kv_layout, storage):
    spec = spec_of(table=table, kv_layout=kv_layout, page_size=None if table == "ragged" else 3, head_dim_vo=5)
    check_against_plain(spec, *make(spec, storage=storage, table_row=table == "dense"))


@pytest.mark.parametrize("features", [{"soft_cap"}, {"sinks"}, {"alibi"}, {"soft_cap", "sinks", "alibi", "lse"}])
def test_oracle_features(features):
    spec = spec_of(features=features, num_qo_heads=6, page_size=1, windows=(None, 4))
    check_against_plain(spec, *make(spec))


@pytest.mark.parametrize("columns", ["kv", "new"])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle_packed_masks(columns, causal):
    spec = spec_of(features={"mask", "sinks"}, causal=causal)
    check_against_plain(spec, *make(spec, columns))


@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "fp8_e5m2", "bf16"])
@pytest.mark.parametrize("scale", ["none", "float", "tensor", "heads"])
def test_oracle_formats(kv_format, scale):
    spec = spec_of(dtype=torch.bfloat16, kv_format=kv_format)
    scale = scale if kv_format.startswith("fp8") else "none"
    check_against_plain(spec, *make(spec, scale=scale, as_bytes=scale == "tensor"))


@pytest.mark.parametrize("q_format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("q_scale", ["none", "float", "tensor", "heads"])
def test_oracle_of_fp8_queries(q_format, q_scale):
    check_against_plain(spec_of(q_format=q_format), *make(spec_of(q_format=q_format), q_scale=q_scale))


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle_rotates(keys, pairs, causal):
    """Requests with fewer keys than queries among them: then positions are negative."""
    lens = {"q_lens": (1, 5, 0, 9), "kv_lens": (12, 3, 3, 20)}
    for rotary_dim in (8, 4):
        spec = spec_of(rope=FusedRope(rotary_dim, pairs, keys), causal=causal, windows=(None, 6))
        check_against_plain(spec, *make(spec, **lens))


def test_oracle_cuts_long_prefills_into_chunks(monkeypatch):
    monkeypatch.setattr("fi_core.reference.attention._MAX_LOGITS", 100)
    spec = spec_of(windows=(6,), features={"mask"})
    check_against_plain(spec, *make(spec, "kv"))
    spec = spec_of()
    check_against_plain(spec, *make(spec))


def test_serving_in_float32_shares_one_update_over_layers_and_windows():
    spec = spec_of(windows=(None, 2), features={"lse"})
    batch, q, kv, _ = make(spec)
    state = ReferenceState(spec, torch.device("cpu"), torch.float32)
    state.update(batch)
    other = KVCache(kv.k * 0.5, kv.v * -2.0)
    for cache, window in ((kv, None), (other, 2), (other, None), (kv, 2)):
        layer = LayerArgs(window=window).resolve(spec)
        out, lse = torch.full(q.shape, math.nan), torch.full(q.shape[:2], math.nan)
        state.run(q, cache, layer, out, lse)
        wanted, log_sum = oracle(spec, batch, q, cache, layer)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(lse.double(), log_sum, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_decode_groups_requests_of_similar_length_and_no_others():
    spec = spec_of(page_size=16)
    lens = (1000, 900, 600, 300, 40, 30, 1)
    batch, *_ = make(spec, q_lens=(1,) * len(lens), kv_lens=lens)
    state = ReferenceState(spec, torch.device("cpu"), torch.float32)
    state.update(batch)
    groups, blind = state._build(None)
    assert [tuple(group.blocks.shape) for group in groups] == [(3, 1000), (1, 300), (3, 40)]
    assert blind.numel() == 0


def test_case_names_are_unique_and_cover_the_contract():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
    groups = {case.values["group_size"] for case in cases()}
    assert {1, 2, 3, 4, 5, 6, 7, 8, 16} <= groups
    assert {"dense", "indptr", "ragged"} == {case.values["table"] for case in cases()}
    for kv_format in ("bf16", "fp8_e4m3", "fp8_e5m2"):
        dims = {case.values["head_dim"] for case in cases() if case.values["kv_format"] == kv_format}
        assert {64, 96, 128, 192, 256} <= dims
    assert {32, 64, 128} <= groups
    for table in ("dense", "indptr"):
        sizes = {case.values["page_size"] for case in cases() if case.values["table"] == table}
        assert {1, 2, 5, 8, 16, 24, 32, 100, 128, 255} <= sizes
