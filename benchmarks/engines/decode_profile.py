"""Where the time of steady decode steps goes in vLLM, by kernel, and what share attention has.

usage: python decode_profile.py MODEL_FOLDER BACKEND OUT.json [--batch N] [--context N] [--steps N] [--options JSON ...]
Requests of ``--context`` tokens are prefilled; then ``--steps`` steps in which all of them decode are timed, and as many more are
profiled. Written are the time a step, the kernels by their time, and every copy to the host and synchronisation with its number:
those are the engine's own (it reads the drawn tokens); ``no_sync`` shows that none is the adapter's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from engines import VllmEngine, engine_options

ATTENTION = ("attention", "flash", "unified", "decode_kernel", "merge_kernel", "append_kv", "reshape_and_cache", "plan")
"""Parts of the names of kernels that are attention's, of whatever backend: its planning and its writes to the cache too."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def fill(engine: Any, batch: int, context: int, num_new: int, vocab_size: int) -> None:
    """Add ``batch`` requests and step until each has its first token."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(3)
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num_new)
    for number in range(batch):
        tokens = torch.randint(0, vocab_size, (context,), generator=generator).tolist()
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
    seen: set[str] = set()
    while len(seen) < batch:
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


def profile_decode(
    engine: Any, vocab_size: int, backend: str, out: str, batch: int = 64, context: int = 1024, steps: int = 30
) -> None:
    """Fill ``engine`` (vLLM's LLMEngine, in this process), time and profile, empty it, and write the result to ``out``."""
    fill(engine, batch, context, 4 * steps + 16, vocab_size)
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    result: dict[str, Any] = {"backend": backend, "batch": batch, "context": context}
    result["device"] = torch.cuda.get_device_name()
    result["wall_us_a_step"] = 1e6 * (time.perf_counter() - start) / steps
    result |= profiled(engine, steps)
    engine.abort_request([str(number) for number in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    Path(out).write_text(json.dumps(result, indent=1))
    print(json.dumps({name: value for name, value in result.items() if name != "kernels_us_a_step"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "backend", "out"):
        parser.add_argument(name)
    for name, default in (("batch", 64), ("context", 1024), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--options", action="append", default=[])
    options = parser.parse_args()
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    engine = VllmEngine(options.model, options.backend, **engine_options(options.options)).engine.llm_engine
    profile_decode(engine, vocab_size, options.backend, options.out, options.batch, options.context, options.steps)


if __name__ == "__main__":
    main()
