"""Output tokens a second of one engine with one attention backend, offline: all requests at once.

usage: python throughput.py ENGINE MODEL_FOLDER BACKEND OUT.jsonl [--workloads chat,uniform,...] [--requests N]
                            [--rounds N] [--options JSON ...] [--turns FOLDER --of N] [--profile OUT.json]
A line of JSON for each round of each workload is appended to OUT as it comes. With --turns, N such processes, each with its own
backend, start together and then run their rounds in turns. --profile adds where the time of decode steps goes (vLLM). Lengths are
drawn with a fixed seed:
chat     prompts and answers distributed like a chat's (log-normal, medians 200 and 180, at most 2048)
uniform  prompts and answers uniform from 512 to 2048
long     prompts of 32768 tokens, answers of 256 (an eighth of the requests)
short    prompts uniform from 64 to 256, answers of 128
sampled  prompts and answers of 256, drawn with temperature 0.8, top-k 50, top-p 0.9 (the others are greedy)
prefix   a common system prompt of 8192 tokens, then 128 of one's own, answers of 256
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from decode_profile import profile_decode
from engines import Engine, VllmEngine, engine_options, open_engine
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
    if workload == "sampled":
        return [(tokens(256), 256) for _ in range(num)]
    if workload == "long":
        return [(tokens(32768), 256) for _ in range(max(1, num // 8))]
    if workload != "prefix":
        raise ValueError(f"no workload {workload!r}")
    common = tokens(8192)
    return [(common + tokens(128), 256) for _ in range(num)]


def timed(engine: Engine, workload: str, requests: list[Request]) -> float:
    """Seconds for all of them, from an empty prefix cache."""
    engine.forget()
    start = time.perf_counter()
    engine.generate([prompt for prompt, _ in requests], [num for _, num in requests], **SAMPLING.get(workload, {}))
    return time.perf_counter() - start


def write(options: argparse.Namespace, workload: str, number: int, requests: list[Request], seconds: float) -> None:
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
        "seconds": round(seconds, 4),
        "output_tokens_per_second": round(num_new / seconds, 1),
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
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    turns = Turns(options.turns, options.of)
    started = time.perf_counter()
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    print("started in", round(time.perf_counter() - started, 1), "s", flush=True)
    turns.wait(options.backend)
    with turns.turn():
        warm = [prompt for prompt, _ in requests_of("short", 8, vocab_size)]
        for sampling in ({}, *SAMPLING.values()):
            engine.generate(warm, 8, **sampling)
    if options.profile and isinstance(engine, VllmEngine):
        with turns.turn():
            profile_decode(engine.engine.llm_engine, vocab_size, options.backend, options.profile)
    for workload in options.workloads.split(","):
        requests = requests_of(workload, options.requests, vocab_size)
        for number in range(options.rounds):
            with turns.turn():
                seconds = timed(engine, workload, requests)
            write(options, workload, number, requests, seconds)
    engine.close()


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
