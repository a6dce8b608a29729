"""Batches over SGLang's request-to-token map, and what its layers ask for; no SGLang is needed."""

import importlib
import tomllib
from pathlib import Path
from types import SimpleNamespace

import fi_core as fi
import fi_sglang
import pytest
import torch
from fi_adapters.versions import EngineVersionError
from fi_sglang.layers import BoundLayer, check_layer, window_of, windows_of
from fi_sglang.steps import MAX_REQUESTS, MIN_REQUESTS, StepBuffers

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def buffers(max_batch=4, rows=6, context=32):
    return StepBuffers(torch.arange(rows * context, dtype=torch.int32).view(rows, context), max_batch)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_decode_reads_the_map_itself():
    made = buffers()
    batch = made.uniform(int64(5, 30), int64(3, 1), int64(99, 98), 1)
    assert batch.table is made.table and batch.table_row.tolist() == [3, 1]
    assert batch.q_indptr.tolist() == [0, 1, 2] and batch.kv_lens.tolist() == [5, 30]
    assert batch.slot_mapping.tolist() == [99, 98]


def test_buffers_keep_their_addresses():
    made = buffers()
    first, second = (made.uniform(int64(*lens), int64(*lens), int64(*lens), 1) for lens in ((5, 30), (7, 8, 9)))
    for name in ("q_indptr", "kv_lens", "table_row"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert made.uniform_indptr(3).data_ptr() == made.uniform_indptr(3).data_ptr()


def test_verification_counts_the_drafted_tokens():
    batch = buffers().uniform(int64(5, 20), int64(1, 2), torch.arange(8), 4, added=4)
    assert batch.q_indptr.tolist() == [0, 4, 8] and batch.kv_lens.tolist() == [9, 24]


def test_prefixes_are_found_in_the_map():
    """Rows 3 to 8 begin with the same 1000 slots, rows 5 and 6 with 500 more; those of the others are their own."""
    made = buffers(max_batch=9, rows=12, context=3000)
    made.table[3:9, :1000] = made.table[3, :1000].clone()
    made.table[5:7, :1500] = made.table[5, :1500].clone()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("fi_sglang.steps.MIN_SAVED_TOKENS", 500)
    lens = int64(1001, 2000, 1800, 1700, 2900, 1501, 1200, 3000)
    with fi.use(backend="reference"), monkey.context():
        batch = made.uniform(lens, int64(10, 3, 5, 7, 4, 6, 8, 11), torch.arange(8), 1)
        shared = made.sharing(batch)
        again = made.sharing(batch)
    monkey.undo()
    assert shared.kv_lens is batch.kv_lens and batch.levels is None
    for name in ("nodes", "order"):
        assert getattr(shared.levels, name).data_ptr() == getattr(again.levels, name).data_ptr()
    order = shared.levels.order.tolist()
    found = [[sorted(order[begin:end]), *keys] for begin, end, *keys in shared.levels.nodes.tolist() if end > begin]
    assert found == [[[1, 2, 3, 4, 5, 6], 0, 1000], [[2, 5], 1000, 1500]]


def test_prefixes_are_looked_for_in_steps_of_many_requests():
    made = buffers(max_batch=MAX_REQUESTS + 1, rows=6, context=32)
    for num, looks in (
        (MIN_REQUESTS - 1, False),
        (MIN_REQUESTS, True),
        (MAX_REQUESTS, True),
        (MAX_REQUESTS + 1, False),
    ):
        ones = torch.ones(num, dtype=torch.int64)
        with fi.use(backend="reference"):
            assert (made.sharing(made.uniform(ones, ones, ones, 1)) is not None) == looks


def test_prompts_of_any_length():
    batch = buffers().ragged(int64(5, 20, 3), int64(1, 2, 5), torch.arange(11), int64(5, 3, 3))
    assert batch.q_indptr.tolist() == [0, 5, 8, 11] and batch.kv_lens.tolist() == [5, 20, 3]


def test_a_made_up_prompt_is_cut_to_the_map():
    batch = buffers(context=32).ragged(int64(100), int64(0), torch.zeros(100, dtype=torch.int64), int64(100))
    assert batch.q_indptr.tolist() == [0, 32] and batch.kv_lens.tolist() == [32] and len(batch.slot_mapping) == 100


def test_more_requests_than_sglang_allows():
    with pytest.raises(fi.CapacityError, match="at most 4"):
        buffers().uniform(torch.ones(5), torch.ones(5), torch.ones(5), 1)


def layer(**changed):
    fields = {
        "layer_id": 0,
        "tp_q_head_num": 4,
        "tp_k_head_num": 2,
        "qk_head_dim": 32,
        "v_head_dim": 32,
        "scaling": 0.25,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": SimpleNamespace(value="decoder"),
        "xai_temperature_len": -1,
        "k_scale": None,
        "v_scale": None,
        "k_scale_float": None,
        "v_scale_float": None,
    }
    return SimpleNamespace(**{**fields, **changed})


def test_windows():
    assert window_of(layer()) is None and window_of(layer(sliding_window_size=127)) == 128
    assert window_of(layer(sliding_window_size=0)) == 1
    layers = [layer(), layer(sliding_window_size=127), layer(), layer(v_head_dim=16)]
    assert windows_of(layers) == {(4, 2, 32, 32): [None, 128], (4, 2, 32, 16): [None]}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "encoder_only"),
        ({"attn_type": SimpleNamespace(value="decoder_bidirectional")}, "bidirectional"),
        ({"logit_cap": 30.0, "logit_capping_method": "clip"}, "clip"),
        ({"xai_temperature_len": 1024}, "position"),
    ],
)
def test_refused_layers(changed, what):
    with pytest.raises(NotImplementedError, match=what):
        check_layer(layer(**changed))


def test_a_bound_layer():
    keys, values = torch.zeros(10, 2, 32), torch.zeros(10, 2, 32)
    sinks = torch.ones(4, dtype=torch.bfloat16)
    bound = BoundLayer.of(layer(logit_cap=50.0, sliding_window_size=7), keys, values, sinks)
    assert bound.form.features == {"soft_cap", "sinks"} and bound.form.kv_format == "fp32"
    assert bound.cache.page_size == 1 and bound.cache.k.data_ptr() == keys.data_ptr()
    assert bound.arguments.window == 8 and bound.arguments.soft_cap == 50.0 and bound.arguments.scale == 0.25
    read = bound.arguments.sinks
    sinks.fill_(3.0)
    bound.follow(sinks)
    assert bound.arguments.sinks is read and read.eq(3.0).all()


def test_fp8_scales_are_numbers_where_the_host_has_them():
    memory = torch.zeros(10, 2, 32).to(torch.float8_e4m3fn)
    bound = BoundLayer.of(
        layer(k_scale=torch.tensor(0.5), k_scale_float=0.5, v_scale=torch.tensor(2.0)), memory, memory, None
    )
    assert bound.cache.k_scale == 0.5 and torch.equal(bound.cache.v_scale, torch.tensor(2.0))


@pytest.mark.parametrize("found", ["0.5.15", "0.5.15.post2"])
def test_served_versions(found):
    fi_sglang.ENGINE.check_version(found)


@pytest.mark.parametrize("found", ["0.5.14", "0.5.16", "0.6.0", "0.5.1", None])
def test_refused_versions(found):
    with pytest.raises(EngineVersionError, match=r"pip install 'sglang==0\.5\.15'"):
        fi_sglang.ENGINE.check_version(found)


def test_entry_points_lead_to_functions():
    for target in PROJECT["entry-points"]["sglang.srt.plugins"].values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert PROJECT["version"] == fi_sglang.__version__
