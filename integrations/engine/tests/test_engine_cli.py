"""The command line and the demo."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fi_engine import RequestError
from fi_engine.bench import DecodeSpeed, decode_speed
from fi_engine.cli import main
from fi_engine.demo import MAX_TOKENS, QUESTIONS, Screen, run_demo


def test_errors_are_one_line_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tmp_path / "absent.gguf"), "hello"]) == 1
    assert capsys.readouterr().err.splitlines() == [f"fi-engine: {tmp_path / 'absent.gguf'}: file: does not exist"]
    assert main(["bench", "--model", "m.gguf", "--num-tokens", "16"]) == 1
    assert capsys.readouterr().err.splitlines() == ["fi-engine: num_tokens: expected more than 16, got 16"]


def test_a_device_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("gpu", "cuda:99", "cpu:1", "cuda:-1", "mps", ""):
        assert main(["generate", "--model", str(tmp_path), "--device", device, "hello"]) == 1
        assert "fi-engine: device: expected one of cpu" in capsys.readouterr().err


def test_an_interrupt_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fi_engine.cli.Engine.from_path", interrupted)
    assert main(["chat", "--model", "m.gguf"]) == 130
    assert capsys.readouterr().err.splitlines() == ["fi-engine: interrupted"]


def test_a_chat_whose_answer_fails_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        error = RequestError(3, "the logits are NaN")

        def submit(self, *arguments: Any) -> Any:
            return self

        def stream(self, handles: Any) -> list[Any]:
            return []

    monkeypatch.setattr("fi_engine.cli.Engine.from_path", lambda *arguments, **options: Failing())
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    assert main(["chat", "--model", "m.gguf"]) == 1
    assert capsys.readouterr().err.splitlines() == ["fi-engine: request 3: the logits are NaN"]


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fi_engine", "generate", "--model", str(tmp_path / "absent.gguf"), "hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fi-engine: {tmp_path / 'absent.gguf'}: file: does not exist\n"


@pytest.mark.model
def test_generate_and_chat(
    model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--model", str(model_path), "--max-tokens", "8", "--device", "cpu"]
    assert main(["generate", *common, "The capital of France is", "1, 2, 3, 4,"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The capital of France is Paris." and lines[-1].startswith("1, 2, 3, 4, 5, 6")
    typed = iter(["What is the capital of France?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", *common]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.model
def test_demo_answers_and_ends_with_a_table(model_path: Path) -> None:
    out = io.StringIO()
    run_demo(model_path, "cpu", out)
    shown = out.getvalue()
    assert all(question in shown for question in QUESTIONS) and "Paris" in shown
    table = dict(line.split(None, 1) for line in shown[shown.index("requests ") :].splitlines() if line)
    reused = int(shown.split("prefix cache")[1].split()[0])
    assert reused >= 7 * 32
    for operation in ("attention", "append_kv", "rmsnorm", "add_rmsnorm", "silu_mul", "sample"):
        assert "." in table[operation].split()[0]
    assert f"{len(QUESTIONS)} at once" in table["requests"] and MAX_TOKENS > 0


def test_decode_speed_counts_decode_steps_alone(tiny_loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_loaded.engine(max_model_len=64)
    monkeypatch.setattr("fi_engine.bench.PROMPTS", ([1, 2, 3], [4], [5, 6]))
    monkeypatch.setattr("fi_engine.bench._seconds", lambda run: run() or 2.0)
    speed = decode_speed(engine, 3, 20)
    # The first of 20 tokens comes with the prefill, and so of the 8 warm-up steps 7 decode.
    assert (speed.steps_per_second, speed.tokens_per_second) == (12 / 2, 3 * 12 / 2)
    assert speed.kernel_seconds is None and speed.share_outside_kernels is None
    assert engine.num_unfinished == 0
    busy = DecodeSpeed(500.0, 4000.0, 0.0015)
    assert busy.share_outside_kernels == pytest.approx(0.25)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_a_request_rewritten_in_place(tiny_loaded: Any) -> None:
    engine = tiny_loaded.engine(max_model_len=64)
    handles = [engine.submit([1, 2]), engine.submit([3])]
    out = _Terminal()
    screen = Screen(out, ["One?", "Two?"], handles)
    handles[0].text = "a\nb"
    screen.update(0)
    handles[1].text = "word " * 200
    screen.update(0)
    first, second = out.getvalue().split("\x1b[2A")
    assert [line.removeprefix("\x1b[2K") for line in first.splitlines()] == [
        "\x1b[1mOne?\x1b[0m a b",
        "\x1b[1mTwo?\x1b[0m ",
    ]
    assert "…" in second and max(map(len, second.splitlines())) < 100
    screen.close()
    assert out.getvalue().endswith("\nTwo?\n    " + "word " * 199 + "word\n")
