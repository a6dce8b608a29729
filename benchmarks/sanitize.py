"""compute-sanitizer over the conformance cases of a backend: ``python benchmarks/sanitize.py --out FOLDER``.

Needs a GPU and the CUDA toolkit. Each tool runs the cases in several processes, whose logs (FOLDER/TOOL-SHARD.log) are
parsed; summary.json and a table tell what was found, in our kernels (their symbols start with ``fi_``) and elsewhere.
One more process of each tool runs a kernel with a planted fault of the tool's kind: a tool that misses it proves nothing.
Exit status 1: a finding in our kernels, a case that failed or did not run, or a fault missed.

memcheck and racecheck look at our kernels alone, which keeps them fast. initcheck sees every kernel, because memory that
others have written would count as uninitialised otherwise. torch's allocator does not reuse memory here, so each tensor
is an allocation of its own to the tools.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TOOLS = ("memcheck", "racecheck", "initcheck")
FILTERED_TOOLS = ("memcheck", "racecheck")
SYMBOLS = "fi_"
PLANTED = "planted"
PLANTED_SYMBOL = "fi_planted"
PLANTED_TEXT = """\
extern "C" __global__ void fi_planted(float* x) {
  __shared__ volatile float shared;
  shared = threadIdx.x;                            // every thread writes one word
  if (threadIdx.x == 0) x[65536] = shared + x[1];  // x has 64 elements, and x[1] was never written
}
"""

_PREFIX = "========="
_SYMBOL = re.compile(r"\bat (?:0x[0-9a-f]+ in )?(?:void )?((?:fi_|fi::)\w+)")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_NOTICE = re.compile(r"COMPUTE-SANITIZER|SUMMARY:|Target application|Process ID|Max number of")
_START, _END, _OUTCOME = "case:", "cases finished", re.compile(r"^case (passed|failed): (.*)$", re.MULTILINE)
_COUNT = re.compile(r"^cases: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One report of a tool. ``symbol``: our kernel, None if it is elsewhere; ``near``: the case that ran, as far as the
    order of two writers to one log tells."""

    headline: str
    symbol: str | None
    near: str


@dataclass(frozen=True)
class ShardLog:
    """What the log of one process says. ``num_errors`` is the tool's own count, None if it came to no summary."""

    num_cases: int
    outcomes: tuple[tuple[str, str], ...]
    finished: bool
    findings: tuple[Finding, ...]
    num_errors: int | None

    @property
    def ours(self) -> list[Finding]:
        return [item for item in self.findings if item.symbol is not None]


def findings_of(log: str) -> Iterator[Finding]:
    """The reports in a log: each begins with a headline after the tool's prefix; its indented lines say where."""
    case, near, headline, symbol = "the first case", "", "", None
    for line in [*log.splitlines(), f"{_PREFIX} SUMMARY: end"]:
        if line.startswith(_START):
            case = line.removeprefix(_START).strip()
        if not line.startswith(_PREFIX):
            continue
        text = line.removeprefix(_PREFIX)
        if re.match(r" \S", text):
            if headline:
                yield Finding(headline, symbol, near)
            headline, near, symbol = ("" if _NOTICE.search(text) else text.strip()), case, None
        match = _SYMBOL.search(text)
        if match is not None and symbol is None:
            symbol = match[1]


def read_log(log: str) -> ShardLog:
    """Parse what one process and its tool wrote."""
    count = _COUNT.search(log)
    errors = _SUMMARY.findall(log)
    return ShardLog(
        num_cases=int(count[1]) if count else 0,
        outcomes=tuple((outcome, name) for outcome, name in _OUTCOME.findall(log)),
        finished=_END in log.splitlines(),
        findings=tuple(findings_of(log)),
        num_errors=sum(map(int, errors)) if errors else None,
    )


@dataclass(frozen=True)
class Verdict:
    """A row of the table; ``troubles`` are what keeps it from being clean, most important first."""

    tool: str
    num_run: int
    num_cases: int
    num_ours: int
    num_elsewhere: int
    seconds: float
    troubles: tuple[str, ...]


def judge(tool: str, shards: Sequence[ShardLog], planted: ShardLog, seconds: float) -> Verdict:
    """Put the processes of one tool together."""
    ours = [item for shard in shards for item in shard.ours]
    outcomes = [item for shard in shards for item in shard.outcomes]
    num_cases = sum(shard.num_cases for shard in shards)
    troubles = [f"{item.headline} in {item.symbol}, near {item.near}" for item in ours]
    troubles += [f"failed: {name}" for outcome, name in outcomes if outcome == "failed"]
    if not all(shard.finished and shard.num_errors is not None for shard in shards):
        num_ended = sum(shard.finished and shard.num_errors is not None for shard in shards)
        troubles.append(f"{num_ended} of {len(shards)} processes came to their end")
    if num_cases == 0:
        troubles.append("no case was found")
    if not any(item.symbol == PLANTED_SYMBOL for item in planted.findings):
        troubles.append("the planted fault was missed")
    total = sum(max(shard.num_errors or 0, len(shard.findings)) for shard in shards)
    return Verdict(tool, len(outcomes), num_cases, len(ours), total - len(ours), seconds, tuple(troubles))


