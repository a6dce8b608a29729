"""Which backend serves an operation where all are installed: CUDA on Hopper, elsewhere what its headers allow, else Triton."""

import pytest
from fi_core.contract import Target
from fi_core.registry import registry

MEMORY_BOUND = ("append_kv", "copy_pages", "merge_states", "rope", "rmsnorm", "add_rmsnorm", "silu_mul", "gelu_mul")


def choice(op, capability):
    operation = registry().operations[op]
    return registry().select(operation.request(Target("cuda", capability), **operation.typical))


@pytest.mark.parametrize("op", [*MEMORY_BOUND, "attention", "sample"])
def test_cuda_kernels_win_on_hopper(op):
    selection = choice(op, (9, 0))
    assert selection.entry.backend == "cuda"
    assert f"triton.{op}: serves it, but cuda." in str(selection)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
@pytest.mark.parametrize("op", MEMORY_BOUND)
def test_memory_bound_cuda_kernels_serve_other_architectures(op, capability):
    assert choice(op, capability).entry.backend == "cuda"


@pytest.mark.parametrize("op", ["attention", "sample"])
def test_triton_serves_what_older_architectures_lack_and_the_text_says_why(op):
    selection = choice(op, (8, 0))
    assert selection.entry.full_name == f"triton.{op}"
    assert "capability: cuda sm_80 is below sm_90" in str(selection)
