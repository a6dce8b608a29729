"""Builder and implementation with vLLM's own metadata, against softmax over gathered keys in float64."""

from types import SimpleNamespace

import pytest
import torch
from fi_vllm.backend import FiBackend
from vllm.config import AttentionConfig, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 4, 2, 32, 16, 20
CPU = torch.device("cpu")


class Layer(torch.nn.Module, AttentionLayerBase):
    """As much of vLLM's layer as the adapter reads."""

    def __init__(self, impl):
        super().__init__()
        self.impl, self.head_size_v = impl, DIM
        self._q_scale, self._k_scale, self._v_scale = torch.tensor(0.25), torch.tensor(0.5), torch.tensor(2.0)

    def get_attn_backend(self):
        return FiBackend

    def get_kv_cache_spec(self, vllm_config):
        return None


def make(layers, num_drafted=0, mode=CUDAGraphMode.NONE, max_model_len=128, cascade=False, max_num_seqs=4):
    """A builder for ``layers`` (name -> impl), under limits of a small engine."""
    speculation = None
    if num_drafted:
        speculation = SimpleNamespace(num_speculative_tokens=num_drafted, parallel_drafting=False)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={name: Layer(impl) for name, impl in layers.items()}, cudagraph_mode=mode
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=64),
        model_config=SimpleNamespace(
            dtype=torch.float32, max_model_len=max_model_len, disable_cascade_attn=not cascade
        ),
        speculative_config=speculation,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32)
    return FiBackend.get_builder_cls()(spec, list(layers), config, CPU)


def impl_of(slopes=None, window=None, cache_dtype="auto", soft_cap=None, share=None, **extra):
    make_impl = FiBackend.get_impl_cls()
    return make_impl(
        HEADS, DIM, 0.3, KV_HEADS, slopes, window, cache_dtype, soft_cap, AttentionType.DECODER, share, **extra
    )


