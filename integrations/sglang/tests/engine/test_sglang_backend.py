"""The backend with SGLang's own pool, layers and modes, driven as its runners drive it, against softmax in float64."""

from types import SimpleNamespace

import fi_sglang
import pytest
import torch
from fi_core.settings import settings
from fi_sglang.backend import FiAttnBackend
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

HEADS, KV_HEADS, DIM, SLOTS, CONTEXT, ROWS = 4, 2, 32, 640, 64, 10
SCALE = 0.3


def runner_of(*layers, kv_dtype=torch.float32, **changed):
    """As much of SGLang's ModelRunner as the backend reads; pools and layers are SGLang's own."""
    pool = MHATokenToKVPool(
        size=SLOTS,
        page_size=1,
        dtype=kv_dtype,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=len(layers),
        device="cpu",
        enable_memory_saver=False,
    )
    options = {
        "disable_overlap_schedule": False,
        "disable_radix_cache": False,
        "enable_deterministic_inference": False,
        "chunked_prefill_size": 64,
        "max_prefill_tokens": 128,
        "speculative_algorithm": None,
        "speculative_eagle_topk": None,
        "speculative_num_draft_tokens": None,
    }
    return SimpleNamespace(
        req_to_token_pool=ReqToTokenPool(ROWS, CONTEXT, "cpu", False),
        token_to_kv_pool=pool,
        dtype=torch.float32,
        model=torch.nn.ModuleList(layers),
        model_config=SimpleNamespace(context_len=CONTEXT, attention_arch=AttentionArch.MHA, is_encoder_decoder=False),
        server_args=SimpleNamespace(**{**options, **changed}),
    )


def layer_of(layer_id=0, **options):
    return RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id, **options)


