"""Why a build would compile a kernel, or not: the parts of its key, and what nearly matches it in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from .cache import Artifact, ArtifactCache
from .compile import INCLUDE_FOLDER, find_ahead_of_time
from .source import CompileTarget, KernelSource, SourceError
from .toolchain import find_toolchain


def explanations(name: str, shipped: Sequence[KernelSource], target: CompileTarget, cache: ArtifactCache) -> list[str]:
    """A text for each kernel that ``name`` means (a stem, or the beginning of a name that has the dash): the shipped
    ones for ``target``, and those of the cache that were made for other parameters. Raises ToolchainError."""
    compiler = str(find_toolchain().nvrtc_version)
    artifacts = [item for item in map(cache.find, cache.names()) if item is not None]
    wanted = [(source, target) for source in shipped]
    texts = {(source.text, target) for source in shipped}
    folders = tuple(
        dict.fromkeys((INCLUDE_FOLDER, *(folder for source in shipped for folder in source.include_folders)))
    )
    for artifact in artifacts:
        # The cache does not know where a plugin keeps its headers; those are reported as not found.
        source = KernelSource(artifact.stem, artifact.symbol, artifact.text, folders)
        if (artifact.text, target_of(artifact)) not in texts:
            texts.add((artifact.text, target_of(artifact)))
            wanted.append((source, target_of(artifact)))
    found = []
    for source, its_target in wanted:
        relatives = [item for item in artifacts if (item.text, target_of(item)) == (source.text, its_target)]
        try:
            names = [f"{source.stem}-{source.key(its_target, compiler)}", *(item.name for item in relatives)]
        except SourceError as error:
            found += [f"{item.name}: cannot be compared: {error}" for item in relatives if _is_meant(name, [item.name])]
            continue
        if _is_meant(name, [source.stem, *names]):
            lines = [names[0], *_parts(source, its_target, compiler), *_state(source, its_target, cache, relatives)]
            found.append("\n".join(lines))
    return found


def target_of(artifact: Artifact) -> CompileTarget:
    """The target that an artifact was compiled for."""
    given = dict(flag.split("=") for flag in artifact.flags)
    registers = int(given["max_registers"]) if "max_registers" in given else None
    return CompileTarget(artifact.arch, "fast_math" in given, "line_info" in given, registers)


def _is_meant(name: str, candidates: Sequence[str]) -> bool:
    return name in candidates or ("-" in name and any(item.startswith(name) for item in candidates))


def _parts(source: KernelSource, target: CompileTarget, compiler: str) -> Iterator[str]:
    yield f"  arch {target.arch}, flags {', '.join(target.flags) or 'none'}, compiler NVRTC {compiler}"
    yield f"  {_short_digest(source.text.encode())}  generated text, {source.text.count(chr(10))} lines"
    for name, path in sorted(source.headers().items()):
        yield f"  {_short_digest(path.read_bytes())}  {name}"


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _state(
    source: KernelSource, target: CompileTarget, cache: ArtifactCache, relatives: Sequence[Artifact]
) -> Iterator[str]:
    """What a build does; ``relatives`` are the artifacts of the same text and target."""
    made = find_ahead_of_time(source, target)
    compiler = str(find_toolchain().nvrtc_version)
    name = f"{source.stem}-{source.key(target, compiler)}"
    if made is not None:
        yield f"  made ahead of time: a build takes it from {made[1]}"
    elif any(item.name == name for item in relatives):
        yield "  in the cache: a build reads it"
    elif name in cache.names():
        yield "  damaged in the cache: a build compiles it again"
    elif not relatives:
        yield "  not in the cache, nor anything of the same text: a build compiles it"
    else:
        yield "  not in the cache: a build compiles it, because of what is there of the same text"
        for item in relatives:
            same_headers = item.key == source.key(target, item.compiler)
            yield f"    {item.name} is of {_difference(same_headers, item.compiler, compiler)}"


def _difference(same_headers: bool, compiler: str, current: str) -> str:
    if compiler == current:
        return "other headers"
    return f"compiler {compiler}" if same_headers else f"other headers and compiler {compiler}"
