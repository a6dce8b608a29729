"""The device code itself, run on the host against the oracle: conformance cases of the CUDA kernels without a GPU.

``FI_EMULATE=TEXT`` runs every case whose "operation/case" contains TEXT instead of the few here, which compile in a minute.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import dataclass, replace

import fi_cuda.kernels
import pytest
import torch
from emulated_kernels import EmulatedKernel, EmulationError, emulate
from fi_core.conformance import compare
from fi_core.contract import Target
from fi_core.registry import registry
from fi_cuda.compile import INCLUDE_FOLDER
from fi_cuda.kernels.attention import prefill_tuning, prefix_state
from fi_cuda.kernels.attention.prefill_state import attention_prefill
from fi_cuda.params import ParamsLayout
from fi_cuda.source import KernelSource

pytestmark = pytest.mark.timeout(600)

HOPPER = Target("cuda", (9, 0))
FEW = (
    "attention/mixed_bfloat16",
    "attention/fp8_e4m3_decode_heads",
    "attention/prefill_bfloat16",
    "attention/long_append",
    "attention/long_every_feature_d64",
    "attention/long_fp8_products_every_feature",
    "attention/long_fp8_e4m3_d128",
    "attention/long_rope_q_d128",
    "attention/prefix_inside_a_page",
    "append_kv/prefill",
    "rmsnorm/plain_bf16",
    "rope/half_computed_fp16",
    "silu_mul/plain_fp32",
    "sample/top_k_top_p",
    "sample/top_k_top_p_joint",
    "sample/hostile_plain",
    "filter_logits/top_k_top_p_probs",
    "top_k/plain_fp32",
    "verify_tree/plain",
)


def served_cases():
    """(operation, case, kernel) of what the CUDA backend serves."""
    text = os.environ.get("FI_EMULATE")
    for operation in registry().operations.values():
        for case in operation.cases():
            name = f"{operation.name}/{case.name}"
            if "large" in case.tags or (name not in FEW if text is None else text not in name):
                continue
            request = operation.request(HOPPER, **case.values)
            for entry in registry().kernels(operation.name):
                if entry.backend == "cuda" and not entry.reject(request):
                    yield pytest.param(case, entry, None, id=f"{name}-{entry.name}")
                    if case.values.get("levels"):
                        yield pytest.param(case, entry, {"choose": False}, id=f"{name}-{entry.name}-as_given")


def kernel_modules():
    for found in pkgutil.walk_packages(fi_cuda.kernels.__path__, "fi_cuda.kernels."):
        yield importlib.import_module(found.name)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("case", "entry", "changes"), list(served_cases()))
def test_emulated_conformance(case, entry, changes, seed, monkeypatch):
    emulate(monkeypatch, kernel_modules(), seed)
    if changes is not None:  # levels of few tokens do not pay
        tuning_for = prefix_state.prefix_tuning_for
        monkeypatch.setattr(prefix_state, "prefix_tuning_for", lambda *given: replace(tuning_for(*given), **changes))
    trial = case.build(torch.device("cpu"), seed)
    found = trial.run(entry.load())
    for name, wanted in trial.expected().items():
        result = compare(found[name], wanted, trial.tolerance[name])
        assert result.passed, f"{name}: {result.message}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["long_append_slots", "long_page_size_3_indptr"])
def test_emulated_clusters_of_blocks_that_share_a_tile(name, seed, monkeypatch):
    emulate(monkeypatch, kernel_modules(), seed)
    built_in = prefill_tuning.built_in_prefill_tuning
    monkeypatch.setattr(prefill_tuning, "built_in_prefill_tuning", lambda *given: replace(built_in(*given), cluster=2))
    operation = registry().operations["attention"]
    case = next(case for case in operation.cases() if case.name == name)
    trial = case.build(torch.device("cpu"), seed)
    found = trial.run(attention_prefill)
    for output, wanted in trial.expected().items():
        result = compare(found[output], wanted, trial.tolerance[output])
        assert result.passed, f"{output}: {result.message}"


def test_the_few_cases_are_there():
    named = {
        f"{operation.name}/{case.name}" for operation in registry().operations.values() for case in operation.cases()
    }
    assert set(FEW) <= named


# The machine itself: a fault that it does not see proves nothing.

REVERSE = """#include "fi/ptx/fence.cuh"
struct Params { const void* x; void* y; };
extern "C" __global__ void fi_reverse(const Params params) {
  __shared__ int kept[64];
  kept[threadIdx.x] = static_cast<const int*>(params.x)[threadIdx.x];
  BARRIER
  static_cast<int*>(params.y)[threadIdx.x] = kept[63 - threadIdx.x];
}
"""
FETCH = """#include "fi/ptx/bulk_copy.cuh"
struct Params { const void* x; void* y; };
extern "C" __global__ void fi_fetch(const Params params) {
  __shared__ alignas(16) int kept[64];
  __shared__ unsigned long long barrier;
  if (threadIdx.x == 0) fi::ptx::init_barrier(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    fi::ptx::arrive_and_expect_bytes(&barrier, BYTES);
    fi::ptx::bulk_load(kept, params.x, 256, &barrier);
  }
  WAIT
  static_cast<int*>(params.y)[threadIdx.x] = kept[threadIdx.x];
}
"""


@dataclass(frozen=True)
class Planted:
    stem: str
    text: str
    num_threads: int = 64
    cluster_size: int = 1
    shared_bytes: int = 0
    tensor_maps: tuple[str, ...] = ()
    layout: ParamsLayout = ParamsLayout((("x", "pointer"), ("y", "output")))

    def source(self):
        return KernelSource(self.stem, f"fi_{self.stem}", self.text, (INCLUDE_FOLDER,))


UNWRITTEN = """struct Params { const void* x; void* y; };
extern "C" __global__ void fi_unwritten(const Params params) {
  __shared__ int kept[64];
  if (threadIdx.x > 0) kept[threadIdx.x] = 0;
  static_cast<int*>(params.y)[threadIdx.x] = kept[threadIdx.x];
}
"""
CONSTANT = """struct Params { const void* x; void* y; };
struct Config { static constexpr int kValue = VALUE; };
template <class C> struct Shape { static constexpr int kValue = C::kValue; };
extern "C" __global__ void fi_constant(const Params params) {
  const int* value = &Shape<Config>::kValue;
  asm volatile("" : "+r"(value));
  static_cast<int*>(params.y)[threadIdx.x] = *value;
}
"""
NOT_A_NUMBER = """#include "fi/ptx/fence.cuh"
struct Params { const void* x; void* y; };
extern "C" __global__ void fi_not_a_number(const Params params) {
  const float infinity = __int_as_float(0x7f800000 + static_cast<const int*>(params.x)[0]);
  static_cast<int*>(params.y)[threadIdx.x] = __float_as_int(__fsub_rn(infinity, infinity));
}
"""


def run_planted(stem, text):
    x = torch.arange(64, dtype=torch.int32)
    y = torch.full_like(x, -1)
    EmulatedKernel(Planted(stem, text)).launch(x.device, 1, 1, x.data_ptr(), y.data_ptr())
    return x, y


def test_a_barrier_is_needed():
    x, y = run_planted("reverse", REVERSE.replace("BARRIER", "__syncthreads();"))
    assert torch.equal(y, x.flip(0))
    x, y = run_planted("reverse", REVERSE.replace("BARRIER", ""))
    assert not torch.equal(y, x.flip(0))


def test_a_wait_is_needed():
    waiting = "fi::ptx::wait_barrier(&barrier, 0);"
    x, y = run_planted("fetch", FETCH.replace("WAIT", waiting).replace("BYTES", "256"))
    assert torch.equal(y, x)
    x, y = run_planted("fetch", FETCH.replace("WAIT", "").replace("BYTES", "256"))
    assert not torch.equal(y, x)


def test_threads_that_wait_for_ever_are_named():
    text = FETCH.replace("WAIT", "fi::ptx::wait_barrier(&barrier, 0);").replace("BYTES", "272")
    with pytest.raises(EmulationError, match=r"wait for ever\n  block 0,0 warp 0: an mbarrier \(32\)"):
        run_planted("fetch", text)


def test_an_arrival_too_many_is_an_error():
    text = FETCH.replace("WAIT", "fi::ptx::arrive(&barrier); fi::ptx::arrive(&barrier);").replace("BYTES", "256")
    with pytest.raises(EmulationError, match="an arrival beyond the barrier's count"):
        run_planted("fetch", text)


def test_what_nobody_wrote_depends_on_the_seed(monkeypatch):
    found = set()
    for seed in range(4):
        monkeypatch.setattr(EmulatedKernel, "seed", seed)
        _, y = run_planted("unwritten", UNWRITTEN)
        assert not y[1:].any()
        found.add(y[0].item())
    assert len(found) == 4


def test_each_kernel_of_a_process_has_its_own_constants():
    for value in (5, 7):
        _, y = run_planted("constant", CONSTANT.replace("VALUE", str(value)))
        assert (y == value).all()


def test_the_nan_of_arithmetic_has_the_bits_of_a_gpus():
    _, y = run_planted("not_a_number", NOT_A_NUMBER)
    assert (y == 0x7FFFFFFF).all()
