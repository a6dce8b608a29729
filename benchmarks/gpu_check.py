"""One command for a GPU machine: versions, tests, conformance of the backends and the examples, the compile pipeline,
compute-sanitizer, the partition's cost, the operations' and the engine's speed.

``python benchmarks/gpu_check.py --out FOLDER [--model PATH] [--sections versions,conformance,...]`` from a source tree on
PYTHONPATH (packages/*/src, integrations/*/src, packages/dist-info). Everything is written to FOLDER (JSON and logs);
a short table ends the output, with what cannot run here as "not run". Exit status 1 if a section failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parent
DISTRIBUTIONS = ("torch", "triton", "numpy", "cuda-core", "nvidia-cuda-nvrtc", "fi-core", "fi-triton", "fi-cuda")
ROOT = BENCHMARKS.parent
MODEL_MODULES = ("gguf", "jinja2", "safetensors", "tokenizers")
"""What the engine needs to read a model."""

NUM_TOKENS = 256
MAX_POSITION = 8192
WARM_UP_STEPS = 8

FAMILIES = (
    (re.compile(r"^fi_(\w+)"), r"CUDA \1"),
    (re.compile(r"^(\w+)_kernel$"), r"Triton \1"),
    (re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk", re.IGNORECASE), "matmul"),
    (re.compile(r"^Mem(?:cpy|set)"), "copies"),
    (re.compile(r"at::"), "torch"),
)
"""Name of a kernel -> its family; the first that matches."""


@dataclass
class Check:
    """The options, and what the sections found: ``table`` is printed last, ``data`` goes to check.json."""

    out: Path
    device: str
    backends: Sequence[str]
    jobs: int
    model: Path | None
    data: dict[str, Any] = field(default_factory=dict)
    table: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False

    def row(self, name: str, value: str, ok: bool = True) -> None:
        self.table.append((name, value, "ok" if ok else "FAILED"))
        self.failed |= not ok

    def not_run(self, name: str, reason: str) -> None:
        self.table.append((name, reason, "not run"))


def versions(check: Check) -> None:
    """Device, driver, versions, and what ``fi doctor`` says."""
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    is_cuda = check.device.startswith("cuda")
    found["device"] = torch.cuda.get_device_name(check.device) if is_cuda else check.device
    check.data["versions"] = found
    doctor = command(check, "doctor", "-m", "fi_core", "doctor")
    check.row("device", found["device"])
    check.row("versions", ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "triton")))
    check.row("fi doctor", f"exit status {doctor}", doctor == 0)


def conformance(check: Check) -> None:
    """``fi conformance`` of each backend on the device."""
    for backend in check.backends:
        conformance_of(check, backend, {})


def conformance_of(check: Check, backend: str, variables: Mapping[str, str]) -> None:
    """One backend's conformance; its report is FOLDER/conformance-NAME.json."""
    report = check.out / f"conformance-{backend}.json"
    started = time.perf_counter()
    arguments = ("--backend", backend, "--device", check.device, "--json", str(report), "--jobs", str(check.jobs))
    status = command(check, f"conformance-{backend}", "-m", "fi_core", "conformance", *arguments, **variables)
    seconds = time.perf_counter() - started
    counts = json.loads(report.read_text())["counts"] if report.exists() else {"report": "none"}
    text = ", ".join(f"{value} {name}" for name, value in counts.items())
    check.row(f"conformance {backend}", f"{text} ({seconds:.0f} s)", status == 0)


def operations(check: Check) -> None:
    """``fi bench``: each operation's time and share of its ceiling."""
    report = check.out / "operations.json"
    status = command(check, "operations", "-m", "fi_core", "bench", "--device", check.device, "--json", str(report))
    check.row("fi bench", f"rows in {report.name}", status == 0)


def partition(check: Check) -> None:
    """The host's partition (bench_partition.py), with its native module built first."""
    built = command(check, "build-native", "-m", "fi_scheduler.build_native")
    check.row("native partition", "built" if built == 0 else "not built, see build-native.log", built == 0)
    status = command(check, "partition", str(BENCHMARKS / "bench_partition.py"), "--out", str(check.out))
    rows = {row["case"]: row for row in json.loads((check.out / "partition.json").read_text())}
    cases = ("decode-random-b256", "decode-random-b4096")
    used = {rows[case]["impl"] for case in cases}
    shown = ", ".join(f"{case} {rows[case]['us']:.1f} µs" for case in cases)
    check.row("partition", f"{shown} ({', '.join(used)})", status == 0 and used == {"native"})


