"""Kernels made ahead of time: ``python -m fi_cuda.aot`` fills a folder by ninja; a wheel brings it to other machines.

An artifact made ahead of time is found by its content key, which leaves the compiler out: the machine that uses it may
have another NVRTC, or none, and machine code of the same text, headers, flags and arch is right whichever version made
it. A package whose headers or specs differ asks for other keys, so a wheel of another release is never used by mistake.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fi_core.hookspecs import hookimpl

from . import aot_edge
from .aot_server import serving
from .aot_steps import BUILT, INDEX, KERNELS, RECIPES, AotError, recipe_name, recipe_text
from .cache import Artifact, read_artifact
from .command_line import exit_code, parse_arch, parse_jobs
from .source import CompileTarget, KernelSource
from .toolchain import find_toolchain
from .wheel import pack_wheel

_NINJA_FILE = """\
rule compile
  command = {edge} compile $in
  depfile = $out_base.d
  deps = gcc
  description = compile $in
rule index
  command = {edge} index $in
  description = index

"""


class AotFolder:
    """A plugin that gives the artifacts of ``folder`` (``kernels`` of a folder that ``build_folder`` filled).

    ``folder`` is only read: no compiler and no cache is needed for what it holds. A wheel's entry point of the group
    ``fi`` names an instance. Raises AotError if the folder has no readable index, and when an artifact is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._names: dict[str, str] = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise AotError(f"{folder} has no readable {INDEX}: {error}") from error

    @hookimpl(optionalhook=True)
    def fi_find_artifact(self, key: str) -> Artifact | None:
        name = self._names.get(key)
        if name is None:
            return None
        artifact = read_artifact(self.folder / name)
        if artifact is None:
            raise AotError(f"{self.folder / name} is damaged: install its package again")
        return artifact

    @hookimpl
    def fi_doctor(self) -> list[str]:
        return [f"{len(self._names)} kernels made ahead of time in {self.folder}"]


def write_ninja(folder: Path, sources: Iterable[KernelSource], target: CompileTarget) -> None:
    """Write the recipes of ``sources`` and ``build.ninja`` into ``folder``; a file that would not change is not touched,
    and what earlier recipes left is removed. ``ninja -C folder`` then does the rest, also after a header is edited."""
    compiler = str(find_toolchain().nvrtc_version)
    recipes = {recipe_name(source, target): recipe_text(source, target, compiler) for source in sources}
    if not recipes:
        raise AotError("there is no kernel to build")
    for subfolder in (RECIPES, BUILT, KERNELS):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for path in (*(folder / RECIPES).glob("*.json"), *(folder / BUILT).glob("*.json")):
        if path.stem not in recipes:
            path.unlink()
    # -I and -S: an edge needs the standard library only, and starts in half the time.
    edge = shlex.join([sys.executable, "-I", "-S", aot_edge.__file__]).replace("$", "$$")
    text = _NINJA_FILE.format(edge=edge)
    for name, recipe in sorted(recipes.items()):
        _write_if_changed(folder / RECIPES / f"{name}.json", recipe)
        text += f"build {BUILT}/{name}.json: compile {RECIPES}/{name}.json\n  out_base = {BUILT}/{name}\n"
    built = " ".join(f"{BUILT}/{name}.json" for name in sorted(recipes))
    _write_if_changed(folder / "build.ninja", f"{text}\nbuild {KERNELS}/{INDEX}: index {built}\n")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def build_folder(folder: Path, sources: Iterable[KernelSource], target: CompileTarget, num_jobs: int) -> AotFolder:
    """Bring ``folder`` up to date with ``sources``: only what changed is compiled, ``num_jobs`` at a time. Raises
    ToolchainError, SourceError, or AotError if ninja is missing or failed (it has printed why)."""
    if importlib.util.find_spec("ninja") is None:
        raise AotError("ninja was not found; install it: pip install ninja")
    write_ninja(folder, sources, target)
    with serving(folder):
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(num_jobs)], check=False)
    if done.returncode != 0:
        raise AotError(f"ninja failed in {folder} with exit code {done.returncode}")
    return AotFolder(folder / KERNELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every shipped spec into a folder, and a wheel of it where asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fi_cuda.aot", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made or brought up to date")
    parser.add_argument("--arch", default="sm_90a", help="architecture (default: sm_90a)")
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1), metavar="N", help="compilations at a time")
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="also write the kernels as a wheel into FOLDER")
    parsed = parser.parse_args(arguments)

    def run() -> int:
        target = CompileTarget(parse_arch(parsed.arch))
        num_jobs = parse_jobs(parsed.jobs)
        from .shipped import shipped_specs

        kernels = build_folder(parsed.out, [spec.source() for spec in shipped_specs()], target, num_jobs).folder
        if parsed.wheel is not None:
            print(pack_wheel(kernels, target.arch, parsed.wheel))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
