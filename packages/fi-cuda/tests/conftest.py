"""Kernels that are recorded instead of launched, and specs compiled together with what Python believes of them."""

import struct
import sys
from pathlib import Path

import pytest
from fi_cuda.compile import compile_source
from fi_cuda.kernels.attention import layout, order, plan, prefill_state, prefill_tuning
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES
from fi_cuda.params import KINDS
from fi_cuda.source import CompileTarget, KernelSource

# pytest's importlib mode leaves sys.path alone; the tests share helpers that lie beside them.
sys.path.append(str(Path(__file__).parent))

from repeated_launches import Repeated


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

            def repeated(self, device, grid_x):
                return Repeated(self, device, grid_x)

        return Kernel()


@pytest.fixture
def recorder():
    return Launches()


@pytest.fixture
def prefill_launches(monkeypatch, recorder):
    """A machine of 7 processors whose prefill kernels are recorded instead of launched."""
    for module in (order, plan, prefill_state):
        monkeypatch.setattr(module, "kernel_for", recorder.kernel_for)
    monkeypatch.setattr(layout, "num_processors", lambda device: 7)
    monkeypatch.setattr(prefill_tuning, "shared_limit", lambda device: HOPPER_SHARED_BYTES)
    monkeypatch.setattr(prefill_state, "column_maps_of", lambda kv, *box: (("keys", *box), ("values", *box)))
    monkeypatch.setattr(prefill_state, "tensor_map_of", lambda tensor, box: (tensor.data_ptr(), box.shape))
    return recorder


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
