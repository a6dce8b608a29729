"""Teacher-forced log-probabilities of one engine with one attention backend, and how far those of several backends differ.

usage: python accuracy.py run ENGINE MODEL_FOLDER BACKEND OUT.json [--options JSON] [--tokens FILE.json]
       python accuracy.py compare FI.json OWN.json OWN.json ...
The first run without --tokens draws 64 prompts and lets its engine continue each by 64 tokens; give its file to the others as
--tokens, so that all are asked the same. Compared are the numbers of a prefill ("prompt") and those of decode steps ("decode").
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


def run(options: argparse.Namespace) -> None:
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    if options.tokens:
        given = json.loads(Path(options.tokens).read_text())
        prompts, forced = given["prompts"], given["forced"]
    else:
        prompts = prompts_of(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])
        forced = engine.generate(prompts, NUM_NEW)
    result: dict[str, Any] = {"engine": options.engine, "backend": options.backend, "model": options.model}
    result |= {"prompts": prompts, "forced": forced}
    whole = [prompt + more for prompt, more in zip(prompts, forced, strict=True)]
    found = engine.prompt_logprobs(whole)
    result["prompt"] = [values[-len(more) :] for values, more in zip(found, forced, strict=True)]
    result["decode"] = engine.forced_logprobs(prompts, forced)
    result["greedy"] = engine.generate(prompts, NUM_NEW)
    Path(options.out).write_text(json.dumps(result))
    print("written", options.out, flush=True)
    engine.close()


def difference(one: list[list[float]], two: list[list[float]]) -> tuple[float, float, int]:
    """(mean, largest absolute difference, numbers compared) of the positions that both have."""
    lists = zip(one, two, strict=True)
    apart = [abs(a - b) for first, second in lists for a, b in zip(first, second, strict=False)]
    return (sum(apart) / len(apart), max(apart), len(apart)) if apart else (float("nan"), float("nan"), 0)


def compare(paths: list[str]) -> int:
    """Print each pair; 1 unless fi's (the first) means are within the largest among the engine's own."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    status = 0
    for part in ("prompt", "decode"):
        means: dict[bool, list[float]] = {True: [], False: []}
        for one, two in combinations(results, 2):
            mean, most, num = difference(one[part], two[part])
            same = sum(a == b for a, b in zip(one["greedy"], two["greedy"], strict=True))
            names = f"{one['backend']} against {two['backend']}"
            print(
                f"{part}: {names}: mean {mean:.5f}, largest {most:.5f} of {num}; greedy equal {same}/{len(one['greedy'])}"
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
    parser.add_argument("--options", default="{}")
    parser.add_argument("--tokens")
    run(parser.parse_args())


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
