"""The compiler is found and compiles for Hopper with no GPU and no driver; what is missing or wrong is named."""

import re
import struct
import subprocess
import sys

import pytest
from fi_core.errors import FiError
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import HEADERS, CompileError, ToolchainError, compile_cubin, find_toolchain

pytestmark = pytest.mark.timeout(120)

SCALE_ROWS = r"""
#include <cuda_bf16.h>
#include <cuda_fp8.h>

// setmaxnreg and wgmma exist on sm_90a alone: that this compiles shows which instructions the target has.
extern "C" __global__ void __launch_bounds__(128) scale_rows(
    const __nv_bfloat16* x, float scale, __nv_fp8_e4m3* out, int n) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  asm volatile("wgmma.fence.sync.aligned;");
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __nv_fp8_e4m3(__bfloat162float(x[i]) * scale);
}
"""

ELF_MAGIC = b"\x7fELF"
MACHINE_OFFSET, EM_CUDA = 18, 190


def test_toolchain_is_found_with_its_headers():
    toolchain = find_toolchain()
    assert toolchain.nvrtc_version >= (13, 0)
    assert toolchain.nvrtc_library.is_file()
    assert all((toolchain.include_folder / name).is_file() for name in HEADERS)
    assert str(toolchain.nvrtc_library) in str(toolchain)


def test_kernel_compiles_to_a_hopper_cubin_without_spills():
    cubin = compile_cubin(SCALE_ROWS, "scale_rows", CompileTarget())
    assert cubin.code.startswith(ELF_MAGIC)
    assert struct.unpack_from("<H", cubin.code, MACHINE_OFFSET) == (EM_CUDA,)
    assert b"scale_rows" in cubin.code
    assert "sm_90a" in cubin.report
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", cubin.report), cubin.report
    assert re.search(r"Used \d+ registers", cubin.report), cubin.report


def test_instruction_that_the_target_lacks_is_a_compile_error():
    with pytest.raises(CompileError, match="scale_rows for sm_80 does not compile") as caught:
        compile_cubin(SCALE_ROWS, "scale_rows", CompileTarget("sm_80"))
    assert "setmaxnreg" in caught.value.log


def test_syntax_error_names_the_source_and_the_line():
    with pytest.raises(CompileError, match="broken_kernel for sm_90a") as caught:
        compile_cubin(
            'extern "C" __global__ void broken_kernel() {\n  int x = ;\n}\n', "broken_kernel", CompileTarget()
        )
    assert "broken_kernel(2)" in caught.value.log
    assert isinstance(caught.value, FiError)


def test_missing_packages_are_named_with_the_command_that_installs_them():
    script = """
import sys
sys.modules["cuda"] = None
from fi_cuda.toolchain import ToolchainError, find_toolchain
try:
    find_toolchain()
except ToolchainError as error:
    assert "cuda" in str(error) and "pip install cuda-core nvidia-cuda-nvrtc nvidia-cuda-runtime" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    from cuda import pathfinder

    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda _: str(tmp_path))
    with pytest.raises(ToolchainError, match=r"cuda_bf16\.h.*looked in"):
        find_toolchain()


def test_plugin_loads_without_any_cuda_package():
    script = """
import sys
import torch  # which may import some of cuda.bindings itself
before = set(sys.modules)
import fi_cuda.plugin
loaded = sorted(name for name in set(sys.modules) - before if name.split(".")[0] == "cuda")
assert not loaded, loaded
info = fi_cuda.plugin.fi_backend()
assert (info.name, info.priority) == ("cuda", 100), info
assert fi_cuda.plugin.ENTRIES and all(entry.backend == "cuda" for entry in fi_cuda.plugin.ENTRIES)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