def pipeline(check: Check) -> None:
    """First calls, the cache, the cost of a launch (bench_pipeline.py)."""
    status = command(check, "pipeline", str(BENCHMARKS / "bench_pipeline.py"), "--out", str(check.out))
    found = json.loads((check.out / "pipeline.json").read_text())
    worst: dict[str, float] = {}
    for row in found["rows"]:
        worst[row["measure"]] = max(row["us"], worst.get(row["measure"], 0.0))
    for spec in found["specs"]:
        for measure in spec.keys() - {"op", "case"}:
            worst[measure] = max(spec[measure], worst.get(measure, 0.0))
    for measure, microseconds in worst.items():
        check.row(f"worst {measure}", f"{microseconds:.1f} µs")
    check.row("second process", found["proof"], status == 0)


def sanitizer(check: Check) -> None:
    """compute-sanitizer over the CUDA backend's cases (sanitize.py)."""
    folder = check.out / "sanitizer"
    arguments = ("--out", str(folder), "--jobs", str(check.jobs))
    status = command(check, "sanitizer", str(BENCHMARKS / "sanitize.py"), *arguments)
    for row in json.loads((folder / "summary.json").read_text()):
        counts = f"{row['num_ours']} in our kernels, {row['num_elsewhere']} elsewhere"
        text = f"{row['num_run']} of {row['num_cases']} cases, {counts} ({row['seconds']:.0f} s)"
        check.row(row["tool"], "; ".join([text, *row["troubles"][:2]]), not row["troubles"])
    check.row("sanitize.py", f"exit status {status}", status == 0)


def replays(check: Check) -> None:
    """10,000 replays of a captured step with random batches against eager steps (replays.py)."""
    status = command(check, "replays", str(BENCHMARKS / "replays.py"), "--out", str(check.out))
    for row in json.loads((check.out / "replays.json").read_text()):
        right = row["differing"] == 0 and not row["waits"]
        text = f"{row['replays']}, {row['differing']} differ; waits: {len(row['waits'])} ({row['seconds']:.0f} s)"
        check.row(f"replays: {row['variant']}", text, right)
    check.row("replays.py", f"exit status {status}", status == 0)


def examples(check: Check) -> None:
    """Conformance of the example plugins, found through the entry points that installing them would write."""
    for project_file in sorted(ROOT.glob("examples/*/pyproject.toml")):
        project = tomllib.loads(project_file.read_text())["project"]
        with tempfile.TemporaryDirectory(prefix="fi-example-") as folder:
            write_dist_info(Path(folder), project)
            paths = [folder, str(project_file.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
            for backend in project["entry-points"]["fi"]:
                conformance_of(check, backend, {"PYTHONPATH": os.pathsep.join(paths)})


def write_dist_info(folder: Path, project: Mapping[str, Any]) -> None:
    """What makes the entry points of ``project`` (a pyproject.toml's table) known to a Python that has ``folder`` on its
    path."""
    name, version = project["name"], project["version"]
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {module}" for point, module in project["entry-points"]["fi"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[fi]", *lines, ""]))


