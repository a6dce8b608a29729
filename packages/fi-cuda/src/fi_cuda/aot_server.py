"""The steps of a ninja file in threads of the process that started ninja, which has torch and NVRTC loaded."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fi_core.errors import FiError

from .aot_edge import DONE, SERVER
from .aot_steps import run_step
from .command_line import error_text


class _Server(socketserver.ThreadingUnixStreamServer):
    """Answers each edge of ninja in a thread of its own; ninja bounds how many there are."""

    request_queue_size = 128

    def __init__(self, address: str, folder: Path) -> None:
        self.folder = folder
        super().__init__(address, _Step)


class _Step(socketserver.StreamRequestHandler):
    """One step: its words, NUL between them, end with the sender's half of the connection."""

    server: _Server

    def handle(self) -> None:
        words = self.rfile.read().decode().split("\0")
        try:
            run_step(words[0], [self.server.folder / name for name in words[1:]])
        except (FiError, OSError) as error:
            self.wfile.write(error_text(error).encode())
        else:
            self.wfile.write(DONE)


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """Answer the edges of ``folder``'s ninja file while the block runs; what a killed build left is replaced."""
    path = folder / SERVER
    path.unlink(missing_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # A socket's address holds about 100 bytes, however long the folder's path is.
        with _Server(f"/proc/self/fd/{handle}/{SERVER}", folder) as server:
            thread = threading.Thread(target=server.serve_forever, name="fi-aot-server")
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
