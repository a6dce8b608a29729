"""The artifact cache under many processes, sudden death, damage, foreign folders, read-only folders and a full disk."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fi_cuda.cache import CUBIN, RECORD, Artifact, ArtifactCache, CacheError, Resources, read_artifact

pytestmark = pytest.mark.timeout(120)

RESOURCES = Resources(32, 0, 0, 0, 0)


def artifact(stem="scale", key="0" * 40, cubin=b"\x7fELF machine code"):
    return Artifact(stem, key, "scale", "sm_90a", ("--flag",), "(13, 0)", "// text\n", RESOURCES, 0.25, cubin)


def refuse():
    raise AssertionError("the cache made an artifact that it holds")


def test_published_artifact_comes_back_whole(tmp_path):
    cache = ArtifactCache(tmp_path / "cache")
    made = artifact()
    assert cache.find(made.name) is None
    assert cache.find_or_make(made.name, lambda: made) == made
    assert ArtifactCache(tmp_path / "cache").find_or_make(made.name, refuse) == made
    assert cache.names() == [made.name]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["cubin", "record", "symbol", "missing", "truncated", "not json"])
def test_damaged_artifact_is_rebuilt(tmp_path, damage):
    cache = ArtifactCache(tmp_path / "cache")
    made = artifact()
    cache.find_or_make(made.name, lambda: made)
    folder = tmp_path / "cache" / made.name
    record = json.loads((folder / RECORD).read_text())
    if damage == "cubin":
        (folder / CUBIN).write_bytes(b"\x7fELF other code...")
    elif damage == "record":
        (folder / RECORD).write_text(json.dumps({**record, "sha256": "0" * 64}))
    elif damage == "symbol":
        (folder / RECORD).write_text(json.dumps({**record, "symbol": "evil"}))
    elif damage == "missing":
        (folder / CUBIN).unlink()
    elif damage == "truncated":
        (folder / CUBIN).write_bytes(made.cubin[:-3])
    else:
        (folder / RECORD).write_text("{")
    assert cache.find(made.name) is None
    assert cache.find_or_make(made.name, lambda: made) == made
    assert cache.find(made.name) == made


def test_artifact_under_another_name_is_foreign(tmp_path):
    cache = ArtifactCache(tmp_path / "cache")
    made = artifact()
    cache.find_or_make(made.name, lambda: made)
    os.rename(tmp_path / "cache" / made.name, tmp_path / "cache" / artifact(key="1" * 40).name)
    assert cache.find(artifact(key="1" * 40).name) is None


def test_failed_make_publishes_nothing_and_frees_the_lock(tmp_path):
    cache = ArtifactCache(tmp_path / "cache", lock_timeout_s=1.0)
    made = artifact()

    def fail():
        raise RuntimeError("compiler")

    with pytest.raises(RuntimeError, match="compiler"):
        cache.find_or_make(made.name, fail)
    assert cache.names() == []
    assert cache.find_or_make(made.name, lambda: made) == made


def test_folder_that_others_may_write_is_refused(tmp_path):
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(CacheError, match="may be written by others"):
        ArtifactCache(root).find_or_make(artifact().name, artifact)


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "it is not writable"), (errno.EACCES, "it is not writable")],
)
def test_disk_errors_name_the_folder_and_leave_nothing(tmp_path, monkeypatch, number, text):
    cache = ArtifactCache(tmp_path / "cache")

    def refuse_flush(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse_flush)
    with pytest.raises(CacheError, match=f"{tmp_path}/cache: {text}.*FI_CACHE_DIR"):
        cache.find_or_make(artifact().name, artifact)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [".locks"]


def test_hit_needs_no_writing(tmp_path, monkeypatch):
    cache = ArtifactCache(tmp_path / "cache")
    made = artifact()
    cache.find_or_make(made.name, lambda: made)

    def forbidden(*arguments, **options):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "open", forbidden)
    assert cache.find_or_make(made.name, refuse) == made


def test_lock_that_is_not_freed_in_time_is_an_error(tmp_path):
    cache = ArtifactCache(tmp_path / "cache", lock_timeout_s=0.2)
    made = artifact()

    def ask_again():
        with ThreadPoolExecutor(1) as pool, pytest.raises(CacheError, match=r"another process held it for 0\.2 s"):
            pool.submit(cache.find_or_make, made.name, refuse).result()
        return made

    assert cache.find_or_make(made.name, ask_again) == made


def ask(root, pause_s):
    def make():
        with (root.parent / "made").open("a") as log:
            log.write("x")
        time.sleep(pause_s)
        return artifact()

    if ArtifactCache(root).find_or_make(artifact().name, make) != artifact():
        raise SystemExit("another artifact")


def start(root, pause_s=0.2):
    # Forked: fifty at once would otherwise spend their time importing torch one after another.
    process = multiprocessing.get_context("fork").Process(target=ask, args=(root, pause_s))
    process.start()
    return process


def test_fifty_processes_make_it_once(tmp_path):
    processes = [start(tmp_path / "cache") for _ in range(50)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 50
    assert (tmp_path / "made").read_text() == "x"


def test_killed_process_leaves_the_cache_usable(tmp_path):
    victim = start(tmp_path / "cache", pause_s=60)
    while not (tmp_path / "made").exists():
        assert victim.is_alive()
        time.sleep(0.01)
    waiting = start(tmp_path / "cache")
    victim.kill()
    victim.join()
    waiting.join()
    assert waiting.exitcode == 0
    assert (tmp_path / "made").read_text() == "xx"
    assert read_artifact(tmp_path / "cache" / artifact().name) == artifact()


def die_at(root, point, count):
    """Publish as ``ask`` does, but die like a killed process at call number ``count`` of ``point``, before or after it."""
    owner, name, when = POINTS[point]
    call, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) < count:
            return call(*arguments, **options)
        if when == "after":
            call(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    setattr(owner, name, counted)
    ask(root, 0)


POINTS = {
    "folder made": (Path, "mkdir", "after"),
    "lock taken": (fcntl, "flock", "after"),
    "file written": (os, "fsync", "before"),
    "before it has its name": (Path, "rename", "before"),
    "after it has its name": (Path, "rename", "after"),
    "damaged one removed": (shutil, "rmtree", "after"),
}


@pytest.mark.parametrize(
    ("point", "count", "damaged"),
    [
        *(("folder made", count, False) for count in (1, 2, 3)),  # the cache's, the locks', a temporary one
        ("lock taken", 1, False),
        *(("file written", count, False) for count in (1, 2, 3)),
        ("before it has its name", 1, False),
        ("after it has its name", 1, False),
        ("damaged one removed", 1, True),
        ("before it has its name", 1, True),
    ],
)
def test_process_killed_at_any_point_leaves_the_cache_usable(tmp_path, point, count, damaged):
    root, name = tmp_path / "cache", artifact().name
    if damaged:
        ArtifactCache(root).find_or_make(name, artifact)
        (root / name / "kernel.cubin").write_bytes(b"not what it was")
    victim = multiprocessing.get_context("fork").Process(target=die_at, args=(root, point, count))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    cache = ArtifactCache(root, lock_timeout_s=5)
    published = read_artifact(root / name)
    assert published == (artifact() if point == "after it has its name" else None)
    assert cache.find_or_make(name, refuse if published else artifact) == artifact()
    assert cache.names() == [name] and read_artifact(root / name) == artifact()
    cache.prune(older_than_s=-1)
    assert [entry.name for entry in root.iterdir()] == [".locks"]


def test_prune_removes_old_artifacts_and_what_a_killed_process_left(tmp_path):
    cache = ArtifactCache(tmp_path / "cache")
    for key in ("0" * 40, "1" * 40):
        made = artifact(key=key)
        cache.find_or_make(made.name, lambda made=made: made)
    (tmp_path / "cache" / ".tmp-scale-dead").mkdir()
    old = time.time() - 1000
    for name in (artifact().name, ".tmp-scale-dead"):
        os.utime(tmp_path / "cache" / name, (old, old))
    assert cache.prune(older_than_s=500) == [".tmp-scale-dead", artifact().name]
    assert cache.names() == [artifact(key="1" * 40).name]
