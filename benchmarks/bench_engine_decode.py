"""What a decode step of the engine consists of, with our CUDA kernels, with Triton's, and with Triton's for all but attention:
``python benchmarks/bench_engine_decode.py --out FOLDER [--shape llama-3.1-8b ...] [--steps 64] [--model smollm2-135m=PATH]``.

Models of random weights where no file is given; steps are timed on the host from token to token. A row's ``families`` are
microseconds a step in kernels of each kind, from the profiler, where a CUDA kernel that overlaps the one before counts its
wait for it: what our other kernels save is the step with attention alone less the step with all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from fi_benchmarks import results
from fi_benchmarks.runner import OURS, Row
from fi_core.contract import KernelEntry, Request
from fi_core.devices import normal_device
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry
from fi_engine.checkpoint import open_checkpoint
from fi_engine.decode_bench import SteadySpeed, Workload, steady_speed
from fi_engine.model import Model, load_model
from fi_engine.random_model import SHAPES, random_model
from gpu_check import family_of

MIXED = Workload(64, 128, 2048)
WORKLOADS = {"llama-3.1-8b": (MIXED,), "smollm2-135m": (Workload(8, 16, 32), MIXED)}
"""Of each shape; the demonstration's model answers eight short prompts at once."""

ATTENTION_ALONE = "triton, attention cuda"
IMPLS = {ATTENTION_ALONE: None, "cuda": "cuda", "triton": "triton"}
"""What is timed, and the backend that serves every operation."""


class AttentionAlone:
    """A plugin that leaves attention to the CUDA backend, wherever no backend is asked for, and all else to Triton."""

    @hookimpl
    def fi_select_kernel(self, request: Request, candidates: Sequence[KernelEntry]) -> KernelEntry | None:
        wanted = "cuda" if request.op == "attention" else "triton"
        return next((entry for entry in candidates if entry.backend == wanted), None)


def families(kernels: Mapping[str, float]) -> dict[str, float]:
    """Microseconds by family, the longest first, from seconds by kernel."""
    found: Counter[str] = Counter()
    for name, seconds in kernels.items():
        found[family_of(name)] += 1e6 * seconds
    return {name: round(microseconds, 1) for name, microseconds in found.most_common()}


def row_of(case: str, impl: str, speed: SteadySpeed) -> Row:
    times = [1e6 * seconds for seconds in speed.step_times]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    parts = None if speed.kernels is None else families(speed.kernels)
    return Row(
        "engine",
        "engine",
        case,
        impl,
        OURS,
        us=statistics.median(times),
        p10=deciles[0],
        p90=deciles[-1],
        families=parts,
    )


def model_of(shape: str, path: Path | None, device: torch.device) -> Model:
    """The model of a .gguf file or a safetensors folder, or one of random weights."""
    if path is None:
        return random_model(SHAPES[shape], device, torch.bfloat16, SHAPES[shape].max_position, quiet)
    checkpoint = open_checkpoint(path, quiet)
    return load_model(checkpoint, device, torch.bfloat16, checkpoint.config.max_position, quiet)


def quiet(line: str) -> None:
    """No progress: the output is a log."""


def file_of(text: str) -> tuple[str, Path]:
    """A shape and the file of its weights."""
    shape, _, path = text.partition("=")
    return shape, Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", action="append", choices=sorted(WORKLOADS), help="default: all (repeatable)")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--model", action="append", type=file_of, default=[], metavar="SHAPE=PATH", help="real weights")
    parser.add_argument("--commit", metavar="TEXT", help="what the rows name (default: git's answer)")
    options = parser.parse_args()
    device = normal_device("cuda")
    registry().register_plugin(AttentionAlone(), "attention-alone")
    for shape in options.shape or WORKLOADS:
        path = dict(options.model).get(shape)
        model = model_of(shape, path, device)
        for workload in WORKLOADS[shape]:
            lengths = f"{workload.num_requests} requests of {workload.shortest} to {workload.longest} tokens"
            case, rows = f"decode step {shape}{' (real weights)' if path else ''}, {lengths}", []
            for impl, backend in IMPLS.items():
                rows.append(row_of(case, impl, steady_speed(model, workload, options.steps, backend)))
                print(f"{case}, {impl}: {rows[-1].us:.0f} us; {rows[-1].families}", flush=True)
            results.write(options.out, "engine", rows, results.circumstances(device, {}, options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
