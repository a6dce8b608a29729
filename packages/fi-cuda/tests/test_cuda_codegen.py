"""Every shipped spec compiles to Hopper machine code that keeps its values in registers, without a GPU."""

import pytest
from fi_cuda.compile import compile_source, parse_resources
from fi_cuda.shipped import shipped_specs
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import compile_cubin

pytestmark = pytest.mark.timeout(180)

MAX_REGISTERS = {
    "rmsnorm": 112,
    "gated_activation": 48,
    "rope": 96,
    "append_kv": 128,
    "merge_states": 80,
    "copy_pages": 64,
    "attention_plan": 80,
    "attention_decode": 255,
    "attention_prefill": 168,
    "attention_order": 56,
    "attention_prefix": 168,
    "attention_prefix_plan": 96,
    "sample": 128,
    "filter_logits": 128,
    "top_k": 128,
    "verify": 128,
    "penalize_logits": 80,
    "record_tokens": 48,
}
"""A thread; more would cost the resident warps that hide the latency of memory."""

HOPPER_ONLY = {
    "attention_decode",
    "attention_prefill",
    "attention_prefix",
    "sample",
    "filter_logits",
    "top_k",
    "verify",
}

SPECS = shipped_specs()


def test_each_spec_is_shipped_once():
    assert len({spec.source().text for spec in SPECS}) == len(SPECS)
    assert {spec.stem for spec in SPECS} == set(MAX_REGISTERS)


# A test a spec, so that each is compiled once, by whichever of pytest's processes is free.
@pytest.mark.parametrize("spec", [pytest.param(spec, id=f"{idx}-{spec.stem}") for idx, spec in enumerate(SPECS)])
def test_a_spec_keeps_within_its_budget(spec):
    source = spec.source()
    artifact = compile_cubin(source.text, source.stem, CompileTarget("sm_90a"), source.include_folders)
    resources = parse_resources(artifact.report)
    assert artifact.code.startswith(b"\x7fELF")
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    assert resources.num_registers <= MAX_REGISTERS[spec.stem]
    # Registers come in units of 8 a thread; a Hopper multiprocessor has 65536 of them and 48 KiB of static memory.
    assert (resources.num_registers + 7) // 8 * 8 * spec.num_threads <= 65536
    assert resources.shared_bytes <= 48 * 1024
    # What ptxas says where it has to wait for each product (C7510 to C7515).
    assert "wgmma.mma_async instructions are serialized" not in artifact.report


def test_specs_compile_for_other_architectures_too():
    # Half of the headers branch on the architecture: FP8 rounding in software, no dependent launch.
    first = {spec.stem: spec for spec in reversed(SPECS) if spec.stem not in HOPPER_ONLY}
    quantising = next(spec for spec in SPECS if spec.stem == "append_kv" and "__nv_fp8_e4m3" in spec.source().text)
    for spec in (*first.values(), quantising):
        resources = compile_source(spec.source(), CompileTarget("sm_80")).resources
        assert resources.spill_store_bytes == resources.spill_load_bytes == 0, spec
