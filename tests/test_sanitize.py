"""benchmarks/sanitize.py without a GPU: its commands, what it reads in the tools' logs, and what fails a run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/sanitize.py"


def load():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sanitize = load()

MEMCHECK = """\
========= COMPUTE-SANITIZER
cases: 3
case: rmsnorm/a[cuda.rmsnorm]
case passed: rmsnorm/a[cuda.rmsnorm]
case: rope/b[cuda.rope]
========= Invalid __global__ write of size 4 bytes
=========     at fi_rope+0x1b0
=========     by thread (63,0,0) in block (0,0,0)
=========     Access at 0x7f2b0a001000 is out of bounds
=========     and is 3,841 bytes after the nearest allocation at 0x7f2b0a000000 of size 256 bytes
=========
========= Invalid __global__ read of size 2 bytes
=========     at void fi::load_pack<(int)16>(const T2 *)+0x50 in pack.cuh:20
=========     by thread (0,0,0) in block (0,0,0)
=========         Device Frame: fi_rope+0x90 in rope.cu:31
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int, T2)+0x210
=========     by thread (0,0,0) in block (0,0,0)
=========
case failed: rope/b[cuda.rope] out: 3 of 8 elements differ
case: rope/c[cuda.rope]
case passed: rope/c[cuda.rope]
cases finished
========= ERROR SUMMARY: 3 errors
"""

RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fi_planted+0x90
=========     and Read access at fi_planted+0xd0 [63 hazards]
=========     and Write access at fi_planted+0x90 [63 hazards]
=========
cases finished
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

INITCHECK = """\
========= COMPUTE-SANITIZER
cases: 1
case: sample/a[cuda.sample]
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x170 in void at::native::(anonymous namespace)::CatArrayBatchedCopy<(int)4>(T1 *)
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fd3a5200000
=========
========= Host API uninitialized memory access at 0x7fd3a5200200 on access by cudaMemcpyAsync source
=========
case passed: sample/a[cuda.sample]
cases finished
========= ERROR SUMMARY: 2 errors
"""

CLEAN = """\
========= COMPUTE-SANITIZER
cases: 2
case: rmsnorm/a[cuda.rmsnorm]
case passed: rmsnorm/a[cuda.rmsnorm]
case: rmsnorm/b[cuda.rmsnorm]
case passed: rmsnorm/b[cuda.rmsnorm]
cases finished
========= ERROR SUMMARY: 0 errors
"""


def test_findings_are_told_apart_by_symbol_and_attributed_to_the_case():
    log = sanitize.read_log(MEMCHECK)
    assert [(item.headline[:24], item.symbol) for item in log.findings] == [
        ("Invalid __global__ write", "fi_rope"),
        ("Invalid __global__ read ", "fi::load_pack"),
        ("Invalid __global__ read ", None),
    ]
    assert {item.near for item in log.findings} == {"rope/b[cuda.rope]"}
    assert len(log.ours) == 2
    assert (log.num_cases, log.num_errors, log.finished) == (3, 3, True)
    assert [outcome for outcome, _ in log.outcomes] == ["passed", "failed", "passed"]


def test_a_hazard_names_its_kernel_in_the_headline():
    (found,) = sanitize.read_log(RACECHECK).findings
    assert found.symbol == "fi_planted"
    assert found.headline == "Error: Race reported between Write access at fi_planted+0x90"


def test_what_others_did_is_counted_elsewhere():
    verdict = sanitize.judge("initcheck", [sanitize.read_log(INITCHECK)], sanitize.read_log(RACECHECK), 1.0)
    assert (verdict.num_ours, verdict.num_elsewhere, verdict.troubles) == (0, 2, ())


@pytest.mark.parametrize(
    ("log", "trouble"),
    [
        (MEMCHECK, "Invalid __global__ write of size 4 bytes in fi_rope, near rope/b[cuda.rope]"),
        (MEMCHECK, "failed: rope/b[cuda.rope] out: 3 of 8 elements differ"),
        (CLEAN.replace("cases finished\n", ""), "1 of 2 processes came to their end"),
        (CLEAN.replace("========= ERROR SUMMARY: 0 errors\n", ""), "1 of 2 processes came to their end"),
    ],
)
def test_each_trouble_is_named(log, trouble):
    shards = [sanitize.read_log(CLEAN), sanitize.read_log(log)]
    assert trouble in sanitize.judge("memcheck", shards, sanitize.read_log(RACECHECK), 1.0).troubles


def test_a_tool_that_misses_the_planted_fault_is_not_clean():
    clean = sanitize.read_log(CLEAN)
    assert sanitize.judge("memcheck", [clean], clean, 1.0).troubles == ("the planted fault was missed",)
    assert sanitize.judge("memcheck", [], sanitize.read_log(RACECHECK), 1.0).troubles == ("no case was found",)


def test_only_where_it_is_sound_are_other_kernels_left_out():
    kept = ["--kernel-name", "kernel_substring=fi_"]
    assert sanitize.tool_options("racecheck", "--kernel-name")[-2:] == kept
    assert sanitize.tool_options("memcheck", "--kernel-name")[-4:] == ["--report-api-errors", "no", *kept]
    assert not any("kernel" in option for option in sanitize.tool_options("initcheck", "--kernel-name"))
    assert sanitize.filter_option("  --kernel-name arg   Filter kernels") == "--kernel-name"
    assert sanitize.filter_option("  --kernel-regex arg   Filter kernels") == "--kernel-regex"


def test_the_planted_kernel_compiles_and_has_its_faults():
    from fi_cuda.compile import compile_source
    from fi_cuda.source import CompileTarget, KernelSource

    source = KernelSource(sanitize.PLANTED, sanitize.PLANTED_SYMBOL, sanitize.PLANTED_TEXT, ())
    artifact = compile_source(source, CompileTarget("sm_90a"))
    assert artifact.resources.shared_bytes >= 4  # the raced word was not optimised away


TOOL = """\
#!{python}
import sys, time
if sys.argv[1:] == ["--help"]:
    print("  --kernel-name arg")
elif "planted" in sys.argv:
    print({planted!r})
else:
    print({log!r}, flush=True)
    time.sleep({seconds})
"""


def run(tmp_path, log, planted, *arguments, seconds=0):
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(python=sys.executable, planted=planted, log=log, seconds=seconds))
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--jobs", "2", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    return done, json.loads((tmp_path / "out/summary.json").read_text())


def test_a_clean_run(tmp_path):
    done, summary = run(tmp_path, CLEAN, RACECHECK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["tool"] for row in summary] == ["memcheck", "racecheck", "initcheck"]
    assert all((row["num_run"], row["num_cases"], row["troubles"]) == (4, 4, []) for row in summary)
    assert done.stdout.count("clean") == 3


def test_a_process_that_outlasts_the_limit_is_ended_and_fails_the_run(tmp_path):
    unfinished = CLEAN.partition("case: rmsnorm/b")[0]
    done, summary = run(tmp_path, unfinished, RACECHECK, "--tools", "memcheck", "--seconds", "2", seconds=60)
    assert done.returncode == 1
    (row,) = summary
    assert (row["num_run"], row["num_cases"]) == (2, 4)
    assert row["troubles"] == ["0 of 2 processes came to their end"]
    assert row["seconds"] < 20
