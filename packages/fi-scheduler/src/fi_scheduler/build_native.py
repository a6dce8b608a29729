"""Builds the native module ``fi_scheduler._partition`` with ninja: ``python -m fi_scheduler.build_native``.

Used in place on a source tree and by the wheel's build hook, which loads this file alone (no other part of fi, and no
torch, exists there); it therefore imports nothing but the standard library and pybind11.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HEADERS = tuple(PACKAGE / "include/fi/scheduler" / name for name in ("partition.cuh", "integers.cuh"))
MODULE_SOURCE = PACKAGE / "native/module.cpp"
SOURCES = (*HEADERS, MODULE_SOURCE)
MODULE_NAME = "_partition"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"


class NativeBuildError(RuntimeError):
    """The native module could not be built; the message holds the tool's output."""


def source_digest() -> str:
    """Digest of the sources of the native module; a built module carries the one it was made from."""
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]


def find_compiler(compiler: str | None = None) -> str | None:
    """Path of ``compiler``, by default the first of c++, g++, clang++ on the path; None when there is none."""
    if compiler is not None:
        found = shutil.which(compiler)
        if found is None:
            raise NativeBuildError(f"compiler {compiler!r}: no such program")
        return found
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def obstacle(compiler: str | None = None) -> str | None:
    """What this machine lacks for a build (a compiler, or Python's headers); None when it can build."""
    if find_compiler(compiler) is None:
        return "no C++ compiler found (install g++ or clang++, or name one with --compiler)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')} (install Python's development files)"
    return None


def module_filename() -> str:
    """File name of the module for the running interpreter."""
    return f"{MODULE_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _ninja_text(compiler: str, output: Path) -> str:
    import pybind11

    includes = [str(PACKAGE / "include"), pybind11.get_include(), sysconfig.get_path("include")]
    include_flags = " ".join(f"-isystem {_escaped(folder)}" for folder in includes[1:])
    return f"""rule module
  command = {_escaped(compiler)} {FLAGS} -shared -I{_escaped(includes[0])} {include_flags} $
    -DFI_SOURCE_DIGEST=\\"{source_digest()}\\" -MD -MF $out.d $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
build {_escaped(str(output))}: module {_escaped(str(MODULE_SOURCE))} | {" ".join(_escaped(str(path)) for path in HEADERS)}
"""


def _escaped(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def build(folder: Path, compiler: str | None = None) -> Path:
    """Compile the module into ``folder`` and return its path; raises NativeBuildError with the compiler's output."""
    missing = obstacle(compiler)
    if missing is not None:
        raise NativeBuildError(missing)
    program = find_compiler(compiler)
    assert program is not None
    output = folder / module_filename()
    with tempfile.TemporaryDirectory(prefix="fi-build-") as scratch:
        built = Path(scratch) / output.name
        (Path(scratch) / "build.ninja").write_text(_ninja_text(program, built))
        command = [shutil.which("ninja") or str(Path(sys.executable).parent / "ninja"), "-C", scratch]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise NativeBuildError("ninja is not installed (pip install ninja)") from error
        except subprocess.CalledProcessError as error:
            raise NativeBuildError(f"{' '.join(command)} failed:\n{error.stdout}{error.stderr}") from error
        # A rename inside one folder, so that a process that loads the module never sees half of it.
        staged = folder / f".{output.name}.{os.getpid()}"
        shutil.copyfile(built, staged)
        staged.replace(output)
    return output


def main() -> int:
    """Build in place, beside this file."""
    parser = argparse.ArgumentParser(prog="python -m fi_scheduler.build_native", description=main.__doc__)
    parser.add_argument("--compiler", help="C++ compiler (default: the first of c++, g++, clang++)")
    try:
        output = build(PACKAGE, parser.parse_args().compiler)
    except (NativeBuildError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