class Step:
    """A step of SGLang: requests in rows 1, 2, ... of its map, at random slots."""

    def __init__(self, runner, mode, seq_lens, q_lens, **more):
        num = len(seq_lens)
        table = runner.req_to_token_pool.req_to_token
        shuffled = torch.randperm(SLOTS - 1)[: num * CONTEXT] + 1
        table[1 : num + 1] = shuffled.view(num, CONTEXT).int()
        self.table, self.q_lens = table, q_lens
        self.kv_lens = [
            length + (q if mode.is_target_verify() else 0) for length, q in zip(seq_lens, q_lens, strict=True)
        ]
        slots = [table[row + 1, kv - q : kv] for row, (q, kv) in enumerate(zip(q_lens, self.kv_lens, strict=True))]
        self.batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=num,
            seq_lens=torch.tensor(seq_lens),
            req_pool_indices=torch.arange(1, num + 1),
            out_cache_loc=torch.cat(slots).long(),
            extend_seq_lens=torch.tensor(q_lens),
            spec_info=None,
        )
        vars(self.batch).update(more)

    def tensors(self):
        num = sum(self.q_lens)
        return torch.randn(num, HEADS * DIM), torch.randn(num, KV_HEADS, DIM), torch.randn(num, KV_HEADS, DIM)

    def oracle(self, q, keys, values, window=None, soft_cap=None, sinks=None):
        rows, start, q = [], 0, q.view(-1, HEADS, DIM).double()
        for row, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            slots = self.table[row + 1, :kv_len].long()
            k, v = (each[slots].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
            for token in range(q_len):
                position = kv_len - q_len + token
                seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
                logits = torch.einsum("hd,thd->ht", q[start + token], k[seen]) * SCALE
                if soft_cap:
                    logits = soft_cap * torch.tanh(logits / soft_cap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
                weights = logits.softmax(dim=1)[:, : k[seen].shape[0]]
                rows.append(torch.einsum("ht,thd->hd", weights, v[seen]))
            start += q_len
        return torch.stack(rows).view(-1, HEADS * DIM)


def check(backend, layer, step, sinks=None, **features):
    q, k, v = step.tensors()
    more = {} if sinks is None else {"sinks": sinks}
    out = backend.forward(q, k, v, layer, step.batch, **more)
    keys, values = backend.pool.get_kv_buffer(layer.layer_id)
    assert keys[step.batch.out_cache_loc].equal(k)
    expected = step.oracle(q, keys, values, sinks=sinks, **features)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_name_is_registered_once():
    from sglang.srt import server_args
    from sglang.srt.layers import sampler

    fi_sglang.register()
    fi_sglang.register()
    assert server_args.ATTENTION_BACKEND_CHOICES.count("fi") == 1
    assert ATTENTION_BACKENDS["fi"] is fi_sglang.make_attention
    assert sampler._CUSTOM_SAMPLER_FACTORIES["fi"] is fi_sglang.make_sampler


def test_the_contract_is_the_one_that_sglang_drives():
    """A method under a name that SGLang does not know would never be called."""
    own = {name for name in vars(FiAttnBackend) if not name.startswith("_") and callable(getattr(FiAttnBackend, name))}
    assert own - {"__init__"} <= set(dir(AttentionBackend))
    assert not FiAttnBackend.needs_cpu_seq_lens


FEATURES = [
    ({}, {}),
    ({"sliding_window_size": 6}, {"window": 7}),
    ({"logit_cap": 5.0}, {"soft_cap": 5.0}),
    ({}, {"sinks": torch.tensor([0.1, -1.0, 2.0, 0.0])}),
]


@pytest.mark.parametrize(("options", "features"), FEATURES)
def test_prompts_then_decode(options, features):
    torch.manual_seed(0)
    layer = layer_of(**options)
    runner = runner_of(layer)
    backend = FiAttnBackend(runner)
    for mode, seq_lens, q_lens in (
        (ForwardMode.EXTEND, [7, 30, 12], [7, 5, 12]),
        (ForwardMode.MIXED, [9, 31], [3, 1]),
        (ForwardMode.DECODE, [8, 40], [1, 1]),
    ):
        step = Step(runner, mode, seq_lens, q_lens)
        backend.init_forward_metadata(step.batch)
        check(backend, layer, step, **features)


def test_layers_with_other_windows_and_an_fp8_pool():
    torch.manual_seed(0)
    full, window = layer_of(0), layer_of(1, sliding_window_size=4)
    runner = runner_of(full, window)
    backend = FiAttnBackend(runner)
    step = Step(runner, ForwardMode.DECODE, [20, 50], [1, 1])
    backend.init_forward_metadata(step.batch)
    check(backend, full, step)
    check(backend, window, step, window=5)
    assert len(backend.pairs) == 1

    runner = runner_of(full, kv_dtype=torch.float8_e4m3fn)
    backend = FiAttnBackend(runner)
    step = Step(runner, ForwardMode.EXTEND, [9], [9])
    backend.init_forward_metadata(step.batch)
    q, k, v = step.tensors()
    out = backend.forward(q, k, v, full, step.batch)
    rounded = [torch.zeros(SLOTS + 1, KV_HEADS, DIM) for _ in range(2)]
    for cache, new in zip(rounded, (k, v), strict=True):
        cache[step.batch.out_cache_loc] = new.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(out.double(), step.oracle(q, *rounded), rtol=1e-5, atol=1e-5)


def test_a_chain_of_drafted_tokens():
    torch.manual_seed(0)
    layer = layer_of()
    more = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
    runner = runner_of(layer, **more)
    backend = FiAttnBackend(runner)
    info = SimpleNamespace(draft_token_num=4)
    step = Step(runner, ForwardMode.TARGET_VERIFY, [9, 30], [4, 4], spec_info=info)
    backend.init_forward_metadata(step.batch)
    check(backend, layer, step)
    assert backend.pairs[backend.layers[0].form].decode.capacity.max_q_len == 4


def test_a_graph_replays_with_what_its_buffers_hold():
    """Runners prepare outside, then run what is inside the graph: warm-up, capture, replays from the same buffers."""
    torch.manual_seed(0)
    layer = layer_of()
    runner = runner_of(layer)
    backend = FiAttnBackend(runner)
    first = Step(runner, ForwardMode.DECODE, [5, 6, 7], [1, 1, 1])
    backend.init_forward_metadata_out_graph(first.batch, in_capture=True)
    for _ in range(2):
        backend.init_forward_metadata_in_graph(first.batch)
        check(backend, layer, first)
    planned = backend.batch
    later = Step(runner, ForwardMode.DECODE, [40, 11, 23], [1, 1, 1])
    first.batch.seq_lens.copy_(later.batch.seq_lens)
    first.batch.out_cache_loc.copy_(later.batch.out_cache_loc)
    backend.init_forward_metadata_out_graph(first.batch)
    backend.init_forward_metadata_in_graph(first.batch)
    check(backend, layer, later)
    for name in ("q_indptr", "kv_lens", "table", "table_row", "slot_mapping"):
        assert getattr(planned, name).data_ptr() == getattr(backend.batch, name).data_ptr()


def test_what_the_radix_cache_shares_is_read_once(monkeypatch):
    """Found in the map from the first decode step on, in which no layer's plan is there yet; not where nothing is cached, nor
    where the next step is prepared while this one reads the map."""
    torch.manual_seed(0)
    monkeypatch.setattr("fi_sglang.steps.MIN_SAVED_TOKENS", 20)
    layer = layer_of()
    for changed in (
        {"disable_overlap_schedule": True},
        {},
        {"disable_overlap_schedule": True, "disable_radix_cache": True},
    ):
        runner = runner_of(layer, **changed)
        backend = FiAttnBackend(runner)
        for buffer in backend.pool.get_kv_buffer(layer.layer_id):
            buffer.normal_()
        for _ in range(2):
            step = Step(runner, ForwardMode.DECODE, [40, 30, 50, 60, 45, 33, 64, 31], [1] * 8)
            step.table[2:7, :24] = step.table[2, :24].clone()
            backend.init_forward_metadata(step.batch)
            check(backend, layer, step)
            pair = backend.pairs[backend.layers[0].form]
            if changed == {"disable_overlap_schedule": True}:
                assert pair.shared.batch is backend.sharing
                assert backend.sharing.levels.nodes[0].tolist()[2:] == [0, 24]
            else:
                assert backend.sharing is None and pair.shared is None
        prompts = Step(runner, ForwardMode.EXTEND, [9] * 8, [9] * 8)
        backend.init_forward_metadata(prompts.batch)
        check(backend, layer, prompts)
        assert backend.sharing is None


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"speculative_algorithm": "NGRAM"}, "NGRAM"),
        ({"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}, "speculative_eagle_topk=1"),
    ],
)
def test_refused_options(changed, what):
    with pytest.raises(NotImplementedError, match=what):
        FiAttnBackend(runner_of(layer_of(), **changed))


