"""Serves eight prompts at once and shows the answers as they come, then what ran and how fast."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from fi_sampling import SamplingParams

from .config import EngineConfig
from .engine import Engine
from .kernel_log import KernelLog
from .request import RequestHandle
from .tokenizer import Message

SYSTEM = (
    "You are a helpful assistant. Answer the user's question correctly, in one or two short and friendly sentences. "
    "Do not repeat the question, do not make lists, and do not use markdown."
)
QUESTIONS = (
    "What is the capital of France?",
    "What is the largest planet in our solar system?",
    "How many days are in a week?",
    "What do bees make?",
    "Who was the first person on the Moon?",
    "What is water made of?",
    "What language is spoken in Brazil?",
    "What should I wear when it rains?",
)
MAX_TOKENS = 48


def chat_of(question: str) -> list[Message]:
    """The conversation that asks ``question`` under the shared system prompt."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


class Screen:
    """Shows running answers: on a terminal one line each, rewritten in place; elsewhere each answer once it is whole."""

    def __init__(self, out: TextIO, questions: Sequence[str], handles: Sequence[RequestHandle]) -> None:
        self._out = out
        self._questions = questions
        self._handles = handles
        self._live = out.isatty()
        self._drawn = False
        self._shown: set[int] = set()
        self._next_progress = 0.0

    def update(self, num_tokens: int) -> None:
        """Show the present state; ``num_tokens`` were generated so far."""
        if self._live:
            self._redraw()
        else:
            self._print_finished(num_tokens)

    def _redraw(self) -> None:
        width = shutil.get_terminal_size().columns
        if self._drawn:
            self._out.write(f"\x1b[{len(self._handles)}A")
        for question, handle in zip(self._questions, self._handles, strict=True):
            answer = " ".join(handle.text.split())
            room = max(8, width - len(question) - 4)
            shown = answer if len(answer) <= room else "…" + answer[-(room - 1) :]
            self._out.write(f"\x1b[2K\x1b[1m{question}\x1b[0m {shown}\n")
        self._drawn = True
        self._out.flush()

    def _print_finished(self, num_tokens: int) -> None:
        for question, handle in zip(self._questions, self._handles, strict=True):
            if handle.finished and handle.request_id not in self._shown:
                self._shown.add(handle.request_id)
                self._out.write(f"[{handle.request_id}] {question}\n    {' '.join(handle.text.split())}\n")
        if time.monotonic() >= self._next_progress:
            running = sum(not handle.finished for handle in self._handles)
            self._out.write(f"... {running} answers under way, {num_tokens} tokens generated\n")
            self._next_progress = time.monotonic() + 2.0
        self._out.flush()

    def close(self) -> None:
        """On a terminal the lines were cut to its width: print the whole answers."""
        if self._live:
            for question, handle in zip(self._questions, self._handles, strict=True):
                self._out.write(f"\n{question}\n    {' '.join(handle.text.split())}\n")


def run_demo(model: Path, device: str | None, out: TextIO) -> None:
    """Load ``model``, serve the questions, print the table."""

    def progress(line: str) -> None:
        out.write(f"\r\x1b[2K{line}" if out.isatty() else "")
        out.flush()

    log = KernelLog()
    log.start()
    started = time.perf_counter()
    out.write(f"Loading {model.name}\n")
    engine = Engine.from_path(model, device=device, config=EngineConfig(max_batch=len(QUESTIONS)), progress=progress)
    out.write(
        f"{chr(13) if out.isatty() else ''}Loaded in {time.perf_counter() - started:.1f} s on {engine.device}\n\n"
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    started = time.perf_counter()
    handles = [engine.submit(chat_of(question), params) for question in QUESTIONS]
    screen = Screen(out, QUESTIONS, handles)
    for _ in engine.stream(handles):
        screen.update(sum(len(handle.token_ids) for handle in handles))
    screen.close()
    _print_table(engine, handles, log, time.perf_counter() - started, out)


def _print_table(engine: Engine, handles: Sequence[RequestHandle], log: KernelLog, seconds: float, out: TextIO) -> None:
    num_tokens = sum(len(handle.token_ids) for handle in handles)
    num_prompt = sum(len(handle.prompt_ids) for handle in handles)
    num_cached = sum(handle.num_cached_tokens for handle in handles)
    rows = [
        ("requests", f"{len(handles)} at once, {num_tokens} tokens generated in {engine.stats.num_steps} steps"),
        ("time", f"{seconds:.1f} s"),
        ("tokens per second", f"{num_tokens / seconds:.1f}"),
        ("prefix cache", f"{num_cached} of {num_prompt} prompt tokens reused"),
    ]
    out.write("\n")
    for name, value in rows:
        out.write(f"{name:18} {value}\n")
    out.write("\noperation          kernel                           why\n")
    chosen = {(item.request.op, item.entry.full_name, item.reason): None for item in log.selections()}
    for operation, kernel, reason in chosen:
        out.write(f"{operation:18} {kernel:32} {reason}\n")
    out.flush()
