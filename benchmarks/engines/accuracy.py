"""Teacher-forced log-probabilities of one engine with one attention backend, and how far those of several backends differ.

usage: python accuracy.py run ENGINE MODEL_FOLDER BACKEND OUT.json [--options JSON ...] [--name NAME]
       python accuracy.py compare FI.json OWN.json OWN.json ...
64 prompts, each with 64 tokens drawn for it: "prompt" are the tokens' log-probabilities as a prefill computes them, "decode" as
decode steps do. SGLang cannot force tokens in decode steps: there "decode" are those of its own greedy tokens, up to the first
that two backends choose differently. ``compare`` also counts equal greedy texts, and their tokens before the first difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from engines import engine_options, open_engine

NUM_PROMPTS, NUM_NEW = 64, 64


def prompts_of(vocab_size: int) -> list[list[int]]:
    """64 prompts of 8 to 200 tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 200, (NUM_PROMPTS,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def drawn_tokens(vocab_size: int) -> list[list[int]]:
    """64 tokens for each prompt, the same in every run."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, vocab_size, (NUM_PROMPTS, NUM_NEW), generator=generator).tolist()


def run(options: argparse.Namespace) -> None:
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    prompts, drawn = prompts_of(vocab_size), drawn_tokens(vocab_size)
    result: dict[str, Any] = {"engine": options.engine, "backend": options.backend, "model": options.model}
    result["name"] = options.name or options.backend
    found = engine.prompt_logprobs([prompt + more for prompt, more in zip(prompts, drawn, strict=True)])
    result["prompt"] = [values[-NUM_NEW:] for values in found]
    result["decode_tokens"], result["decode"] = engine.decode_logprobs(prompts, drawn)
    result["greedy"] = engine.generate(prompts, NUM_NEW)
    Path(options.out).write_text(json.dumps(result))
    print("written", options.out, flush=True)
    engine.close()


def common_length(one: list[int], two: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def difference(one: dict[str, Any], two: dict[str, Any], part: str) -> tuple[float, float, int]:
    """(mean, largest absolute difference, numbers compared) of the positions that have the same tokens before them."""
    apart = []
    for row, (first, second) in enumerate(zip(one[part], two[part], strict=True)):
        same = len(first) if part == "prompt" else common_length(one["decode_tokens"][row], two["decode_tokens"][row])
        apart += [abs(a - b) for a, b in zip(first[:same], second[:same], strict=False)]
    return (sum(apart) / len(apart), max(apart), len(apart)) if apart else (float("nan"), float("nan"), 0)


def compare(paths: list[str]) -> int:
    """Print each pair; 1 unless fi's (the first) means are within the largest among the engine's own."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    status = 0
    for part in ("prompt", "decode"):
        means: dict[bool, list[float]] = {True: [], False: []}
        for one, two in combinations(results, 2):
            mean, most, num = difference(one, two, part)
            same = [common_length(a, b) for a, b in zip(one["greedy"], two["greedy"], strict=True)]
            print(
                f"{part}: {one['name']} against {two['name']}: mean {mean:.5f}, largest {most:.5f} of {num}; "
                f"greedy texts equal: {same.count(NUM_NEW)} of {len(same)}, tokens: {sum(same)} of {NUM_NEW * len(same)}"
            )
            means[one is results[0]].append(mean)
        if means[False]:
            holds = max(means[True]) <= max(means[False])
            print(f"{part}: fi differs by no more than the engine's own among themselves: {holds}")
            status |= not holds
    return status


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run"])
    for name in ("engine", "model", "backend", "out"):
        parser.add_argument(name)
    parser.add_argument("--options", action="append", default=[])
    parser.add_argument("--name", help="what compare calls it, instead of the backend")
    run(parser.parse_args())


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
