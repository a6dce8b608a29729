"""CUDA kernels on the host: a spec's generated text and the device headers, compiled by g++ and run by ``emulation/machine.hpp``.

What is emulated is one step below the headers: CUDA's built-ins and the instructions of ``fi/ptx``. So index maths, barriers
and arithmetic are those of the GPU; its rounding of approximate functions, its timing and its memory model are not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import fi_cuda.tensor_map
import nvidia.cu13
import torch
from fi_cuda.kernels.attention.tuning import HOPPER_SHARED_BYTES
from fi_cuda.params import TensorMap
from fi_cuda.spec import KernelSpec
from fi_cuda.tensor_map import Box
from repeated_launches import Repeated

EMULATION = Path(__file__).parent / "emulation"
CUDA_HEADERS = Path(nvidia.cu13.__path__[0]) / "include"

_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w: ]+?) (\w+)\[\];")
_VARIABLE = re.compile(r"(?:alignas\(\d+\) )?__shared__ ([^;]+?) (\w+)((?:\[[^;]*\])*);")
_RUN = """
extern "C" int fi_emulate(const void* packed, void* const* maps, unsigned grid_x, unsigned grid_y, unsigned num_threads,
                          unsigned cluster, unsigned shared_bytes, unsigned seed, char* error, unsigned error_bytes) {{
  (void)maps;
  const std::string text = emulated::run({{grid_x, grid_y, num_threads, cluster, shared_bytes, seed}}, [&] {{
    {symbol}(*static_cast<const Params*>(packed){maps});
  }});
  std::snprintf(error, error_bytes, "%s", text.c_str());
  return text.empty() ? 0 : 1;
}}
"""


class EmulationError(RuntimeError):
    """The source does not compile for the host, or its threads wait for ever or break a rule of the machine."""


@functools.cache
def _work_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fi_emulation_"))


def _host_text(text: str) -> str:
    """Shared memory as the machine hands it out: each block has its own."""
    text = _DYNAMIC.sub(r"auto* const \2 = ::emulated::dynamic_shared<\1>();", text)
    return _VARIABLE.sub(
        r"static const char \2_tag = 0; using \2_type = \1 \3; auto& \2 = ::emulated::shared_variable<\2_type>(&\2_tag);",
        text,
    )


@functools.cache
def _mirror(folders: tuple[Path, ...]) -> Path:
    """One folder with the headers of all ``folders``, those of the emulated instructions in their place."""
    digest = hashlib.sha256(repr(folders).encode()).hexdigest()[:12]
    target = _work_folder() / f"include_{digest}"
    for folder in folders:
        for path in folder.rglob("*.cuh"):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_host_text(path.read_text()))
    shutil.copytree(EMULATION, target, dirs_exist_ok=True)
    _compile(f"-I{target}", "-x", "c++-header", str(target / "builtins.hpp"), "-o", str(target / "builtins.hpp.gch"))
    return target


def _compile(*arguments: str) -> None:
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-w",
        "-ffp-contract=off",
        "-frounding-math",
        "-fno-strict-aliasing",
        # A constant of a template on ``Config`` has the same name in every kernel: libraries must not share it.
        "-fno-gnu-unique",
    ]
    command += ["-U_FORTIFY_SOURCE", "-fmax-errors=5", f"-I{CUDA_HEADERS}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{' '.join(arguments)}:\n{done.stderr[:6000]}")


@functools.cache
def _library(spec: KernelSpec) -> ctypes.CDLL:
    source = spec.source()
    maps = "".join(f", *static_cast<const fi::ptx::TensorMap*>(maps[{idx}])" for idx in range(len(spec.tensor_maps)))
    text = '#include "builtins.hpp"\n' + _host_text(source.text) + _RUN.format(symbol=source.symbol, maps=maps)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    cpp, library = _work_folder() / f"{source.stem}_{name}.cpp", _work_folder() / f"{source.stem}_{name}.so"
    cpp.write_text(text)
    _compile("-shared", f"-I{_mirror(source.include_folders)}", "-o", str(library), str(cpp))
    return ctypes.CDLL(str(library))


class EmulatedKernel:
    """Stands in for ``LaunchableKernel``: ``launch`` runs the grid to its end, on tensors in host memory."""

    seed: ClassVar = 0
    """Of the order in which asynchronous copies arrive."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    def launch(self, device: torch.device, grid_x: int, grid_y: int, *values: Any) -> None:
        """Raises EmulationError."""
        if not grid_x or not grid_y:
            return
        spec = self.spec
        num_maps = len(spec.tensor_maps)
        scalars, maps = values[: len(values) - num_maps], values[len(values) - num_maps :]
        packed = ctypes.create_string_buffer(spec.layout.packer.pack(*scalars))
        pointers = (ctypes.c_void_p * max(num_maps, 1))(*(tensor_map.address for tensor_map in maps))
        error = ctypes.create_string_buffer(4096)
        shape = (grid_x, grid_y, spec.num_threads, spec.cluster_size, spec.shared_bytes, type(self).seed)
        if _library(spec).fi_emulate(packed, pointers, *shape, error, len(error)):
            raise EmulationError(f"{spec.stem}: {error.value.decode()}")

    def repeated(self, device: torch.device, grid_x: int) -> Repeated:
        return Repeated(self, device, grid_x)


def _tensor_map(
    pointer: int, dtype: torch.dtype, shape: tuple, strides: tuple, box: Box, device: torch.device
) -> TensorMap:
    """Stands in for the driver's encoding: the record ``BoxMap`` of ``emulation/fi/ptx/tma.cuh``."""
    rank, item = len(shape), dtype.itemsize
    outer = [stride * item for stride in strides[-2::-1]]
    record = struct.pack(
        "@QIIII5Q4Q5I",
        *(pointer, rank, item, box.swizzle_bytes, box.nan_outside),
        *(*reversed(shape), *[1] * (5 - rank)),
        *(*outer, *[0] * (5 - rank)),
        *(*reversed(box.shape), *[1] * (5 - rank)),
    )
    made = TensorMap()
    ctypes.memmove(made.address, record, len(record))
    return made


def emulate(monkeypatch: Any, modules: Iterable[Any], seed: int = 0) -> None:
    """Kernels of ``modules`` run on the host from now on."""
    monkeypatch.setattr(EmulatedKernel, "seed", seed)
    monkeypatch.setattr(fi_cuda.tensor_map, "tensor_map", _tensor_map)
    stand_ins = {
        "kernel_for": lambda spec, device: EmulatedKernel(spec),
        "num_processors": lambda device: 3,
        "shared_limit": lambda device: HOPPER_SHARED_BYTES,
    }
    for module in modules:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
