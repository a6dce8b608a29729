"""What a kernel is to the pipeline: a frozen spec that yields its source, its parameter layout and its launch shape."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .cache import Artifact
from .compile import INCLUDE_FOLDER, build, default_cache
from .launch import LaunchableKernel, LaunchShape, TensorMapKernel
from .params import ParamsLayout
from .source import CompileTarget, KernelSource
from .toolchain import NO_CONTRACTION

CPP_TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
    torch.int32: "int",
    torch.int64: "long long",
}

_CONSTANTS = ("static constexpr int ", "static constexpr bool ")
_LINE_LENGTH = 90


def join_constants(lines: Sequence[str]) -> list[str]:
    """Lines of ``Config`` with neighbouring constants of one type on one line: specs of many fields stay short."""
    joined: list[str] = []
    for line in lines:
        prefix = next((text for text in _CONSTANTS if line.startswith(text)), None)
        if prefix and joined and joined[-1].startswith(prefix) and len(joined[-1]) < _LINE_LENGTH:
            joined[-1] = f"{joined[-1][:-1]}, {line[len(prefix) :]}"
        else:
            joined.append(line)
    return joined


def _members(record: Any) -> list[str]:
    """A line for each field of a dataclass, as a member of ``Config``."""
    lines: list[str] = []
    for item in fields(record):
        value = getattr(record, item.name)
        camel = "".join(word.capitalize() for word in item.name.split("_"))
        if isinstance(value, torch.dtype):
            lines.append(f"using {camel} = {CPP_TYPES[value]};")
        elif isinstance(value, bool):
            lines.append(f"static constexpr bool k{camel} = {str(value).lower()};")
        elif not is_dataclass(value):
            lines.append(f"static constexpr int k{camel} = {value};")
        elif not isinstance(value, KernelSpec):
            lines += _members(value)
    return lines


@dataclass(frozen=True)
class KernelSpec:
    """Base of the specs. A subclass is a frozen dataclass whose fields become ``constexpr`` members or types of the C++
    struct ``Config`` (bool, int and torch.dtype fields, in camel case with a k for constants), and which names:

    - ``stem``: header ``fi/kernels/<stem>.cuh``, which defines ``template <class Config, class Params> __device__ void
      fi::<stem>(const Params&)``;
    - ``layout``: the fields of ``Params``;
    - ``include_folders``: where its own headers are (default: this package's);
    - ``tensor_maps``: names of tensor maps (``tensor_map.py``), which follow ``params`` in the function's parameters as
      ``const fi::ptx::TensorMap&`` and the struct's values in ``launch``;
    - ``overlapping``, ``cooperative``: how it is launched (``LaunchShape``);
    - ``contracts``: False if the compiler may not join products and sums: where a float decides at two places, joined at one of
      them it could decide otherwise, and emulation, which joins none, would not show it.
    """

    stem: ClassVar[str]
    layout: ClassVar[ParamsLayout]
    include_folders: ClassVar[tuple[Path, ...]] = (INCLUDE_FOLDER,)
    overlapping: ClassVar[bool] = False
    cooperative: ClassVar[bool] = False
    contracts: ClassVar[bool] = True
    tensor_maps: ClassVar[tuple[str, ...]] = ()

    @property
    def num_threads(self) -> int:
        """Threads a block."""
        raise AssertionError(f"{type(self).__name__} does not define num_threads")

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory a block."""
        return 0

    @property
    def cluster_size(self) -> int:
        """Blocks a cluster, consecutive in x: 1 to 8, on Hopper 16. Grids are multiples of it."""
        return 1

    @property
    def blocks_per_multiprocessor(self) -> int | None:
        """The second launch bound, which caps a thread's registers so that as many blocks fit; None: the compiler
        decides. A kernel that moves registers between its warpgroups needs one."""
        return None

    def config_lines(self) -> list[str]:
        """The members of ``Config``: of fields that are records theirs, of those that are specs none."""
        return [f"static constexpr int kNumThreads = {self.num_threads};", *_members(self)]

    def source(self) -> KernelSource:
        """The generated translation unit: an include, the config, the layout's assertions, one entry."""
        symbol = f"fi_{self.stem}"
        blocks = self.blocks_per_multiprocessor
        bounds = f"{self.num_threads}" if blocks is None else f"{self.num_threads}, {blocks}"
        maps = "".join(f",\n    const __grid_constant__ fi::ptx::TensorMap {name}" for name in self.tensor_maps)
        lines = [
            *([] if self.contracts else [NO_CONTRACTION]),
            f'#include "fi/kernels/{self.stem}.cuh"',
            *(['#include "fi/ptx/tma.cuh"'] if self.tensor_maps else []),
            "",
            "struct Config {",
            *(f"  {line}" for line in self.config_lines()),
            "};",
            "",
            *self.layout.declaration(),
            "",
            f'extern "C" __global__ void __launch_bounds__({bounds})',
            f"    {symbol}(const __grid_constant__ Params params{maps}) {{",
            f"  fi::{self.stem}<Config>({', '.join(('params', *self.tensor_maps))});",
            "}",
            "",
        ]
        return KernelSource(self.stem, symbol, "\n".join(lines), self.include_folders)


_kernels: dict[tuple[KernelSpec, str], LaunchableKernel] = {}
_loading = threading.Lock()


def arch_of(device: torch.device) -> str:
    """NVRTC's name of a CUDA device's architecture, with the accelerated feature set on Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def kernel_for(spec: KernelSpec, device: torch.device) -> LaunchableKernel:
    """The kernel of ``spec`` ready to launch on ``device``: from this process, the cache, or the compiler."""
    key = (spec, arch_of(device))
    found = _kernels.get(key)
    if found is None:
        with _loading:
            found = _kernels.get(key)
            if found is None:
                artifact = build(spec.source(), CompileTarget(key[1]), default_cache())
                found = _kernels[key] = _load(spec, artifact, device)
    return found


def _load(spec: KernelSpec, artifact: Artifact, device: torch.device) -> LaunchableKernel:
    overlapping = spec.overlapping and torch.cuda.get_device_capability(device) >= (9, 0)
    shape = LaunchShape(spec.num_threads, spec.shared_bytes, overlapping, spec.cluster_size, spec.cooperative)
    if spec.tensor_maps:
        return TensorMapKernel(artifact, spec.layout, shape, spec.tensor_maps)
    return LaunchableKernel(artifact, spec.layout, shape)
