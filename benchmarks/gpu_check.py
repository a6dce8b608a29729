"""One command for a GPU machine: versions, conformance of the backends, the partition's cost, the engine's decode speed.

``python benchmarks/gpu_check.py --out FOLDER [--model PATH] [--sections versions,conformance,...]`` from a source tree on
PYTHONPATH (packages/*/src, integrations/engine/src, packages/dist-info). Everything is written to FOLDER (JSON and logs);
a short table ends the output. Exit status 1 if a section failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parent
DISTRIBUTIONS = ("torch", "triton", "numpy", "cuda-core", "nvidia-cuda-nvrtc", "fi-core", "fi-triton", "fi-cuda")
NUM_TOKENS = 256


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
    """``fi conformance`` of each backend on the device; its report is FOLDER/conformance-NAME.json."""
    for backend in check.backends:
        report = check.out / f"conformance-{backend}.json"
        started = time.perf_counter()
        arguments = ("--backend", backend, "--device", check.device, "--json", str(report), "--jobs", str(check.jobs))
        status = command(check, f"conformance-{backend}", "-m", "fi_core", "conformance", *arguments)
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
    """The host's partition (bench_partition.py)."""
    status = command(check, "partition", str(BENCHMARKS / "bench_partition.py"), "--out", str(check.out))
    rows = {row["case"]: row for row in json.loads((check.out / "partition.json").read_text())}
    shown = ", ".join(f"{case} {rows[case]['us']:.1f} µs" for case in ("decode-random-b256", "decode-random-b4096"))
    check.row("partition", shown, status == 0)


def engine(check: Check) -> None:
    """Greedy decode: steps and tokens per second at 1 and 8 requests, and the share of a step outside kernels."""
    if check.model is None:
        raise ValueError("the engine section needs --model")
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


SECTIONS: dict[str, Callable[[Check], None]] = {
    "versions": versions,
    "conformance": conformance,
    "partition": partition,
    "operations": operations,
    "engine": engine,
}


def command(check: Check, name: str, *arguments: str) -> int:
    """Run Python with ``arguments``; output goes to FOLDER/NAME.log and the exit status comes back."""
    with (check.out / f"{name}.log").open("w") as log:
        return subprocess.run([sys.executable, *arguments], stdout=log, stderr=log, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="reference,triton,cuda")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes of the conformance run"
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
        print(f"{status:<7}{name:<24}{value}")
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
