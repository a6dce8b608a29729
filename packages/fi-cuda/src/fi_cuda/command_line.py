"""What the package's commands share: parsing arguments, errors as exit codes, and keeping a compiler's text short."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from fi_core.errors import ArgumentError, FiError


def parse_arch(text: str) -> str:
    """``text`` if it has the form of an architecture, such as sm_90a; raises ArgumentError otherwise."""
    if not re.fullmatch(r"sm_\d{2,3}[af]?", text):
        raise ArgumentError("--arch", "an architecture, such as sm_90a", text)
    return text


def parse_jobs(text: str) -> int:
    """A number of compilations at a time, at least 1; raises ArgumentError otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError("--jobs", "a whole number, at least 1", text)
    return int(text)


def shortened(text: str, max_lines: int = 20, max_columns: int = 300) -> str:
    """The head of a text that may be huge: so many lines, each cut, and how many more there are. NVRTC's NUL goes."""
    lines = text.replace("\0", "").splitlines()
    head = [line if len(line) <= max_columns else f"{line[:max_columns]} ..." for line in lines[:max_lines]]
    more = [f"... and {len(lines) - max_lines} more lines"] if len(lines) > max_lines else []
    return "\n".join(head + more)


def error_text(error: Exception) -> str:
    """What a command says of an error: its kind and the head of its text."""
    return f"fi_cuda: {type(error).__name__}: {shortened(str(error))}"


def complain(error: Exception) -> None:
    """Print an error on stderr."""
    print(error_text(error), file=sys.stderr)


def exit_code(run: Callable[[], int]) -> int:
    """What ``run`` returns; 2 for a wrong argument and 1 for any other error of ours or the system's, printed."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FiError, OSError) as error:
        complain(error)
        return 2 if isinstance(error, ArgumentError) else 1
