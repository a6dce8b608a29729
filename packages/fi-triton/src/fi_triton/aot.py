"""Compiles the kernels to cubins without a GPU and reports registers, stack (spills) and shared memory.

Run as ``python -m fi_triton.aot --arch 80 90 100``. Any module of the package named ``aot_specs`` or ``*_aot_specs``
contributes its list ``AOT_SPECS``. The process must not interpret (``TRITON_INTERPRET``): the interpreter replaces the
compiler when a kernel is decorated.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .interpreter import interpreting

DEFAULT_ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class AotSpec:
    """One specialisation to compile.

    ``kernel`` is "module:function". ``arguments`` gives each argument's Triton type ("*bf16", "i32", "fp32"; pointers
    are taken as 16-byte aligned, "i32:16" is an integer divisible by 16); ``constants`` every other argument's value
    (constexprs, and None for absent tensors). ``max_stack_bytes`` is the budget of local memory, 0 forbids spills.
    """

    name: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    max_stack_bytes: int = 0
    min_arch: int = 80


@dataclass(frozen=True)
class AotResult:
    """What one specialisation takes on one architecture; ``error`` is None unless it failed or broke its budget."""

    spec: AotSpec
    arch: int
    num_registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    error: str | None = None


def all_specs() -> list[AotSpec]:
    """The AOT_SPECS of every ``aot_specs`` or ``*_aot_specs`` module of this package, in order of module name."""
    import fi_triton

    specs: list[AotSpec] = []
    for module in sorted(pkgutil.walk_packages(fi_triton.__path__, "fi_triton."), key=lambda item: item.name):
        stem = module.name.rpartition(".")[2]
        if stem == "aot_specs" or stem.endswith("_aot_specs"):
            specs += importlib.import_module(module.name).AOT_SPECS
    return specs


def compile_spec(spec: AotSpec, arch: int) -> AotResult:
    """Compile ``spec`` for compute capability ``arch`` (90 for 9.0) and measure the cubin."""
    if interpreting():
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET")
    try:
        cubin, shared_bytes = _compile(spec, arch)
    except Exception as error:  # noqa: BLE001 - the compiler raises many types; each is a failed row of the report
        return AotResult(spec, arch, error=f"{type(error).__name__}: {error}")
    usage = _resource_usage(cubin)
    stack_bytes = usage["STACK"] + usage["LOCAL"]
    over = stack_bytes > spec.max_stack_bytes
    error_text = f"stack of {stack_bytes} bytes exceeds the budget of {spec.max_stack_bytes}" if over else None
    return AotResult(spec, arch, usage["REG"], stack_bytes, shared_bytes, error_text)


def _compile(spec: AotSpec, arch: int) -> tuple[bytes, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = spec.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    unknown = (set(spec.arguments) | set(spec.constants)) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(
            f"{spec.name}: arguments and constants do not match the kernel's parameters: {sorted(unknown)}"
        )
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind, _, divisor = spec.arguments.get(name, "constexpr").partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor or 16)]]
    source = ASTSource(kernel, signature, dict(spec.constants), attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


@lru_cache(maxsize=1)
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the cubin's only kernel, from cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (item.split(":") for line in text.splitlines() if "REG:" in line for item in line.split())
    usage = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    return {name: usage[name] for name in ("REG", "STACK", "LOCAL")}


def report(results: Sequence[AotResult]) -> str:
    """The table that the command prints: one line a result, then each failure's reason."""
    width = max((len(result.spec.name) for result in results), default=4)
    lines = [f"{'kernel':<{width}}  arch  registers  stack  shared"]
    for result in results:
        numbers = f"{result.num_registers:>9}  {result.stack_bytes:>5}  {result.shared_bytes:>6}"
        lines.append(f"{result.spec.name:<{width}}  {result.arch:>4}  {numbers}{'  FAILED' if result.error else ''}")
    lines += [f"{item.spec.name} sm_{item.arch}: {item.error}" for item in results if item.error]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every spec (or those whose name contains ``--only``) for each ``--arch``; 1 if any fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fi_triton.aot", description="compile the Triton kernels without a GPU"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(DEFAULT_ARCHS), help="compute capabilities, 90 for 9.0"
    )
    parser.add_argument("--only", default="", help="part of a spec's name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile side by side")
    options = parser.parse_args(arguments)
    specs = [spec for spec in all_specs() if options.only in spec.name]
    wanted = [(spec, arch) for spec in specs for arch in options.arch if arch >= spec.min_arch]
    if options.jobs > 1 and len(wanted) > 1:
        # A process of its own for each: the compiler must not be forked after it has started threads.
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(compile_spec, *zip(*wanted, strict=True)))
    else:
        results = [compile_spec(spec, arch) for spec, arch in wanted]
    print(report(results))
    if not specs:
        print(f"no spec has {options.only!r} in its name")
    return 1 if not specs or any(result.error for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
