"""Time to the first token of a long prompt on a model of random weights, in one step and in chunks, on each backend:
``python benchmarks/bench_first_token.py --out FOLDER [--shape llama-3.1-8b] [--length 8192] [--chunks 2048 512]``.

The engine is warm and alone; times are the host's, from submitting the prompt to its token (``fi_engine.prompt_bench``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from fi_benchmarks import results
from fi_benchmarks.runner import OURS, Row
from fi_core.devices import normal_device
from fi_engine.prompt_bench import Prompt, run_prompt_bench
from fi_engine.random_model import SHAPES, random_model


def quiet(line: str) -> None:
    """No progress: the output is a log."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--chunks", type=int, nargs="*", default=[2048, 512], help="tokens a step, beside all in one")
    parser.add_argument("--backends", default="default,triton", help="comma-separated; default: what is preferred")
    options = parser.parse_args()
    device, config = normal_device("cuda"), SHAPES[options.shape]
    model = random_model(config, device, torch.bfloat16, config.max_position, quiet)
    rows = []
    for chunk in (None, *options.chunks):
        prompt = Prompt(options.length, chunk)
        how = "one step" if chunk is None else f"steps of {chunk}"
        found = run_prompt_bench(model, [prompt], options.backends.split(","), sys.stdout, quiet)
        for backend, milliseconds in zip(options.backends.split(","), found.values(), strict=True):
            case = f"first token {options.shape} {options.length} tokens in {how}"
            rows.append(Row("first_token", "first_token", case, backend, OURS, us=1e3 * milliseconds))
    results.write(options.out, "first_token", rows, results.circumstances(device, {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
