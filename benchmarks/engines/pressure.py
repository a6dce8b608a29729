"""One engine under more load than its cache holds, with requests that are aborted: no wrong token, no lost page.

usage: python pressure.py ENGINE MODEL_FOLDER BACKEND [--requests N] [--cache TOKENS] [--options JSON ...]
Requests share a cache that holds a fraction of them, so that the engine preempts some and computes them again; every seventh is
aborted on the way. Then each finished request is asked for again as one prompt: in it every token of its answer must be the most
likely one, or ``NEAR`` as likely (kernels round differently). Exit status 1 for a token that is not, for a request that did not
finish, a page that is still in use, or where nothing was preempted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import SglangEngine, Tokens, VllmEngine, engine_options, open_engine

NEAR = 0.25
"""Natural log of how much less likely than the best token a chosen one may be: a tie in bfloat16."""
ABORT_EVERY = 7


@dataclass
class Outcome:
    """``answers`` of the requests that finished, by number; ``preempted`` how often, ``pages_left`` what is in use then;
    ``accepted`` drafted tokens, where the engine speculates."""

    answers: dict[int, Tokens]
    preempted: int
    pages_left: float
    accepted: int


def requests_of(num: int, vocab_size: int) -> list[tuple[Tokens, int]]:
    import torch

    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(16, 257, (num, 2), generator=generator).tolist()
    return [
        (torch.randint(0, vocab_size, (prompt,), generator=generator).tolist(), answer // 2 + 32)
        for prompt, answer in lengths
    ]


def is_aborted(number: int) -> bool:
    return number % ABORT_EVERY == 3


def load_vllm(engine: VllmEngine, requests: list[tuple[Tokens, int]]) -> Outcome:
    from vllm import SamplingParams

    inner, answers, steps = engine.engine.llm_engine, {}, 0
    names = {}
    for number, (prompt, num) in enumerate(requests):
        params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num)
        names[number] = inner.add_request(str(number), {"prompt_token_ids": prompt}, params) or str(number)
    while inner.has_unfinished_requests():
        for output in inner.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        if steps % 10 == 0:  # a few at a time, running and waiting ones
            due = [number for number in names if is_aborted(number)][:2]
            inner.abort_request([str(number) for number in due])
            for number in due:
                del names[number]
    metrics = engine.engine.get_metrics()
    preempted, accepted = (
        sum(metric.value for metric in metrics if metric.name == f"vllm:{name}")
        for name in ("num_preemptions", "spec_decode_num_accepted_tokens")
    )
    left = inner.engine_core.engine_core.scheduler.kv_cache_manager.usage
    return Outcome(
        {number: tokens for number, tokens in answers.items() if not is_aborted(number)}, preempted, left, accepted
    )


def _name(number: int) -> str:
    return f"load{number:06}"


def load_sglang(engine: SglangEngine, requests: list[tuple[Tokens, int]]) -> Outcome:
    """SGLang itself raises at a page that is lost, whenever it is idle. It aborts every request whose name begins as the one
    asked for, so names have one length."""
    inner, answers, preempted, accepted = engine.engine, {}, 0, 0

    async def one(number: int, prompt: Tokens, num: int) -> None:
        nonlocal preempted, accepted
        params = {"temperature": 0.0, "max_new_tokens": num, "ignore_eos": True}
        output = await inner.async_generate(input_ids=prompt, sampling_params=params, rid=_name(number))
        preempted += output["meta_info"].get("num_retractions") or 0
        accepted += output["meta_info"].get("spec_num_correct_drafts") or 0
        if not is_aborted(number):
            answers[number] = output["output_ids"]

    async def abort() -> None:
        for number in filter(is_aborted, range(len(requests))):
            await asyncio.sleep(0.05)
            inner.tokenizer_manager.abort_request(_name(number))

    async def everything() -> None:
        tasks = (one(number, prompt, num) for number, (prompt, num) in enumerate(requests))
        await asyncio.gather(abort(), *tasks)

    inner.loop.run_until_complete(everything())
    return Outcome(answers, preempted, 0.0, accepted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("engine", "model", "backend"):
        parser.add_argument(name)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--cache", type=int, default=4096)
    parser.add_argument("--options", action="append", default=[])
    options = parser.parse_args()
    is_vllm = options.engine == "vllm"
    small = {"num_gpu_blocks_override": options.cache // 16, "disable_log_stats": False}
    # SGLang admits what it expects to have room for; so it expects short answers, and must retract.
    few = {"max_total_tokens": options.cache, "schedule_conservativeness": 0.1}
    limits: dict[str, Any] = small if is_vllm else few
    engine = open_engine(options.engine, options.model, options.backend, **(engine_options(options.options) | limits))
    requests = requests_of(
        options.requests, json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    )
    found = load_vllm(engine, requests) if is_vllm else load_sglang(engine, requests)
    missing = [number for number in range(len(requests)) if not is_aborted(number) and number not in found.answers]
    short = [number for number, tokens in found.answers.items() if len(tokens) != requests[number][1]]
    numbers = sorted(found.answers)
    gaps = engine.gaps([requests[number][0] for number in numbers], [found.answers[number] for number in numbers])
    wrong = {number: max(gap) for number, gap in zip(numbers, gaps, strict=True) if gap and max(gap) > NEAR}
    report = {
        "finished": len(numbers),
        "missing": missing,
        "short": short,
        "wrong": wrong,
        "largest_gap": max(max(gap, default=0.0) for gap in gaps),
        "tokens": sum(map(len, gaps)),
        "preempted": found.preempted,
        "pages_left": found.pages_left,
        "accepted": found.accepted,
    }
    print("pressure", json.dumps(report), flush=True)
    engine.close()
    sys.exit(bool(missing or short or wrong or found.pages_left or not found.preempted))


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
