"""Compiled kernels on disk: content-addressed folders, published by rename, verified by digest, private to the user.

Layout: ``<root>/<stem>-<key>/`` holds ``kernel.cubin``, ``kernel.cu`` (the generated text) and ``artifact.json``
(symbol, arch, flags, compiler, resources, and a digest over everything). A folder under its final name is complete: it
was written under a temporary name and renamed. Locks (``<root>/.locks/``) are advisory file locks, which the system
frees when a process dies; such a process leaves at most a temporary folder, which ``prune`` removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fi_core.errors import FiError

CUBIN, TEXT, RECORD = "kernel.cubin", "kernel.cu", "artifact.json"
_TEMPORARY = ".tmp-"
_POLL_S = 0.01


class CacheError(FiError):
    """The cache folder cannot be used: not writable, not private, disk full, or a lock was not free in time."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel: registers a thread, static shared memory, stack and spill bytes."""

    num_registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Artifact:
    """A compiled kernel: machine code for ``arch`` with the entry ``symbol``, and how it came to be."""

    stem: str
    key: str
    symbol: str
    arch: str
    flags: tuple[str, ...]
    compiler: str
    text: str
    resources: Resources
    compile_s: float
    cubin: bytes

    @property
    def name(self) -> str:
        return f"{self.stem}-{self.key}"


class ArtifactCache:
    """The artifacts under ``root``. Reading needs no lock and works on a read-only folder; writing makes ``root``
    (mode 0700) and refuses a folder that other users may write to."""

    def __init__(self, root: Path, lock_timeout_s: float = 120.0) -> None:
        self.root = root
        self.lock_timeout_s = lock_timeout_s

    def find(self, name: str) -> Artifact | None:
        """The artifact of that name; None if it is absent, incomplete, or its bytes do not match its digest."""
        self._require_private()
        return read_artifact(self.root / name)

    def find_or_make(self, name: str, make: Callable[[], Artifact]) -> Artifact:
        """The artifact of that name, made and published under a lock if it is absent or damaged.

        Of many processes that ask at once one calls ``make``; the others wait for it and take its result. Whatever
        ``make`` raises is raised, and nothing is published. Raises CacheError when the folder cannot be written, the
        disk is full, or the lock is not free within ``lock_timeout_s``.
        """
        found = self.find(name)
        if found is not None:
            return found
        with self._lock(name):
            found = self.find(name)
            if found is None:
                found = make()
                self._publish(found)
        return found

    def names(self) -> list[str]:
        """Names of all published artifacts, sorted; damaged ones included."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def prune(self, older_than_s: float) -> list[str]:
        """Remove artifacts and temporary folders made at least that many seconds ago; return their names."""
        removed = []
        limit = time.time() - older_than_s
        for entry in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            is_artifact = not entry.name.startswith(".") or entry.name.startswith(_TEMPORARY)
            if entry.is_dir() and is_artifact and entry.stat().st_mtime <= limit:
                shutil.rmtree(entry)
                removed.append(entry.name)
        return removed

    def _require_private(self) -> None:
        try:
            status = self.root.stat()
        except FileNotFoundError:
            return
        foreign = status.st_uid not in (os.getuid(), 0)
        if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            owner = f"owner {status.st_uid}, mode {stat.filemode(status.st_mode)}"
            raise CacheError(f"cache folder {self.root} may be written by others ({owner}); code is loaded from it")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the system's refusals to write into CacheError."""
        try:
            yield
        except OSError as error:
            reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
            reasons |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "it is not writable")
            reason = reasons.get(error.errno or 0, error.strerror)
            raise CacheError(f"cache folder {self.root}: {reason}; FI_CACHE_DIR names another folder") from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._writing():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._require_private()
            locks = self.root / ".locks"
            locks.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + self.lock_timeout_s
            while not _try_lock(handle):
                if time.monotonic() > deadline:
                    raise CacheError(f"{locks / name}: another process held it for {self.lock_timeout_s:g} s")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(handle)

    def _publish(self, artifact: Artifact) -> None:
        final = self.root / artifact.name
        temporary = self.root / f"{_TEMPORARY}{artifact.name}-{uuid.uuid4().hex[:8]}"
        with self._writing():
            try:
                write_artifact(artifact, temporary)
                if final.exists():  # damaged, or find() would have returned it; the lock is held
                    shutil.rmtree(final)
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_artifact(artifact: Artifact, folder: Path) -> None:
    """Write an artifact's files into the new folder ``folder``, flushed to disk."""
    folder.mkdir(mode=0o700, parents=True)
    record = {name: value for name, value in asdict(artifact).items() if name not in ("cubin", "text")}
    record["sha256"] = _digest(record, artifact.cubin, artifact.text)
    contents = {CUBIN: artifact.cubin, TEXT: artifact.text.encode(), RECORD: json.dumps(record, indent=1).encode()}
    for name, data in contents.items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read_artifact(folder: Path) -> Artifact | None:
    """The artifact in ``folder``; None unless it is complete, well-formed, rightly named and its digest matches."""
    try:
        cubin = (folder / CUBIN).read_bytes()
        text = (folder / TEXT).read_text()
        record = json.loads((folder / RECORD).read_text())
        intact = record.pop("sha256") == _digest(record, cubin, text)
        record["resources"] = Resources(**record["resources"])
        record["flags"] = tuple(record["flags"])
        artifact = Artifact(cubin=cubin, text=text, **record)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return artifact if intact and artifact.name == folder.name else None


def _digest(record: Mapping[str, object], cubin: bytes, text: str) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for part in (cubin, text.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
