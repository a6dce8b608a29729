"""What an edge of the ninja file runs: ask the server of the build for a step, or do it here where there is none.

The file is run by its path, and imports only what starts in milliseconds: an edge that imported torch would take longer
to start than NVRTC takes to compile. ``fi_cuda.aot`` starts the server beside ninja (``aot_server``); a ninja run by
hand has none, and its edges do the same work on their own, only slower.
"""

import os
import socket
import sys

SERVER = "server"
"""The server's socket in the folder, which is an edge's working folder."""

DONE = b"done"
"""The whole answer to a step that succeeded; to one that failed it is the error's text."""


def ask(step: list[str]) -> bytes | None:
    """The server's answer to ``step``, empty if it died; None where no server listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(SERVER)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        connection.sendall("\0".join(step).encode())
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            return answer.read()


def main() -> int:
    """Run the step of the command line; returns the exit code."""
    answer = ask(sys.argv[1:])
    if answer is None:
        os.execv(sys.executable, [sys.executable, "-m", "fi_cuda.aot_steps", *sys.argv[1:]])
    if answer == DONE:
        return 0
    print((answer or b"fi_cuda: the server of the build died").decode(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
