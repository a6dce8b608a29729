"""NVRTC and the CUDA headers: where they are, and compiling a source to a cubin with neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_core.errors import FiError

from .source import CompileTarget

NO_CONTRACTION = "#pragma STDC FP_CONTRACT OFF"
"""C's way to say that a product and a sum are rounded one by one, wherever the text has no fmaf. NVRTC knows an option alone,
which concerns the whole source."""

HEADERS = ("cuda_bf16.h", "cuda_fp8.h")
"""What device code may include besides this package's own headers; all come with nvidia-cuda-runtime."""

_INSTALL = "pip install cuda-core nvidia-cuda-nvrtc nvidia-cuda-runtime"


_loading = threading.Lock()
"""Held while cuda.core and NVRTC load: threads that import cuda.core at once were seen to find it half made."""


class ToolchainError(FiError):
    """A part of the compiler is missing; the message names the part and the command that installs it."""


class CompileError(FiError):
    """NVRTC refused a source; ``log`` is the compiler's own text."""

    def __init__(self, name: str, arch: str, log: str) -> None:
        self.log = log
        super().__init__(f"{name} for {arch} does not compile:\n{log}")


@dataclass(frozen=True)
class Toolchain:
    """A usable compiler: NVRTC's version and library, the folder of the CUDA headers, cuda.core's version."""

    nvrtc_version: tuple[int, int]
    nvrtc_library: Path
    include_folder: Path
    cuda_core_version: str

    def __str__(self) -> str:
        major, minor = self.nvrtc_version
        nvrtc = f"NVRTC {major}.{minor} ({self.nvrtc_library})"
        return f"{nvrtc}, headers {self.include_folder}, cuda.core {self.cuda_core_version}"


@dataclass(frozen=True)
class Cubin:
    """Machine code of one source: ``code`` (an ELF image), and ``report``: what ptxas -v said of registers, spills."""

    code: bytes
    report: str


def find_toolchain() -> Toolchain:
    """Locate NVRTC, the headers and cuda.core; raises ToolchainError for the first that is missing. Needs no driver."""
    with _loading:
        return _find_toolchain()


def _find_toolchain() -> Toolchain:
    try:
        import cuda.core  # noqa: F401 - here, under the lock
        from cuda import pathfinder
        from cuda.bindings import nvrtc

        cuda_core_version = importlib.metadata.version("cuda-core")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise ToolchainError(f"{error}; install it: {_INSTALL}") from error
    try:
        library = Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except pathfinder.DynamicLibNotFoundError as error:
        raise ToolchainError(f"libnvrtc was not found ({error}); install it: {_INSTALL}") from error
    for builtins in library.parent.glob("libnvrtc-builtins.so*"):
        # NVRTC opens it by name at the first compilation, which was seen to fail when several threads compile at once.
        ctypes.CDLL(str(builtins))
    folder = pathfinder.find_nvidia_header_directory("cudart")
    missing = [name for name in HEADERS if folder is None or not (Path(folder) / name).is_file()]
    if missing:
        raise ToolchainError(f"CUDA headers {missing} were not found (looked in {folder}); install them: {_INSTALL}")
    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ToolchainError(f"{library} does not tell its version: {status}")
    return Toolchain((major, minor), library, Path(str(folder)), cuda_core_version)


def has_driver() -> bool:
    """Whether libcuda can be loaded. Ask before any driver call: without one, cuda.core's launch half can hang."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def compile_cubin(source: str, name: str, target: CompileTarget, include_folders: Sequence[Path] = ()) -> Cubin:
    """Compile CUDA C++ (C++17, ``name`` appears in messages) to machine code; raises CompileError or ToolchainError.

    Quoted includes are looked up in ``include_folders``. Only a cubin is ever asked for: cuda.core's PTX output needs a
    driver. The result is not loaded. A source with ``NO_CONTRACTION`` gets what it asks for from here.
    """
    toolchain = find_toolchain()
    from cuda.core import Program, ProgramOptions
    from cuda.core._utils.cuda_utils import NVRTCError  # cuda.core raises it without exporting it

    options: Any = ProgramOptions(
        name=name,
        arch=target.arch,
        std="c++17",
        include_path=[*map(str, include_folders), str(toolchain.include_folder)],
        ptxas_options=["-v"],
        use_fast_math=target.fast_math or None,
        lineinfo=target.line_info or None,
        max_register_count=target.max_registers,
        no_cache=True,  # of NVRTC's own: what this package keeps it checks, and says where it came from
        fma=False if NO_CONTRACTION in source else None,
    )
    log = io.StringIO()
    program = Program(source, "c++", options)
    try:
        code = program.compile("cubin", logs=log).code
    except NVRTCError as error:
        raise CompileError(name, target.arch, f"{log.getvalue()}{error}") from error
    finally:
        program.close()
    return Cubin(bytes(code), log.getvalue())
