"""Processes on one GPU that measure in turns: their engines start side by side, which takes most of the time, and then one at a
time has the GPU.

A folder holds the state: ``ready.NAME`` for each process that has started (or that ended before), and the file that is locked
during a turn.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE = 0.3
"""Seconds before a process asks again, long enough for a waiting one to be next."""


class Turns:
    """The turns of ``num`` processes over ``folder``; without a folder every turn begins at once."""

    def __init__(self, folder: str | None, num: int, patience: float = 150.0) -> None:
        self.folder, self.num, self.patience = None if folder is None else Path(folder), num, patience

    def wait(self, name: str) -> None:
        """Tell the others that ``name`` is ready, and wait for them, ``patience`` seconds at most."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"ready.{name}").touch()
        until = time.monotonic() + self.patience
        while len(list(self.folder.glob("ready.*"))) < self.num and time.monotonic() < until:
            time.sleep(0.1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone on the GPU."""
        if self.folder is None:
            yield
            return
        with open(self.folder / "turn", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        time.sleep(PAUSE)
