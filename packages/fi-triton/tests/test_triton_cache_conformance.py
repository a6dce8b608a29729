"""The conformance cases of the operations around the KV cache, and when this backend is chosen for them."""

from __future__ import annotations

import pytest
import torch
from fi_core import conformance
from fi_core.contract import Target
from fi_core.plan import attention_values
from fi_core.records import AttentionSpec
from fi_core.registry import registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@conformance.parametrize(
    "triton", ops=["attention", "append_kv", "find_shared_prefixes", "merge_states"], device=DEVICE
)
def test_conformance(case):
    case()


def reasons(op: str, target: Target, **values) -> str:
    operation = registry().operations[op]
    request = operation.request(target, **{**operation.typical, **values})
    (entry,) = (item for item in registry().kernels(op) if item.backend == "triton")
    return "; ".join(entry.reject(request))


@pytest.mark.parametrize("op", ["attention", "append_kv", "merge_states"])
def test_old_gpus_are_rejected(op):
    assert reasons(op, Target("cuda", (9, 0))) == ""
    assert "below sm_80" in reasons(op, Target("cuda", (7, 5)))


def test_fp8_needs_hardware_conversions():
    ampere, ada = Target("cuda", (8, 0)), Target("cuda", (8, 9))
    for kv_format in ("fp8_e4m3", "fp8_e5m2"):
        assert "compute capability 8.9" in reasons("attention", ampere, kv_format=kv_format)
        assert "compute capability 8.9" in reasons("append_kv", ampere, kv_format=kv_format)
        assert reasons("attention", ada, kv_format=kv_format) == reasons("append_kv", ada, kv_format=kv_format) == ""


def test_limits_are_named():
    target = Target("cuda", (9, 0))
    assert "head_dim: 512 is not 1 to 256" in reasons("attention", target, head_dim=512)
    assert "FP8 kv_format or that of q's dtype" in reasons("attention", target, kv_format="fp16")
    assert "float64" in reasons("attention", target, dtype=torch.float64, kv_format="bf16")


@pytest.mark.interpreter
def test_the_interpreter_is_used_only_when_asked_for():
    values = attention_values(AttentionSpec(4, 2, 64), 1)
    request = registry().operations["attention"].request(Target("cpu"), **values)
    assert registry().select(request).entry.backend == "reference"
    assert registry().select(request, "triton").entry.backend == "triton"
