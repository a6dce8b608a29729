"""Output tokens a second and latencies of one engine with one attention backend.

usage: python throughput.py ENGINE MODEL_FOLDER BACKEND OUT.jsonl [--workloads fixed,chat@16,...] [--requests N]
                            [--rounds N] [--options JSON ...] [--turns FOLDER --of N] [--profile OUT.json]
A line of JSON for each round of each workload is appended to OUT as it comes. The requests of a workload arrive all at once;
those of workload@R as a Poisson process of R a second, the same in every run, and then the line has the time to the first token
and for each further one too. --rounds repeats the whole list. With --turns, N such processes, each with its own backend, start
together and then run their rounds in turns. Lengths are drawn with a fixed seed:
chat     prompts and answers distributed like a chat's (log-normal, medians 200 and 180, at most 2048)
uniform  prompts and answers uniform from 512 to 2048
long     prompts of 32768 tokens, answers of 256 (a sixteenth of the requests)
fixed    prompts of 1024, answers of 256
short    prompts uniform from 64 to 256, answers of 128
sampled  prompts and answers of 256, drawn with temperature 0.8, top-k 50, top-p 0.9 (the others are greedy)
prefix   a common system prompt of 8192 tokens, then 128 of one's own, answers of 256
profile  none of these: where the time of decode steps goes, once, written to what --profile names
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from decode_profile import profile_decode
from engines import Engine, engine_options, open_engine
from turns import Turns

Request = tuple[list[int], int]
SAMPLING = {"sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.9}}


def requests_of(workload: str, num: int, vocab_size: int) -> list[Request]:
    """``num`` prompts with their numbers of new tokens."""
    generator = torch.Generator().manual_seed(7)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, vocab_size, (int(length),), generator=generator).tolist()

    if workload == "chat":
        normal = torch.randn(num, 2, generator=generator)
        lengths = (normal + torch.tensor([200.0, 180.0]).log()).exp().clamp(4, 2048).int().tolist()
        return [(tokens(prompt), answer) for prompt, answer in lengths]
    if workload == "uniform":
        lengths = torch.randint(512, 2049, (num, 2), generator=generator).tolist()
        return [(tokens(prompt), answer) for prompt, answer in lengths]
    if workload == "short":
        return [(tokens(length), 128) for length in torch.randint(64, 257, (num,), generator=generator).tolist()]
    if workload == "fixed":
        return [(tokens(1024), 256) for _ in range(num)]
    if workload == "sampled":
        return [(tokens(256), 256) for _ in range(num)]
    if workload == "long":
        return [(tokens(32768), 256) for _ in range(max(1, num // 16))]
    if workload != "prefix":
        raise ValueError(f"no workload {workload!r}")
    common = tokens(8192)
    return [(common + tokens(128), 256) for _ in range(num)]


def arrivals_of(num: int, rate: float) -> list[float]:
    """Seconds after the start."""
    gaps = torch.empty(num).exponential_(rate, generator=torch.Generator().manual_seed(11))
    return gaps.cumsum(0).tolist()


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds, of half, nine tenths and 99 hundredths of ``values``."""
    found = torch.tensor(values).quantile(torch.tensor([0.5, 0.9, 0.99])) * 1e3
    return dict(zip(("p50_ms", "p90_ms", "p99_ms"), (round(value, 3) for value in found.tolist()), strict=True))


def measure(engine: Engine, workload: str, requests: list[Request]) -> dict[str, Any]:
    """One round, from an empty prefix cache: ``seconds`` for all requests, and latencies where they arrive one by one."""
    name, _, rate = workload.partition("@")
    engine.forget()
    start = time.perf_counter()
    if rate:
        found = engine.serve(requests, arrivals_of(len(requests), float(rate)))
        latencies = {
            "first_token": percentiles([first for first, _ in found]),
            "further_token": percentiles([further for _, further in found]),
        }
    else:
        latencies = {}
        engine.generate([prompt for prompt, _ in requests], [num for _, num in requests], **SAMPLING.get(name, {}))
    return {"seconds": round(time.perf_counter() - start, 4), **latencies}


def write(
    options: argparse.Namespace, workload: str, number: int, requests: list[Request], found: dict[str, Any]
) -> None:
    """One line of a round."""
    num_new = sum(num for _, num in requests)
    line = {
        "engine": options.engine,
        "backend": options.backend,
        "workload": workload,
        "round": number,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "requests": len(requests),
        "input_tokens": sum(len(prompt) for prompt, _ in requests),
        "output_tokens": num_new,
        "output_tokens_per_second": round(num_new / found["seconds"], 1),
        **found,
    }
    print(json.dumps(line), flush=True)
    with open(options.out, "a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("engine", "model", "backend", "out"):
        parser.add_argument(name)
    parser.add_argument("--workloads", default="uniform")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--options", action="append", default=[])
    parser.add_argument("--turns")
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--profile")
    options = parser.parse_args()
    if ("profile" in options.workloads.split(",")) != bool(options.profile):
        parser.error("--profile names the file of the workload profile; they come together")
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    turns = Turns(options.turns, options.of)
    started = time.perf_counter()
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    print("started in", round(time.perf_counter() - started, 1), "s", flush=True)
    turns.wait(options.backend)
    with turns.turn():
        warm = [prompt for prompt, _ in requests_of("short", options.requests, vocab_size)]  # kernels differ by rows
        for sampling in ({}, *SAMPLING.values()):
            engine.generate(warm, 8, **sampling)
        engine.serve([(prompt, 32) for prompt in warm[:16]], arrivals_of(16, 16.0))  # and steps of both kinds at once
    done: Counter[str] = Counter()
    for workload in options.workloads.split(",") * options.rounds:
        if workload == "profile":
            if not done[workload]:
                with turns.turn():
                    profile_decode(engine, vocab_size, options.backend, options.profile)
            done[workload] += 1
            continue
        requests = requests_of(workload.partition("@")[0], options.requests, vocab_size)
        with turns.turn():
            found = measure(engine, workload, requests)
        write(options, workload, done[workload], requests, found)
        done[workload] += 1
    engine.close()


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