def gpu_tests(check: Check) -> None:
    """The tests marked gpu, on as many processes as ``jobs`` where pytest-xdist is there. A file that cannot be imported
    here fails alone."""
    folders = [
        *ROOT.glob("packages/*/tests"),
        *ROOT.glob("integrations/*/tests"),
        ROOT / "benchmarks/tests",
        ROOT / "tests",
    ]
    files = [path for folder in folders for path in folder.glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    without_model = why_no_model(check)
    if without_model is not None:
        check.not_run("tests of the language model", without_model)
    marks = "gpu" if without_model is None else "gpu and not model"
    model = {"FI_TEST_MODEL": str(check.model.resolve())} if check.model is not None else {}
    options = ["-m", marks, "-q", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(check.jobs)]
    status = command(check, "tests", "-m", "pytest", *options, *map(str, sorted(files)), **model)
    lines = (check.out / "tests.log").read_text().strip().splitlines()
    check.row("gpu tests", lines[-1].strip("= ") if lines else "no output", status == 0)


def why_no_model(check: Check) -> str | None:
    """What keeps the language model from being served here; None: nothing."""
    if check.model is None:
        return "needs --model"
    absent = [name for name in MODEL_MODULES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def engine(check: Check) -> None:
    """Greedy decode at 1 and 8 requests: steps and tokens per second, the share of a step outside kernels, and how the
    kernels' time is shared among their families."""
    without_model = why_no_model(check)
    if without_model is not None:
        check.not_run("engine", without_model)
        return
    from fi_engine import Engine
    from fi_engine.bench import decode_speed

    served = Engine.from_path(check.model, device=check.device)
    for num_requests in (1, 8):
        speed = decode_speed(served, num_requests, NUM_TOKENS)
        found = {"decode_steps_per_s": speed.steps_per_second, "tokens_per_s": speed.tokens_per_second}
        text = f"{speed.steps_per_second:.0f} steps/s, {speed.tokens_per_second:.0f} tokens/s"
        if speed.share_outside_kernels is not None:
            found["share_outside_kernels"] = speed.share_outside_kernels
            text += f", {speed.share_outside_kernels:.0%} of a step outside kernels"
        check.data[f"engine-{num_requests}"] = found
        check.row(f"engine, {num_requests} at once", text)
        if served.device.type == "cuda":
            shares = found["kernel_shares"] = kernel_shares(served, num_requests)
            shown = ", ".join(f"{family} {share:.0%}" for family, share in shares.items() if share >= 0.02)
            check.row("  of its kernels' time", shown)


def decode(check: Check) -> None:
    """Decode of 64 requests of mixed lengths by a random-weight Llama-3.1-8B shape: the preferred kernels against Triton's."""
    from fi_engine.decode_bench import Workload, run_decode_bench
    from fi_engine.random_model import SHAPES, random_model

    config, device = SHAPES["llama-3.1-8b"], torch.device(check.device)
    model = random_model(config, device, torch.bfloat16, MAX_POSITION, lambda line: None)
    with (check.out / "decode.log").open("w") as log:
        found = run_decode_bench(model, Workload(64, 128, 2048), 64, ("default", "triton"), log, lambda line: None)
    for name, speed in found.items():
        check.data[f"decode-{name}"] = {
            "step_seconds": speed.step_seconds,
            "kernel_seconds": speed.kernel_seconds,
            "attention_seconds": speed.attention_seconds,
        }
    for line in (check.out / "decode.log").read_text().splitlines():
        name, _, text = line.partition(": ")
        check.row(f"decode, 64 at once, {name}", text)


def prompt(check: Check) -> None:
    """Time to the first token of a prompt of 8k on the same model, whole and in chunks: preferred kernels against Triton's."""
    from fi_engine.prompt_bench import Prompt, run_prompt_bench
    from fi_engine.random_model import SHAPES, random_model

    config, device = SHAPES["llama-3.1-8b"], torch.device(check.device)
    model = random_model(config, device, torch.bfloat16, 2 * MAX_POSITION, lambda line: None)
    prompts = [Prompt(MAX_POSITION, chunk) for chunk in (None, 2048)]
    with (check.out / "prompt.log").open("w") as log:
        found = run_prompt_bench(model, prompts, ("default", "triton"), log, lambda line: None)
    check.data["prompt"] = found
    for name, milliseconds in found.items():
        check.row(f"first token, {name}", f"{milliseconds:.1f} ms")


def kernel_shares(served: Any, num_requests: int) -> dict[str, float]:
    """Each family's share of the kernels' time in decode steps, the largest first."""
    from fi_engine.bench import PROMPTS
    from fi_sampling import SamplingParams
    from torch.profiler import ProfilerActivity, profile

    for prompt in PROMPTS[:num_requests]:
        served.submit(prompt, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True))
    for _ in range(WARM_UP_STEPS):
        served.step()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        while served.num_unfinished:
            served.step()
        torch.cuda.synchronize(served.device)
    times: Counter[str] = Counter()
    for event in record.key_averages():
        times[family_of(event.key)] += event.self_device_time_total
    total = sum(times.values())
    return {family: microseconds / total for family, microseconds in times.most_common() if microseconds}


def family_of(kernel: str) -> str:
    """The family of a kernel's name."""
    for pattern, family in FAMILIES:
        match = pattern.search(kernel)
        if match is not None:
            return match.expand(family)
    return "other"


SECTIONS: dict[str, Callable[[Check], None]] = {
    "versions": versions,
    "tests": gpu_tests,
    "conformance": conformance,
    "examples": examples,
    "replays": replays,
    "pipeline": pipeline,
    "sanitizer": sanitizer,
    "partition": partition,
    "operations": operations,
    "engine": engine,
    "decode": decode,
    "prompt": prompt,
}


def command(check: Check, name: str, *arguments: str, **variables: str) -> int:
    """Run Python with ``arguments`` and more environment variables; output goes to FOLDER/NAME.log and the exit status
    comes back."""
    environment = {**os.environ, **variables}
    with (check.out / f"{name}.log").open("w") as log:
        done = subprocess.run([sys.executable, *arguments], stdout=log, stderr=log, env=environment, check=False)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="reference,triton,cuda")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes of conformance and sanitizer"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--model", type=Path, help="GGUF file or safetensors folder for the engine section")
    options = parser.parse_args()
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out, options.device, options.backends.split(","), options.jobs, options.model)
    for name in options.sections.split(","):
        try:
            SECTIONS[name](check)
        except Exception as error:  # noqa: BLE001 - one section's failure must not cost the GPU time of the others
            (check.out / f"{name}-error.log").write_text(traceback.format_exc())
            check.row(name, f"{type(error).__name__}: {error}", ok=False)
    rows = [{"name": name, "value": value, "status": status} for name, value, status in check.table]
    (check.out / "check.json").write_text(json.dumps({**check.data, "table": rows}, indent=1) + "\n")
    for name, value, status in check.table:
        print(f"{status:<8}{name:<34}{value}")
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
