"""A kernel's source: generated glue plus the closure of this project's headers it includes, and the content key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fi_core.errors import FiError

MAX_GENERATED_LINES = 40
"""Generated text is glue; what is interesting stays in headers."""

_QUOTED_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_SYMBOL = re.compile(r'extern\s+"C"\s+__global__')


class SourceError(FiError):
    """A source breaks a rule of the pipeline: unknown header, relative include, too long, not one symbol."""


@dataclass(frozen=True)
class CompileTarget:
    """What a source is compiled for, besides its text. ``fast_math`` admits approximate division and square root and
    flushes subnormals; ``line_info`` keeps source lines for profilers; ``max_registers`` a thread (None: ptxas decides).
    """

    arch: str = "sm_90a"
    fast_math: bool = False
    line_info: bool = False
    max_registers: int | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """The choices that differ from the defaults, as text."""
        given = (("fast_math", self.fast_math), ("line_info", self.line_info), ("max_registers", self.max_registers))
        return tuple(f"{name}={value}" for name, value in given if value)


@dataclass(frozen=True)
class KernelSource:
    """One translation unit with one kernel.

    ``stem`` is the word that names the kernel in every layer (header, spec, cache, test, benchmark row); ``symbol`` the
    ``extern "C"`` name in ``text``; ``include_folders`` hold the headers that quoted includes name.
    """

    stem: str
    symbol: str
    text: str
    include_folders: tuple[Path, ...]

    def __post_init__(self) -> None:
        num_lines = self.text.count("\n")
        if num_lines > MAX_GENERATED_LINES:
            raise SourceError(f"{self.stem}: {num_lines} generated lines, at most {MAX_GENERATED_LINES} are allowed")
        if len(_SYMBOL.findall(self.text)) != 1 or not re.search(rf"\b{re.escape(self.symbol)}\s*\(", self.text):
            raise SourceError(f'{self.stem}: the text must define exactly one extern "C" __global__, {self.symbol}')

    def headers(self) -> dict[str, Path]:
        """The project's headers in the transitive closure of the includes, by the name they are included under."""
        found: dict[str, Path] = {}
        waiting = list(_included(self.text, self.stem))
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = self._resolve(name)
                waiting += _included(found[name].read_text(), name)
        return found

    def _resolve(self, name: str) -> Path:
        for folder in self.include_folders:
            if (folder / name).is_file():
                return folder / name
        looked = ", ".join(map(str, self.include_folders))
        raise SourceError(f'{self.stem}: header "{name}" is in none of the include folders ({looked})')

    def key(self, target: CompileTarget, compiler: str) -> str:
        """Content key, 40 hex digits: text, headers, compiler, flags and arch, and nothing else."""
        digest = hashlib.sha256()
        for part in (self.text, compiler, target.arch, *target.flags):
            digest.update(f"{len(part)}:".encode() + part.encode())
        for name, path in sorted(self.headers().items()):
            digest.update(f"{name}={_file_digest(path, path.stat().st_mtime_ns, path.stat().st_size)};".encode())
        return digest.hexdigest()[:40]


def _included(text: str, where: str) -> Iterator[str]:
    for name in _QUOTED_INCLUDE.findall(text):
        if name.startswith((".", "/")) or ".." in Path(name).parts:
            raise SourceError(f'{where}: include "{name}" is not relative to an include folder')
        yield name


@lru_cache(maxsize=512)
def _file_digest(path: Path, modified_ns: int, num_bytes: int) -> str:
    """SHA-256 of a header; time and size are part of the cache key, so an edited file is read again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