def step(q_lens, kv_lens, num_padded_reqs=0, num_padded_tokens=0):
    """vLLM's metadata of a step whose padding rows have no tokens and whose padding tokens have slot -1."""
    starts = torch.tensor([0, *q_lens] + [0] * num_padded_reqs, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(kv_lens + [0] * num_padded_reqs, dtype=torch.int32)
    table = torch.zeros(len(lengths), 8, dtype=torch.int32)
    pages = torch.randperm(BLOCKS - 1)[: 4 * len(q_lens)].int() + 1
    table[: len(q_lens), :4] = pages.view(-1, 4)
    slots = []
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        places = torch.arange(kv_len - q_len, kv_len)
        slots.append(table[row, places // BLOCK].long() * BLOCK + places % BLOCK)
    slots.append(torch.full((num_padded_tokens,), -1))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=sum(q_lens) + num_padded_tokens,
        max_query_len=max(q_lens),
        max_seq_len=max(kv_lens),
        block_table_tensor=table,
        slot_mapping=torch.cat(slots),
    )


def oracle(q, memory, metadata, window=None, soft_cap=None, slopes=None, sinks=None):
    """[T, H, D] of the batch's tokens, from the cache ``memory`` [blocks, 2, BLOCK, KV_HEADS, DIM] in float64."""
    rows, starts = [], metadata.query_start_loc.tolist()
    for row, kv_len in enumerate(metadata.seq_lens.tolist()):
        pages = metadata.block_table_tensor[row].long()
        keys, values = (memory[pages, part].flatten(0, 1)[:kv_len].double() for part in (0, 1))
        keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
        num_new = starts[row + 1] - starts[row]
        for token in range(num_new):
            position = kv_len - num_new + token
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            logits = torch.einsum("hd,thd->ht", q[starts[row] + token].double(), keys[seen]) * 0.3
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            if slopes is not None:
                distance = torch.arange(first, position + 1) - position
                logits = logits + torch.tensor(slopes).double()[:, None] * distance
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
            weights = logits.softmax(dim=1)[:, : position + 1 - first]
            rows.append(torch.einsum("ht,thd->hd", weights, values[seen]))
    return torch.stack(rows)


def run(builder, name, metadata, memory, num_rows=None, key=True, rounded=lambda q: q):
    """(q, K, output poisoned before) of one layer; K and V of the new tokens are random. ``rounded`` is applied to q."""
    num_rows = num_rows or metadata.num_actual_tokens
    q = rounded(torch.randn(num_rows, HEADS, DIM))
    k, v = (torch.randn(num_rows, KV_HEADS, DIM) if key else None for _ in range(2))
    layer = builder.vllm_config.compilation_config.static_forward_context[name]
    layer.impl.process_weights_after_loading(torch.float32)
    output = torch.full((num_rows, HEADS, DIM), torch.nan)
    found = layer.impl.forward(layer, q, k, v, memory, builder.build(0, common_attn_metadata=metadata), output)
    assert found is output
    return q, k, output


SLOPES = [0.5, 0.25, 0.125, 0.0625]
FEATURES = [
    {},
    {"window": 7},
    {"soft_cap": 5.0},
    {"slopes": SLOPES},
    {"sinks": torch.tensor([0.1, -1.0, 2.0, 0.0])},
    {"window": 5, "soft_cap": 3.0, "sinks": torch.tensor([1.0, 0.5, 0.0, -0.5])},
]


@pytest.mark.parametrize("features", FEATURES, ids=lambda each: "+".join(each) or "plain")
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"), [([1, 1, 1], [3, 40, 17]), ([20, 1, 3], [20, 33, 50])], ids=["decode", "mixed"]
)
def test_attention_is_that_of_the_oracle(features, q_lens, kv_lens):
    torch.manual_seed(0)
    builder, memory = make({"a": impl_of(**features)}), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata = step(q_lens, kv_lens)
    q, k, output = run(builder, "a", metadata, memory)
    slots = metadata.slot_mapping
    assert memory[slots // BLOCK, 0, slots % BLOCK].equal(k)
    expected = oracle(q, memory, metadata, **features)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_is_skipped():
    builder, memory = make({"a": impl_of()}), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata = step([1, 1], [9, 30], num_padded_reqs=2, num_padded_tokens=2)
    before, padding = memory.clone(), 3
    q, _, output = run(builder, "a", metadata, memory, num_rows=metadata.num_actual_tokens + padding)
    torch.testing.assert_close(output[:2].double(), oracle(q, memory, metadata), rtol=1e-5, atol=1e-5)
    assert output[2:].isnan().all()
    changed = (memory != before).flatten(3).any(-1).sum()
    assert changed == 4  # two tokens' K and V


def test_layers_of_one_group_may_differ():
    layers = {"full": impl_of(), "window": impl_of(window=4), "sinks": impl_of(sinks=torch.zeros(HEADS))}
    builder, metadata = make(layers), step([2, 1], [20, 40])
    assert {form.features for form in builder.pairs} == {frozenset(), frozenset({"sinks"})}
    asked = {"full": {}, "window": {"window": 4}, "sinks": {"sinks": torch.zeros(HEADS)}}
    for name, features in asked.items():
        memory = torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
        q, _, output = run(builder, name, metadata, memory)
        torch.testing.assert_close(output.double(), oracle(q, memory, metadata, **features), rtol=1e-5, atol=1e-5)


def test_fp8_cache_as_bytes_with_the_layers_scales():
    builder, memory = make({"a": impl_of(cache_dtype="fp8")}), torch.zeros(BLOCKS, 2, BLOCK, KV_HEADS, DIM).byte()
    metadata = step([6, 3], [6, 3])
    q, k, output = run(builder, "a", metadata, memory)
    read = memory.view(torch.float8_e4m3fn).float() * torch.tensor([0.5, 2.0])[:, None, None, None]
    slots = metadata.slot_mapping
    stored = (k / 0.5).to(torch.float8_e4m3fn).float() * 0.5
    assert read[slots // BLOCK, 0, slots % BLOCK].equal(stored)
    torch.testing.assert_close(output.double(), oracle(q, read, metadata), rtol=1e-5, atol=1e-5)


def test_queries_are_fp8_where_vllm_is_asked_for_it():
    """As vLLM hands them to its own backends: divided by the layer's scale, in e4m3."""
    assert not impl_of(cache_dtype="fp8").supports_quant_query_input
    asked = VllmConfig(attention_config=AttentionConfig(use_prefill_query_quantization=True))
    with set_current_vllm_config(asked):
        assert (
            not impl_of().supports_quant_query_input and not impl_of(cache_dtype="fp8_e5m2").supports_quant_query_input
        )
        impl = impl_of(cache_dtype="fp8_e4m3")
    assert impl.supports_quant_query_input
    builder, memory = make({"a": impl}), torch.zeros(BLOCKS, 2, BLOCK, KV_HEADS, DIM).byte()
    metadata = step([6, 1], [6, 1])
    q, _, output = run(builder, "a", metadata, memory, rounded=lambda q: (q / 0.25).to(torch.float8_e4m3fn))
    read = memory.view(torch.float8_e4m3fn).float() * torch.tensor([0.5, 2.0])[:, None, None, None]
    torch.testing.assert_close(output.double(), oracle(0.25 * q.double(), read, metadata), rtol=1e-5, atol=1e-5)


def test_verification_of_drafted_tokens_is_a_step_of_decode():
    builder, memory = make({"a": impl_of()}, num_drafted=3), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata = step([4, 4], [20, 37])
    q, _, output = run(builder, "a", metadata, memory)
    (pair,) = builder.pairs.values()
    assert pair.decode is not pair.mixed and pair.decode.batch.kv_lens is metadata.seq_lens
    torch.testing.assert_close(output.double(), oracle(q, memory, metadata), rtol=1e-5, atol=1e-5)


def test_one_graph_for_all_steps_means_one_plan():
    (pair,) = make({"a": impl_of()}, mode=CUDAGraphMode.FULL).pairs.values()
    assert pair.decode is pair.mixed
    (pair,) = make({"a": impl_of()}, mode=CUDAGraphMode.FULL_AND_PIECEWISE).pairs.values()
    assert pair.decode is not pair.mixed


def test_a_layer_that_shares_anothers_cache_writes_nothing():
    builder, memory = make({"a": impl_of(share="other")}), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata, before = step([1, 2], [5, 18]), memory.clone()
    q, _, output = run(builder, "a", metadata, memory, key=False)
    assert memory.equal(before)
    torch.testing.assert_close(output.double(), oracle(q, memory, metadata), rtol=1e-5, atol=1e-5)


def test_metadata_of_an_earlier_build_is_planned_again():
    builder, memory = make({"a": impl_of()}), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    layer = builder.vllm_config.compilation_config.static_forward_context["a"]
    first, second = step([1, 1], [9, 30]), step([1], [50])
    built = builder.build(0, common_attn_metadata=first)
    builder.build_for_drafting(second, 0)
    q, output = torch.randn(2, HEADS, DIM), torch.empty(2, HEADS, DIM)
    layer.impl.forward(layer, q, None, None, memory, built, output)
    torch.testing.assert_close(output.double(), oracle(q, memory, first), rtol=1e-5, atol=1e-5)


def test_build_reads_nothing_on_the_host(monkeypatch):
    """The deprecated host copies of lengths are what a build would wait for on a GPU."""
    metadata = step([1, 1], [9, 30])

    def forbidden(self):
        raise AssertionError("a copy to the host")

    monkeypatch.setattr(CommonAttentionMetadata, "seq_lens_cpu", property(forbidden))
    monkeypatch.setattr(CommonAttentionMetadata, "num_computed_tokens_cpu", property(forbidden))
    metadata.query_start_loc_cpu = None
    built = make({"a": impl_of()}).build(0, common_attn_metadata=metadata)
    assert built.batch.table is metadata.block_table_tensor and built.batch.q_indptr is metadata.query_start_loc


def test_profiling_run_and_refusals():
    impl, output = impl_of(), torch.full((3, HEADS, DIM), torch.nan)
    assert impl.forward(None, None, None, None, None, None, output).eq(0).all()
    with pytest.raises(NotImplementedError, match="quantised output"):
        impl.forward(None, None, None, None, None, None, output, output_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="ENCODER_ONLY"):
        FiBackend.get_impl_cls()(HEADS, DIM, 1.0, KV_HEADS, None, None, "auto", None, AttentionType.ENCODER_ONLY)
    with pytest.raises(TypeError, match="use_alibi_sqrt"):
        impl_of(use_alibi_sqrt=True)
    builder, metadata = make({"a": impl_of()}), step([1], [3])
    metadata.causal = False
    with pytest.raises(NotImplementedError, match="causal"):
        builder.build(0, common_attn_metadata=metadata)


def cascade(builder, length, num):
    """vLLM asks before it builds a step, with keywords."""
    return builder.use_cascade_attention(
        common_prefix_len=length,
        query_lens=[1] * num,
        num_query_heads=HEADS,
        num_kv_heads=KV_HEADS,
        use_alibi=False,
        use_sliding_window=False,
        use_local_attention=False,
        num_sms=132,
        dcp_world_size=1,
    )


def test_a_common_prefix_is_planned_in_the_step_that_it_was_found_for(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fi_vllm.metadata.MIN_PREFIX", BLOCK)
    monkeypatch.setattr("fi_vllm.metadata.MIN_REQUESTS", 3)
    builder, memory = make({"a": impl_of()}, cascade=True), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata = step([1, 1, 1], [33, 40, 60], num_padded_reqs=1)
    metadata.block_table_tensor[:3, :2] = metadata.block_table_tensor[0, :2].clone()
    metadata.slot_mapping[0] = metadata.block_table_tensor[0, 2] * BLOCK
    assert builder.shares and not cascade(builder, 2 * BLOCK, 3)  # no: vLLM keeps its CUDA graphs
    with monkeypatch.context() as patch:
        built = builder.build(0, common_attn_metadata=metadata)
        assert built.batch.levels.nodes.tolist() == [[0, 3, 0, 2 * BLOCK]]
        patch.setattr(builder, "build", lambda *arguments, **named: built)
        q, _, output = run(builder, "a", metadata, memory)
    torch.testing.assert_close(output.double(), oracle(q, memory, metadata), rtol=1e-5, atol=1e-5)
    assert builder.build(0, common_attn_metadata=metadata).batch.levels is None
    for length, num in ((BLOCK - 1, 3), (2 * BLOCK, 2)):
        assert not cascade(builder, length, num)
        assert builder.build(0, common_attn_metadata=metadata).batch.levels is None


@pytest.mark.parametrize(
    "mode, with_levels",
    [
        (CUDAGraphMode.FULL_DECODE_ONLY, (False, True)),
        (CUDAGraphMode.FULL_AND_PIECEWISE, (False, True)),
        (CUDAGraphMode.FULL, (True, True)),
        (CUDAGraphMode.PIECEWISE, (False, False)),
    ],
)
def test_steps_of_a_captured_kind_all_have_levels_where_some_may(mode, with_levels):
    """A captured graph holds the kernels of one of both, and is replayed for steps that share a prefix and for others."""
    builder = make({"a": impl_of()}, mode=mode, cascade=True)
    for q_len, expected in zip((5, 1), with_levels, strict=True):
        levels = builder.build(0, common_attn_metadata=step([q_len], [9])).batch.levels
        assert (levels is not None) == expected
        assert levels is None or levels.nodes.tolist() == [[0, 0, 0, 0]]
    assert make({"a": impl_of()}, mode=mode).build(0, common_attn_metadata=step([1], [3])).batch.levels is None


def test_a_common_prefix_is_left_alone_where_vllm_or_the_kernels_do(monkeypatch):
    builder = make({"a": impl_of()})
    assert not builder.shares and not cascade(builder, 1000, 100)
    assert builder.build(0, common_attn_metadata=step([1], [3])).batch.levels is None
    warnings = []
    monkeypatch.setattr("fi_vllm.metadata.shares_prefixes", lambda *arguments: False)
    monkeypatch.setattr("fi_vllm.metadata.logger.warning", lambda *arguments: warnings.append(arguments))
    assert not make({"a": impl_of()}, cascade=True).shares and len(warnings) == 1


def test_sinks_that_are_loaded_again_are_read_where_graphs_read_them():
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    impl = impl_of(sinks=sinks)
    impl.process_weights_after_loading(torch.bfloat16)
    seen = impl._layer_arguments(None).sinks
    sinks.fill_(2.0)
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl._layer_arguments(None).sinks is seen and seen.eq(2.0).all() and seen.dtype == torch.float32


def test_a_scale_that_the_model_changes_later():
    builder, memory = make({"a": impl_of()}), torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    metadata = step([1, 1], [9, 30])
    run(builder, "a", metadata, memory)
    impl = builder.vllm_config.compilation_config.static_forward_context["a"].impl
    impl.scale = 2 * impl.scale
    q, _, output = run(builder, "a", metadata, memory)
    torch.testing.assert_close(output.double(), oracle(2 * q, memory, metadata), rtol=1e-5, atol=1e-5)
