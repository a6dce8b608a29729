"""The ``fi_cuda`` command. Exit codes: 0 success, 1 a negative finding or an error (on stderr), 2 wrong usage."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fi_core.errors import ArgumentError, FiError
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry

from .cache import Artifact, ArtifactCache
from .command_line import complain, exit_code, parse_arch, parse_jobs
from .compile import build, default_cache
from .explain import explanations
from .hookspecs import CompileEvent, declare
from .source import CompileTarget, KernelSource

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; each sets ``run``, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(prog="fi_cuda", description="Compile and inspect CUDA kernels; no GPU is needed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("build", help="compile the shipped kernels into the cache")
    command.add_argument("stems", metavar="STEM", nargs="*", help="only these kernels (default: all)")
    command.add_argument("--arch", default="sm_90a", help="architecture (default: sm_90a)")
    command.add_argument("--jobs", default=str(os.cpu_count() or 1), metavar="N", help="compilations at a time")
    command.set_defaults(run=_build)
    command = commands.add_parser("list", help="the artifacts in the cache")
    command.set_defaults(run=_list)
    command = commands.add_parser("show", help="resources and generated source of artifacts in the cache")
    command.add_argument("name", metavar="NAME|STEM", help="a stem, or a name as far as it is distinct")
    command.set_defaults(run=_show)
    command = commands.add_parser("explain", help="what makes up a kernel's key, and whether a build compiles it")
    command.add_argument("name", metavar="NAME|STEM", help="a stem, or a name as far as it is distinct")
    command.add_argument("--arch", default="sm_90a", help="architecture of shipped kernels (default: sm_90a)")
    command.set_defaults(run=_explain)
    command = commands.add_parser("prune", help="remove old artifacts, and what killed processes left, from the cache")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--older-than", default="30d", metavar="AGE", help="such as 90s, 10m, 12h or 30d (default)")
    which.add_argument("--all", action="store_true", help="whatever its age")
    command.set_defaults(run=_prune)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: sys.argv); returns the exit code."""
    parsed = build_parser().parse_args(arguments)
    return exit_code(lambda: int(parsed.run(parsed)))


def _shipped_sources() -> list[KernelSource]:
    from .shipped import shipped_specs

    return [spec.source() for spec in shipped_specs()]


class _Progress:
    """A plugin that prints an artifact when the pipeline has it."""

    @hookimpl
    def fi_on_compile(self, event: CompileEvent) -> None:
        print(f"{event.stem}-{event.key[:12]}  {event.seconds:6.2f} s  {event.origin}", flush=True)


def _build(arguments: argparse.Namespace) -> int:
    target = CompileTarget(parse_arch(arguments.arch))
    num_jobs = parse_jobs(arguments.jobs)
    sources = _shipped_sources()
    stems = sorted({source.stem for source in sources})
    for stem in arguments.stems:
        if stem not in stems:
            raise ArgumentError("STEM", f"one of {', '.join(stems)}", stem)
    cache, manager, progress = default_cache(), registry().manager, _Progress()
    declare(manager)
    manager.register(progress, "progress")
    failures: list[str] = []
    try:
        with ThreadPoolExecutor(num_jobs) as pool:
            chosen = [source for source in sources if not arguments.stems or source.stem in arguments.stems]
            for waiting in [pool.submit(build, source, target, cache) for source in chosen]:
                try:
                    waiting.result()
                except FiError as error:
                    if str(error) not in failures:  # kernels of one header tend to fail alike
                        complain(error)
                    failures.append(str(error))
    finally:
        manager.unregister(progress)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} kernels are ready for {target.arch}; cache: {cache.root}")
    return 1 if failures else 0


def _list(arguments: argparse.Namespace) -> int:
    cache = default_cache()
    names = cache.names()
    columns = ("name", "arch", "registers", "shared", "spills", "bytes", "age", "compile")
    rows = [columns, *(_row(cache, name) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows if names else []:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(names)} artifacts in {cache.root}")
    return 0


def _row(cache: ArtifactCache, name: str) -> tuple[str, ...]:
    folder = cache.root / name
    age = _age(time.time() - folder.stat().st_mtime)
    artifact = cache.find(name)
    if artifact is None:
        num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        return (name, "damaged", "", "", "", str(num_bytes), age, "")
    found = artifact.resources
    spills = found.spill_store_bytes + found.spill_load_bytes
    figures = (found.num_registers, found.shared_bytes, spills, len(artifact.cubin))
    return (name, artifact.arch, *map(str, figures), age, f"{artifact.compile_s:.2f} s")


def _age(seconds: float) -> str:
    unit = next((unit for unit in "dhm" if seconds >= _SECONDS[unit]), "s")
    return f"{max(0, int(seconds / _SECONDS[unit]))} {unit}"


def _matching(cache: ArtifactCache, name: str) -> list[Artifact]:
    """The intact artifacts of that stem, or whose name starts so; a stem and a dash belong to a name."""
    found = [cache.find(item) for item in cache.names() if item.rpartition("-")[0] == name or item.startswith(name)]
    return [item for item in found if item is not None and (item.stem == name or "-" in name)]


def _show(arguments: argparse.Namespace) -> int:
    cache = default_cache()
    artifacts = _matching(cache, arguments.name)
    if not artifacts:
        raise ArgumentError("NAME|STEM", f"an intact artifact of {cache.root} (`fi_cuda list`)", arguments.name)
    print("\n".join(map(_details, artifacts)), end="")
    return 0


def _details(artifact: Artifact) -> str:
    found = artifact.resources
    flags = ", ".join(artifact.flags) or "none"
    lines = [
        artifact.name,
        f"  symbol {artifact.symbol}, arch {artifact.arch}, flags {flags}, compiler {artifact.compiler}",
        f"  {found.num_registers} registers a thread, {found.shared_bytes} bytes of static shared memory",
        f"  {found.stack_bytes} bytes of stack, spills: {found.spill_store_bytes} bytes stored, "
        f"{found.spill_load_bytes} loaded",
        f"  {len(artifact.cubin)} bytes of machine code, compiled in {artifact.compile_s:.2f} s",
        *(f"  | {line}".rstrip() for line in artifact.text.splitlines()),
    ]
    return "\n".join(lines) + "\n"


def _explain(arguments: argparse.Namespace) -> int:
    cache, name = default_cache(), arguments.name
    target = CompileTarget(parse_arch(arguments.arch))
    found = explanations(name, _shipped_sources(), target, cache)
    if not found:
        raise ArgumentError("NAME|STEM", "a shipped kernel or an intact artifact of the cache", name)
    print("\n".join(found))
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    age = -math.inf if arguments.all else _parse_age(arguments.older_than)
    cache = default_cache()
    removed = cache.prune(age)
    for name in removed:
        print(name)
    print(f"{len(removed)} removed, {len(cache.names())} kept in {cache.root}")
    return 0


def _parse_age(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise ArgumentError("--older-than", "a whole number and s, m, h or d, such as 30d", text)
    return int(match[1]) * _SECONDS[match[2]]
