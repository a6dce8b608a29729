"""Where the time of steady decode steps goes, by kernel, and what share attention has.

usage: python decode_profile.py ENGINE MODEL_FOLDER BACKEND OUT.json [--batch N] [--context N] [--steps N] [--options JSON ...]
Requests of ``--context`` tokens are prefilled; then ``--steps`` steps in which all of them decode are profiled, in vLLM after as
many that are timed (of SGLang's, which another process runs, the profile tells the time from kernel to kernel). Written are the
time a step, the kernels by their time, and every copy to the host and synchronisation with its number: those are the engine's own
(it reads the drawn tokens); ``no_sync`` shows that none is the adapter's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from engines import Engine, SglangEngine, VllmEngine, engine_options, open_engine, until

ATTENTION = (
    "attention",
    "flash",
    "unified",
    "decode_kernel",
    "merge_kernel",
    "append_kv",
    "reshape_and_cache",
    "plan",
    "_fwd_",
    "kv_indices",
    "kv_splits",
    "kvcache",
    "kv_buffer",
)
"""Parts of the names of kernels that are attention's, of whatever backend: its planning and its writes to the cache too."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def prompts_of(batch: int, context: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (batch, context), generator=generator).tolist()


def fill(engine: Any, prompts: list[list[int]], num_new: int) -> None:
    """Add the requests and step until each has its first token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num_new)
    for number, tokens in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
    seen: set[str] = set()
    while len(seen) < len(prompts):
        seen |= {out.request_id for out in engine.step() if out.outputs[0].token_ids}


def profiled(engine: Any, steps: int) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    waits = dict.fromkeys(WAITS, 0)
    for event in profile.key_averages():
        for name in WAITS:
            waits[name] += event.count if name in event.key else 0
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total:
            kernels[event.key] = event.self_device_time_total / steps
    return summary(kernels, waits, steps)


def summary(kernels: dict[str, float], waits: dict[str, int], steps: int) -> dict[str, Any]:
    """``kernels``: microseconds a step, by name."""
    total = sum(kernels.values())
    attention = sum(time for name, time in kernels.items() if any(part in name for part in ATTENTION))
    slowest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:25])
    return {
        "device_us_a_step": total,
        "attention_us_a_step": attention,
        "attention_share": attention / total if total else None,
        "kernels_us_a_step": slowest,
        "waits": waits,
        "steps": steps,
    }


def of_vllm(engine: Any, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """``engine``: vLLM's LLMEngine, in this process."""
    fill(engine, prompts, 4 * steps + 16)
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    wall = 1e6 * (time.perf_counter() - start) / steps
    result = {"wall_us_a_step": wall} | profiled(engine, steps)
    engine.abort_request([str(number) for number in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()
    return result


def of_sglang(engine: SglangEngine, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """From the trace that SGLang's scheduler writes of the first decode steps."""
    with TemporaryDirectory() as folder:
        engine.engine.start_profile(
            output_dir=folder,
            num_steps=steps,
            activities=["CPU", "GPU"],
            profile_by_stage=True,
            with_stack=False,
            record_shapes=False,
        )
        engine.generate(prompts, steps + 16)
        until(lambda: bool(list(Path(folder).glob("*-DECODE.trace.json.gz"))), "a trace of decode steps")
        [path] = Path(folder).glob("*-DECODE.trace.json.gz")
        with gzip.open(path) as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    return of_trace(events)


def of_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a trace of the profiler; a step is one launch of a CUDA graph."""
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps = sum("cudaGraphLaunch" in event["name"] for event in events)
    waits = {name: sum(name in event["name"] for event in events) for name in WAITS}
    kernels: dict[str, float] = {}
    for event in on_device:
        kernels[event["name"]] = kernels.get(event["name"], 0.0) + event["dur"] / steps
    first, last = (pick(event["ts"] for event in on_device) for pick in (min, max))
    return {"wall_us_a_step": (last - first) / steps} | summary(kernels, waits, steps)


def profile_decode(
    engine: Engine, vocab_size: int, backend: str, out: str, batch: int = 64, context: int = 1024, steps: int = 30
) -> None:
    """Fill ``engine``, time and profile, empty it, and write the result to ``out``."""
    prompts = prompts_of(batch, context, vocab_size)
    result: dict[str, Any] = {"backend": backend, "batch": batch, "context": context}
    result["device"] = torch.cuda.get_device_name()
    if isinstance(engine, VllmEngine):
        result |= of_vllm(engine.engine.llm_engine, prompts, steps)
    elif isinstance(engine, SglangEngine):
        result |= of_sglang(engine, prompts, steps)
    else:
        raise TypeError(f"no profile of {engine!r}")
    Path(out).write_text(json.dumps(result, indent=1))
    print(json.dumps({name: value for name, value in result.items() if name != "kernels_us_a_step"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("engine", "model", "backend", "out"):
        parser.add_argument(name)
    for name, default in (("batch", 64), ("context", 1024), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--options", action="append", default=[])
    options = parser.parse_args()
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    profile_decode(engine, vocab_size, options.backend, options.out, options.batch, options.context, options.steps)
    engine.close()


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
