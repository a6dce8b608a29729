"""The ahead-of-time harness, in processes that do not interpret: what it reports and when it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fi_triton.aot import AotResult, AotSpec, all_specs, compile_spec, report


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=110)


def test_command_compiles_for_every_architecture():
    done = run("-m", "fi_triton.aot", "--arch", "80", "90", "100", "--only", "silu_mul_bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[1] for row in rows] == ["80", "90", "100"]
    assert all(int(row[2]) > 0 and int(row[3]) == 0 for row in rows)


def test_command_fails_when_nothing_matches():
    done = run("-m", "fi_triton.aot", "--only", "no such kernel")
    assert done.returncode == 1 and "no spec" in done.stdout


def test_broken_budget_and_wrong_arguments_are_failures():
    code = """
from dataclasses import replace
from fi_triton.aot import all_specs, compile_spec
spec = next(item for item in all_specs() if item.name == "silu_mul_bf16")
print(compile_spec(replace(spec, max_stack_bytes=-1), 90).error)
print(compile_spec(replace(spec, constants={"BLOCK": 1024}), 90).error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    budget, arguments = done.stdout.splitlines()
    assert "exceeds the budget" in budget and "ACTIVATION" in arguments


def test_report_shows_failures():
    spec = AotSpec("name", "module:kernel", {})
    text = report([AotResult(spec, 90, 32, 0, 128), AotResult(spec, 80, error="reason")])
    assert "FAILED" in text.splitlines()[2] and text.endswith("name sm_80: reason")


def test_names_are_unique():
    names = [spec.name for spec in all_specs()]
    assert len(names) == len(set(names)) > 20


@pytest.mark.interpreter
def test_interpreting_process_refuses_to_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_spec(AotSpec("name", "module:kernel", {}), 90)
