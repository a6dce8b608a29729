"""Inter-token latency of many samples of many prompts, with shared prefixes read once and without.

``python benchmarks/bench_sharing.py [--short] [--out FILE] [--plot FILE]``: a random-weight Llama-3.1-8B serves 64 requests
with a common system prompt of 8192 tokens and 128 of their own, n samples each, and 64 separate prompts of 1k to 8k tokens with
4 samples each. All samples decode at once; the figure is the median time of a step, which gives each of them a token.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fi_benchmarks.results import circumstances
from fi_core.settings import settings
from fi_engine import Engine, EngineConfig
from fi_engine.model import Model
from fi_engine.random_model import SHAPES, random_model
from fi_sampling import SamplingParams
from fi_scheduler.sharing import SharingRates
from fit_sharing import measured_rates

PAGE = 16
NUM_PROMPTS = 64
COMMON, OWN = 8192, 128
WARM_STEPS = 4


@dataclass(frozen=True)
class Workload:
    """``num_samples`` of each of ``num_prompts``; ``kind`` says which prompts."""

    kind: str
    num_samples: int
    num_prompts: int = NUM_PROMPTS

    def __str__(self) -> str:
        return f"{self.num_prompts} {self.kind} prompts, n={self.num_samples}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)

        def tokens(count: int) -> list[int]:
            return torch.randint(0, vocab_size, (count,), generator=generator).tolist()

        if self.kind == "common":
            common = tokens(COMMON)
            return [common + tokens(OWN) for _ in range(self.num_prompts)]
        lengths = torch.linspace(1024, 8192, self.num_prompts).int().tolist()
        return [tokens(length) for length in lengths]


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a step: median, 10th and 90th percentile; ``levels`` the last step shared; ``tokens`` the first of each
    sample, to compare."""

    ms: float
    p10: float
    p90: float
    levels: int
    tokens: list[list[int]]


def measure(model: Model, workload: Workload, num_steps: int, shared: bool, rates: SharingRates | None) -> Measured:
    """Prefill everything, then time ``num_steps`` decode steps of all samples."""
    prompts = workload.prompts(model.config.vocab_size)
    count = workload.num_prompts
    batch = count * workload.num_samples
    # Samples branch off while later prompts are still read, so they have room for as many tokens as there are steps till then.
    step_tokens = max(4096, 2 * batch)
    distinct = COMMON + count * OWN if workload.kind == "common" else sum(map(len, prompts))
    new = distinct // (step_tokens - batch) + count + 2 * (WARM_STEPS + num_steps)
    longest = max(map(len, prompts)) + new + 1
    pages = distinct // PAGE + count + batch * (new // PAGE + 3)
    config = EngineConfig(batch, step_tokens, longest, PAGE, pages, shared_prefixes=shared, sharing_rates=rates)
    engine = Engine(model, None, config)
    # Nearly greedy, so that draws are the same unless rounding tips one: logits of random weights lie close together.
    params = SamplingParams(temperature=0.01, seed=3, n=workload.num_samples, max_tokens=new, ignore_eos=True)
    handles = [handle for prompt in prompts for handle in engine.submit_samples(prompt, params)]
    while not all(handle.token_ids for handle in handles):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    times = []
    for _ in range(num_steps):
        begun = time.perf_counter()
        engine.step()  # ends with its tokens on the host
        times.append((time.perf_counter() - begun) * 1e3)
    assert engine.stats.num_preemptions == 0 and not any(handle.finished for handle in handles)
    chosen = engine._planner.sharing
    levels = 0 if chosen is None else len(chosen.levels)
    tokens = [handle.token_ids[:WARM_STEPS] for handle in handles]
    for line in engine.explain_sharing()[:6]:
        print(f"    {line[:150]}")
    p10, median, p90 = (statistics.quantiles(times, n=10)[idx] for idx in (0, 4, 8))
    return Measured(median, p10, p90, levels, tokens)


def compare(model: Model, workload: Workload, num_steps: int, rates: SharingRates | None) -> dict[str, Any]:
    """One workload, without and with sharing."""
    found = {}
    for shared in (False, True):
        found[shared] = measure(model, workload, num_steps, shared, rates)
        gc.collect()
        torch.cuda.empty_cache()
    apart, once = found[False], found[True]
    equal = statistics.mean(a == b for a, b in zip(apart.tokens, once.tokens, strict=True))
    row = {"case": str(workload), "prompts": workload.kind, "num_prompts": workload.num_prompts}
    row |= {"num_samples": workload.num_samples, "equal_samples": equal, "levels": once.levels}
    for name, measured in (("apart", apart), ("once", once)):
        row |= {f"{name}_ms": measured.ms, f"{name}_p10": measured.p10, f"{name}_p90": measured.p90}
    row["saved"] = 1 - once.ms / apart.ms
    print(
        f"{workload} {apart.ms:8.2f} ms apart, {once.ms:8.2f} ms once: "
        f"{row['saved']:6.1%} less, {once.levels} levels, {equal:.0%} of the samples begin alike",
        flush=True,
    )
    return row


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency by number of samples, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    common = [row for row in rows if row["prompts"] == "common"]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, label in (("apart", "each for itself"), ("once", "shared prefixes read once")):
        axes.plot(
            [row["num_samples"] for row in common], [row[f"{name}_ms"] for row in common], marker="o", label=label
        )
    axes.set(xlabel="samples a request (64 requests, 8192 common tokens)", ylabel="inter-token latency, ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xticks([row["num_samples"] for row in common], [str(row["num_samples"]) for row in common])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="n = 1 and 4, 16 separate prompts, few steps")
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--rates", type=Path, help="rates that fit_sharing.py wrote (default: those of the engine)")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of samples")
    parser.add_argument(
        "--kinds", nargs="+", default=["common", "separate"], choices=["common", "separate"], help="of prompts"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--fit", action="store_true", help="measure the rates of FI_BACKEND first")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--plot", type=Path, help="where the plot goes (needs matplotlib)")
    parser.add_argument("--rows", type=Path, help="plot the rows of this file, and measure nothing")
    parser.add_argument("--commit", help="the commit that is measured (default: git is asked)")
    options = parser.parse_args()
    if options.rows is not None:
        if options.plot is None:
            parser.error("--rows needs --plot")
        plot(json.loads(options.rows.read_text()), options.plot)
        return
    config, device = SHAPES[options.model], torch.device("cuda", torch.cuda.current_device())
    rates = None if options.rates is None else SharingRates.from_file(options.rates)
    if options.fit:
        rates = measured_rates(settings().backend)
        print(rates)
    model = random_model(config, device, torch.bfloat16, 16384, lambda line: None)
    numbers, num_steps = ([1, 4], 10) if options.short else (options.samples, options.steps)
    workloads = [Workload("common", count) for count in numbers]
    workloads.insert(len(workloads) - 1, Workload("separate", 4, 16 if options.short else NUM_PROMPTS))
    workloads = [workload for workload in workloads if workload.kind in options.kinds]
    rows, shared = [], circumstances(device, {}, options.commit)
    for workload in workloads:
        rows.append(
            {"op": "engine_sharing", "model": options.model, **compare(model, workload, num_steps, rates), **shared}
        )
        if options.out is not None:
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
