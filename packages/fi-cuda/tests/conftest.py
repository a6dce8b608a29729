"""Kernels that are recorded instead of launched, kernels that run on the host, and specs compiled together with what Python
believes of them."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from fi_cuda.compile import INCLUDE_FOLDER, compile_source
from fi_cuda.params import KINDS
from fi_cuda.source import CompileTarget, KernelSource


class Launches:
    """Stands in for every kernel: ``specs`` asked for, and the ``last`` launch of each stem: grid, values by name, spec."""

    def __init__(self):
        self.last = {}
        self.specs = []

    def kernel_for(self, spec, device):
        self.specs.append(spec)
        recorder = self

        class Kernel:
            def launch(self, device, grid_x, grid_y, *values):
                names = [name for name, _ in spec.layout.fields]
                struct.pack(spec.layout.packer.format, *values[: len(names)])  # as the driver would be given them
                names += spec.tensor_maps
                recorder.last[spec.stem] = ((grid_x, grid_y), dict(zip(names, values, strict=True)), spec)

        return Kernel()


@pytest.fixture
def recorder():
    return Launches()


@pytest.fixture
def compile_with_offsets():
    """Compiles a spec for Hopper with an assertion of every parameter's offset, and more lines of the caller's."""

    def compiled(spec, *lines):
        assertions, codes = [*lines], ""
        for field, kind in spec.layout.fields:
            code = KINDS[kind][1]
            offset = struct.calcsize(f"@{codes}0{code}")
            # NVRTC has no offsetof; this is what the macro is made of.
            assertions.append(f"static_assert(__INTADDR__(&((Params*)0)->{field}) == {offset});")
            codes += code
        source = spec.source()
        text = source.text.replace('extern "C"', " ".join(assertions) + '\nextern "C"')
        return compile_source(
            KernelSource(source.stem, source.symbol, text, source.include_folders), CompileTarget("sm_90a")
        )

    return compiled


HOST_FOLDER = Path(__file__).parent / "host"
"""What stands in for the device's language and instructions."""


class HostKernel:
    """A spec's generated source compiled for the host (host/device.hpp), with what it launches run at once."""

    def __init__(self, spec, folder):
        self.spec, source = spec, spec.source()
        name = f"{source.stem}_{len(list(folder.iterdir()))}"
        lines = ('#include "device.hpp"', source.text, f"#define KERNEL {source.symbol}", '#include "device.cpp"', "")
        (folder / f"{name}.cpp").write_text("\n".join(lines))
        compiler = next(path for name in ("g++", "c++", "clang++") if (path := shutil.which(name)))
        flags = ["-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
        folders = [f"-I{each}" for each in (HOST_FOLDER, INCLUDE_FOLDER)]
        command = [compiler, *flags, *folders, f"{name}.cpp", "-o", f"{name}.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(folder / f"{name}.so"))
        self.num_launches = 0

    def launch(self, device, grid_x, grid_y, *values):
        assert grid_y == 1
        params = self.spec.layout.packer.pack(*values)
        self.num_launches += 1  # threads run in another order each time
        sizes = (grid_x, self.spec.num_threads, self.spec.cluster_size, self.num_launches)
        assert self.library.run_grid(params, *sizes) == 0, f"some threads of {self.spec} wait for ever"


@pytest.fixture(scope="session")
def host_kernel_for(tmp_path_factory):
    """What ``kernel_for`` is, of kernels that run on the host."""
    folder, kernels = tmp_path_factory.mktemp("host_kernels"), {}

    def kernel_for(spec, device):
        if spec not in kernels:
            kernels[spec] = HostKernel(spec, folder)
        return kernels[spec]

    return kernel_for