def find_sanitizer() -> str:
    """Path of compute-sanitizer; FileNotFoundError where there is none."""
    folders = (os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(
            "compute-sanitizer is neither on the PATH nor below /usr/local/cuda: install CUDA's tools"
        )
    return found


def filter_option(help_text: str) -> str:
    """The option that takes ``kernel_substring=TEXT``: its name changed between releases."""
    return "--kernel-name" if "--kernel-name " in help_text else "--kernel-regex"


def tool_options(tool: str, filter_name: str) -> list[str]:
    """Options of compute-sanitizer for one tool. API errors are left out: cuda.core asks the driver for what may be
    absent."""
    options = ["--tool", tool, "--show-backtrace", "no", "--print-limit", "1000"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    if tool in FILTERED_TOOLS:
        options += [filter_name, f"kernel_substring={SYMBOLS}"]
    return options


def run_tool(options: argparse.Namespace, sanitizer: list[str], tool: str) -> Verdict:
    """Run all shards of one tool side by side, within the time limit."""
    started = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    names = [PLANTED, *(f"{index}/{options.jobs}" for index in range(options.jobs))]
    paths = [options.out / f"{tool}-{name.partition('/')[0]}.log" for name in names]
    case = [] if options.case is None else ["--case", options.case]
    same = ["--backend", options.backend, "--out", str(options.out), *case]
    processes = []
    for name, path in zip(names, paths, strict=True):
        command = [*sanitizer, sys.executable, __file__, "--shard", name, *same]
        with path.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        processes.append(process)
    for process in processes:
        try:
            process.wait(max(0.0, started + options.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    planted, *shards = [read_log(path.read_text(errors="replace")) for path in paths]
    return judge(tool, shards, planted, time.monotonic() - started)


def run_shard(options: argparse.Namespace) -> int:
    """What a process under the tool does: every so many'th case, or the planted fault."""
    if options.shard == PLANTED:
        launch_planted()
        return 0
    from fi_core.conformance import BoundCase, bound_cases

    index, count = map(int, options.shard.split("/"))
    parts = [None] if options.case is None else options.case.split(",")
    bound = [item for part in parts for item in bound_cases(options.backend, device="cuda", cases=part)]
    cases = [item for item in bound if isinstance(item, BoundCase)][index::count]
    print(f"cases: {len(cases)}")
    for case in cases:
        print(_START, case.name)
        result = case.result()
        print(f"case {result.outcome}: {case.name} {' '.join(result.message.split())[:300]}".rstrip())
    print(_END)
    return 0


def launch_planted() -> None:
    """Compile and launch the kernel with the planted faults through the same pipeline as any other."""
    from fi_cuda.compile import compile_source
    from fi_cuda.launch import LaunchableKernel, LaunchShape
    from fi_cuda.params import ParamsLayout
    from fi_cuda.source import CompileTarget, KernelSource
    from fi_cuda.spec import arch_of

    device = torch.device("cuda", torch.cuda.current_device())
    source = KernelSource(PLANTED, PLANTED_SYMBOL, PLANTED_TEXT, ())
    artifact = compile_source(source, CompileTarget(arch_of(device)))
    kernel = LaunchableKernel(artifact, ParamsLayout((("x", "output"),)), LaunchShape(num_threads=64))
    x = torch.empty(64, device=device)
    kernel.launch(device, 1, 1, x.data_ptr())
    torch.cuda.synchronize()
    print(_END)


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts for a reader."""
    lines = [f"{'tool':<11}{'cases run':>12}{'in our kernels':>16}{'elsewhere':>11}{'seconds':>9}  status"]
    for row in verdicts:
        counts = f"{row.num_run} of {row.num_cases}"
        status = "clean" if not row.troubles else f"{len(row.troubles)} troubles"
        lines.append(
            f"{row.tool:<11}{counts:>12}{row.num_ours:>16}{row.num_elsewhere:>11}{row.seconds:>9.0f}  {status}"
        )
        lines += [f"  {trouble}" for trouble in row.troubles[:8]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and of summary.json")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--case", help="only cases whose operation/name contains this, or one of several with commas")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=min(10, os.cpu_count() or 1), help="processes of a tool")
    parser.add_argument("--seconds", type=float, default=150.0, help="time limit of a tool")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard is not None:
        return run_shard(options)
    tools = options.tools.split(",")
    if not set(tools) <= set(TOOLS):
        parser.error(f"--tools: expected some of {', '.join(TOOLS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    program = find_sanitizer()
    help_text = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    verdicts = [run_tool(options, [program, *tool_options(tool, filter_option(help_text))], tool) for tool in tools]
    (options.out / "summary.json").write_text(json.dumps([vars(row) for row in verdicts], indent=1) + "\n")
    print(table(verdicts))
    return int(any(row.troubles for row in verdicts))


if __name__ == "__main__":
    sys.exit(main())
