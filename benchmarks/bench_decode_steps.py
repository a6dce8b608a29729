"""Steady decode of an engine, 64 requests of mixed lengths with steps as CUDA graphs, on each backend:
``python benchmarks/bench_decode_steps.py --out FOLDER [--random llama-3.1-8b smollm2-135m] [--model PATH]``.

A step's time is the host's, from one token of all requests to the next; that of its kernels, and of attention's among
them, is from a profile of a few more steps (``fi_engine.decode_bench``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from fi_benchmarks import results
from fi_benchmarks.runner import OURS, Row
from fi_core.devices import normal_device
from fi_engine.checkpoint import open_checkpoint
from fi_engine.decode_bench import SteadySpeed, Workload, run_decode_bench
from fi_engine.model import Model, load_model
from fi_engine.random_model import SHAPES, random_model


def quiet(line: str) -> None:
    """No progress: the output is a log."""


def models_of(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Model]]:
    """The models with their names, one after the other, so that one alone is in memory."""
    for name in options.random:
        config = SHAPES[name]
        if options.layers:
            config = replace(config, num_layers=options.layers)
        yield f"{name}, random weights", random_model(config, device, torch.bfloat16, config.max_position, quiet)
    if options.model:
        checkpoint = open_checkpoint(options.model, quiet)
        most = checkpoint.config.max_position
        yield options.model.stem, load_model(checkpoint, device, torch.bfloat16, most, quiet)


def rows_of(case: str, backend: str, speed: SteadySpeed) -> Iterator[Row]:
    """A row for the step, and for its kernels and its attention where they were profiled."""
    parts = {"": speed.step_seconds, " kernels": speed.kernel_seconds, " attention": speed.attention_seconds}
    for suffix, seconds in parts.items():
        if seconds is not None:
            yield Row("decode_steps", "decode_steps", f"{case}{suffix}", backend, OURS, us=1e6 * seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--random", choices=sorted(SHAPES), nargs="*", default=["llama-3.1-8b", "smollm2-135m"])
    parser.add_argument(
        "--layers", type=int, help="of the random models, fewer than they have: to compile what they need"
    )
    parser.add_argument("--model", type=Path, help="also a .gguf file or a safetensors folder")
    parser.add_argument("--lengths", type=int, nargs=2, default=(128, 2048), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--num-steps", type=int, default=64)
    parser.add_argument("--backends", default="default,triton", help="comma-separated; default: what is preferred")
    parser.add_argument("--commit", metavar="TEXT", help="what the rows name (default: git's answer)")
    options = parser.parse_args()
    device, workload = normal_device("cuda"), Workload(64, *options.lengths)
    for name, model in models_of(options, device):
        case = f"decode steps {name}, {workload.num_requests} requests of {workload.shortest} to {workload.longest}"
        print(case, flush=True)
        found = run_decode_bench(model, workload, options.num_steps, options.backends.split(","), sys.stdout, quiet)
        rows = [row for backend, speed in found.items() for row in rows_of(case, backend, speed)]
        results.write(options.out, "decode_steps", rows, results.circumstances(device, {}, options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
