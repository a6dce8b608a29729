"""Latency of one engine with one attention backend under requests that arrive at random times.

usage: python online.py ENGINE MODEL_FOLDER BACKEND OUT.jsonl [--workloads chat,uniform] [--rate R] [--requests N]
                        [--options JSON ...]
Requests arrive as a Poisson process of ``--rate`` a second, with the lengths of ``throughput.py``, the same in every run. A line
of JSON for each workload: time to the first token, time for each further one, and output tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from engines import VLLM_ENVIRONMENT, engine_options
from throughput import requests_of


class VllmServer:
    def __init__(self, folder: str, backend: str, **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the asynchronous engine lives in a process of its own
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {"model": folder, "skip_tokenizer_init": True, "attention_backend": backend, "dtype": "bfloat16"}
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**{**settings, "compilation_config": graphs, **options})
        )

    async def stream(self, name: str, prompt: list[int], num_new: int) -> AsyncIterator[int]:
        """The number of tokens so far, whenever there are more."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num_new)
        async for output in self.engine.generate({"prompt_token_ids": prompt}, params, request_id=name):
            yield len(output.outputs[0].token_ids)

    def close(self) -> None:
        self.engine.shutdown()


class SglangServer:
    def __init__(self, folder: str, backend: str, **options: Any) -> None:
        from engines import SglangEngine

        self.engine = SglangEngine(folder, backend, **options).engine

    async def stream(self, name: str, prompt: list[int], num_new: int) -> AsyncIterator[int]:
        """The number of tokens so far, whenever there are more."""
        params = {"temperature": 0.0, "max_new_tokens": num_new, "ignore_eos": True}
        outputs = await self.engine.async_generate(input_ids=prompt, sampling_params=params, stream=True, rid=name)
        async for output in outputs:
            yield output["meta_info"]["completion_tokens"]

    def close(self) -> None:
        self.engine.shutdown()


async def timed(server: Any, name: str, prompt: list[int], num_new: int, delay: float) -> tuple[float, float]:
    """(seconds to the first token, seconds a further token) of a request that arrives after ``delay``."""
    await asyncio.sleep(delay)
    start, first = time.perf_counter(), 0.0
    async for _ in server.stream(name, prompt, num_new):
        first = first or time.perf_counter() - start
    return first, (time.perf_counter() - start - first) / max(1, num_new - 1)


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds, of half, nine tenths and 99 hundredths of ``values``."""
    found = torch.tensor(values).quantile(torch.tensor([0.5, 0.9, 0.99])) * 1e3
    return dict(zip(("p50_ms", "p90_ms", "p99_ms"), (round(value, 3) for value in found.tolist()), strict=True))


async def measure(server: Any, options: argparse.Namespace, vocab_size: int) -> None:
    warm = requests_of("short", 8, vocab_size)
    await asyncio.gather(*(timed(server, f"warm{i}", prompt, 8, 0.0) for i, (prompt, _) in enumerate(warm)))
    for workload in options.workloads.split(","):
        requests = requests_of(workload, options.requests, vocab_size)
        generator = torch.Generator().manual_seed(11)
        gaps = torch.empty(len(requests)).exponential_(options.rate, generator=generator)
        arrivals = gaps.cumsum(0).tolist()
        start = time.perf_counter()
        tasks = (
            timed(server, f"{workload}{i}", prompt, num, delay)
            for i, ((prompt, num), delay) in enumerate(zip(requests, arrivals, strict=True))
        )
        found = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
        line = {
            "engine": options.engine,
            "backend": options.backend,
            "workload": workload,
            "rate": options.rate,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "requests": len(requests),
            "output_tokens_per_second": round(sum(num for _, num in requests) / seconds, 1),
            "first_token": percentiles([first for first, _ in found]),
            "further_token": percentiles([further for _, further in found]),
        }
        print(json.dumps(line), flush=True)
        with open(options.out, "a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("engine", "model", "backend", "out"):
        parser.add_argument(name)
    parser.add_argument("--workloads", default="uniform")
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--options", action="append", default=[])
    options = parser.parse_args()
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    servers = {"vllm": VllmServer, "sglang": SglangServer}

    async def run() -> None:
        server = servers[options.engine](options.model, options.backend, **engine_options(options.options))
        await measure(server, options, vocab_size)
        server.close()

    if options.engine == "vllm":
        asyncio.run(run())
    else:  # SGLang makes a loop of its own when it starts, and runs its managers in it
        server = SglangServer(options.model, options.backend, **engine_options(options.options))
        server.engine.loop.run_until_complete(measure(server, options, vocab_size))
        server.close()


if __name__ == "__main__":  # the engines start processes that import this file
    main()