def test_refused_models_and_steps():
    runner = runner_of(layer_of())
    runner.model_config.attention_arch = AttentionArch.MLA
    with pytest.raises(NotImplementedError, match="MLA"):
        FiAttnBackend(runner)
    runner = runner_of(layer_of())
    runner.token_to_kv_pool = object()
    with pytest.raises(NotImplementedError, match="disable_hybrid_swa_memory"):
        FiAttnBackend(runner)
    runner = runner_of(layer_of())
    backend = FiAttnBackend(runner)
    for mode in (ForwardMode.DLLM_EXTEND, ForwardMode.DRAFT_EXTEND_V2):
        with pytest.raises(NotImplementedError, match=mode.name):
            backend.init_forward_metadata(Step(runner, mode, [5], [5]).batch)


def test_graphs_are_refused_where_calls_are_to_be_compared(monkeypatch):
    backend = FiAttnBackend(runner_of(layer_of()))
    monkeypatch.setattr(backend, "device", torch.device("cuda"))
    backend.init_cuda_graph_state(4, 4)
    monkeypatch.setenv("FI_SHADOW", "1")
    settings.cache_clear()
    with pytest.raises(NotImplementedError, match="disable_cuda_graph"):
        backend.init_cuda_graph_state(4, 4)
    monkeypatch.undo()
    settings.cache_clear()
