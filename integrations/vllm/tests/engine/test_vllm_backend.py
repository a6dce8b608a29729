"""The registered backend, and vLLM's own validation of what it is asked for."""

from types import SimpleNamespace

import fi_vllm
import fi_vllm.backend as backend_module
import pytest
import torch
from fi_vllm.backend import FiBackend
from fi_vllm.metadata import FiMetadataBuilder
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.utils import select_common_block_size

ASKED = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(9, 0),
    "attn_type": AttentionType.DECODER,
}


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(backend_module, "current_platform", SimpleNamespace(device_type="cuda"))


def test_the_slot_custom_holds_the_backend():
    fi_vllm.register()
    fi_vllm.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is FiBackend
    assert AttentionBackendEnum[FiBackend.get_name()] is AttentionBackendEnum.CUSTOM


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"has_sink": True, "head_size": 64},
        {"head_size": 256, "kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e5m2", "dtype": torch.float16, "block_size": None},
        {"block_size": 544},
        {"use_batch_invariant": True},
        {"dtype": torch.float32},
    ],
)
def test_served(changed, on_hopper):
    assert FiBackend.validate_configuration(**{**ASKED, **changed}) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_mm_prefix": True}, "partial multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
        ({"use_non_causal": True}, "non-causal"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"head_size": 1024}, "no kernel supports"),
        ({"device_capability": DeviceCapability(7, 0)}, "no kernel supports"),
    ],
)
def test_refused_through_vllms_own_reasons(changed, reason, on_hopper):
    reasons = FiBackend.validate_configuration(**{**ASKED, **changed})
    assert any(reason in text for text in reasons), reasons


@pytest.mark.parametrize(("manager", "kernel"), [(16, 16), (48, 48), (256, 256), (544, 136), (1024, 256)])
def test_larger_blocks_are_cut_into_pages(manager, kernel):
    assert select_common_block_size(manager, [FiBackend]) == kernel


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_memory_of_a_cache(layout, monkeypatch):
    monkeypatch.setattr(backend_module, "get_kv_cache_layout", lambda: layout)
    shape = FiBackend.get_kv_cache_shape(7, 16, 2, 64)
    order = FiBackend.get_kv_cache_stride_order()
    memory = torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(5)])
    assert tuple(memory.shape) == shape and FiBackend.get_kv_cache_block_dim(16, 2, 64) == 0
    assert memory[0].untyped_storage().nbytes() and memory.stride(0) == memory[0].numel()
    tokens_apart, heads_apart = memory.stride(2), memory.stride(3)
    assert (tokens_apart > heads_apart) == (layout == "NHD")
    assert sorted(FiBackend.get_kv_cache_stride_order(True)) == list(range(6))


def test_graphs_of_every_batch_unless_calls_are_compared(environment):
    config = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))
    assert FiMetadataBuilder.get_cudagraph_support(config, None) is AttentionCGSupport.ALWAYS
    environment(FI_SHADOW="1")
    assert FiMetadataBuilder.get_cudagraph_support(config, None) is AttentionCGSupport.NEVER
