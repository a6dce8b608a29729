"""vLLM and SGLang behind one small interface: greedy tokens, and log-probabilities of given or of generated tokens."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Tokens = list[int]
Latency = tuple[float, float]
"""Seconds from a request's arrival to its first token, and seconds for each further one."""

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine(Protocol):
    """An engine that is started with one model and one attention backend."""

    def generate(self, prompts: list[Tokens], num_new: int | list[int], **sampling: float) -> list[Tokens]:
        """Greedy tokens, or drawn ones with ``sampling`` (temperature, top_k, top_p, as both engines call them); ``num_new`` of
        each prompt, or its own number for each."""
        ...

    def serve(self, requests: list[tuple[Tokens, int]], arrivals: list[float]) -> list[Latency]:
        """Greedy answers to prompts, each with its number of new tokens; ``arrivals`` are seconds after the start, ascending."""
        ...

    def prompt_logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        """Of every token of each prompt but the first: what a prefill computes."""
        ...

    def decode_logprobs(self, prompts: list[Tokens], forced: list[Tokens]) -> tuple[list[Tokens], list[list[float]]]:
        """(tokens after each prompt, their log-probabilities, each computed by a decode step): ``forced`` ones, or as many
        of the engine's own greedy ones where it cannot be made to emit given tokens."""
        ...

    def greedy(self, prompts: list[Tokens], num_new: int) -> tuple[list[Tokens], list[list[float]]]:
        """(greedy tokens after each prompt, how far above the second best token's each one's log-probability is)."""
        ...

    def gaps(self, prompts: list[Tokens], answers: list[Tokens]) -> list[list[float]]:
        """Of every token of each answer: how far its log-probability is below that of the best token there (0: it is the
        best), computed from prompt and answer as one prompt."""
        ...

    def forget(self) -> None:
        """Empty the prefix cache."""
        ...

    def close(self) -> None: ...


def open_engine(name: str, folder: str, backend: str, **options: Any) -> Engine:
    """Start "vllm" or "sglang"; ``options`` are the engine's own and win over what is set here."""
    return VllmEngine(folder, backend, **options) if name == "vllm" else SglangEngine(folder, backend, **options)


class VllmEngine:
    def __init__(self, folder: str, backend: str, **options: Any) -> None:
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from forced_tokens import ForcedTokens
        from vllm import LLM

        settings: dict[str, Any] = {
            "model": folder,
            "skip_tokenizer_init": True,
            "attention_backend": backend,
            "dtype": "bfloat16",
            "seed": 0,
            "async_scheduling": False,  # forced tokens are read by their number, which then is always up to date
            "logits_processors": [ForcedTokens],
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        }
        self.engine = LLM(**{**settings, **options})

    def _run(self, prompts: list[Tokens], params: list[Any]) -> list[Any]:
        return self.engine.generate([{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False)

    def _params(self, **values: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**({"temperature": 0.0, "ignore_eos": True, "detokenize": False} | values))

    def generate(self, prompts: list[Tokens], num_new: int | list[int], **sampling: float) -> list[Tokens]:
        nums = [num_new] * len(prompts) if isinstance(num_new, int) else num_new
        params = [self._params(max_tokens=num, **sampling) for num in nums]
        return [list(out.outputs[0].token_ids) for out in self._run(prompts, params)]

    def serve(self, requests: list[tuple[Tokens, int]], arrivals: list[float]) -> list[Latency]:
        inner, clocks = self.engine.llm_engine, [_Clock(num) for _, num in requests]
        waiting, start = deque(range(len(requests))), time.perf_counter()
        while waiting or inner.has_unfinished_requests():
            while waiting and start + arrivals[waiting[0]] <= time.perf_counter():
                number = waiting.popleft()
                clocks[number].start = start + arrivals[number]
                prompt, num = requests[number]
                inner.add_request(f"{start}-{number}", {"prompt_token_ids": prompt}, self._params(max_tokens=num))
            if not inner.has_unfinished_requests():
                time.sleep(max(0.0, start + arrivals[waiting[0]] - time.perf_counter()))
                continue
            for output in inner.step():
                if output.outputs[0].token_ids:
                    clocks[int(output.request_id.rsplit("-", 1)[1])].tick()
        return [clock.latency() for clock in clocks]

    def prompt_logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        found = self._run(prompts, [self._params(max_tokens=1, prompt_logprobs=0)] * len(prompts))
        return [_chosen(out.prompt_logprobs[1:], prompt[1:]) for out, prompt in zip(found, prompts, strict=True)]

    def decode_logprobs(self, prompts: list[Tokens], forced: list[Tokens]) -> tuple[list[Tokens], list[list[float]]]:
        params = [self._params(max_tokens=len(each), logprobs=0, extra_args={"forced_tokens": each}) for each in forced]
        found = self._run(prompts, params)
        return forced, [_chosen(out.outputs[0].logprobs, each) for out, each in zip(found, forced, strict=True)]

    def greedy(self, prompts: list[Tokens], num_new: int) -> tuple[list[Tokens], list[list[float]]]:
        found = [
            out.outputs[0] for out in self._run(prompts, [self._params(max_tokens=num_new, logprobs=2)] * len(prompts))
        ]
        values = [[[each.logprob for each in position.values()] for position in out.logprobs] for out in found]
        return [list(out.token_ids) for out in found], [[_margin(each) for each in positions] for positions in values]

    def gaps(self, prompts: list[Tokens], answers: list[Tokens]) -> list[list[float]]:
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        found = self._run(whole, [self._params(max_tokens=1, prompt_logprobs=1)] * len(whole))
        return [
            [
                max(each.logprob for each in position.values()) - position[token].logprob
                for position, token in zip(out.prompt_logprobs[-len(answer) :], answer, strict=True)
            ]
            for out, answer in zip(found, answers, strict=True)
        ]

    def forget(self) -> None:
        until(self.engine.reset_prefix_cache, EMPTIED)

    def close(self) -> None:
        del self.engine


EMPTIED = "an empty prefix cache; requests are still running"
"""An engine that answers before its last step ended still holds that step's pages."""


def until(succeeds: Callable[[], bool], what: str, patience: float = 10.0) -> None:
    """Call it until it does; TimeoutError where ``what`` has not come after ``patience`` seconds."""
    last = time.monotonic() + patience
    while not succeeds():
        if time.monotonic() > last:
            raise TimeoutError(f"waited {patience} s for {what}")
        time.sleep(0.05)


class _Clock:
    """When a request of ``num_new`` tokens got its first and its last."""

    def __init__(self, num_new: int) -> None:
        self.num_new, self.start, self.first, self.last = num_new, 0.0, 0.0, 0.0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def latency(self) -> Latency:
        return self.first - self.start, (self.last - self.first) / max(1, self.num_new - 1)


def _chosen(positions: Any, tokens: Tokens) -> list[float]:
    return [position[token].logprob for position, token in zip(positions, tokens, strict=True)]


def _margin(logprobs: list[float]) -> float:
    """How far the best of them is above the second."""
    best, second = sorted(logprobs, reverse=True)[:2]
    return best - second


class SglangEngine:
    def __init__(self, folder: str, backend: str, **options: Any) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import sglang

        settings: dict[str, Any] = {
            "model_path": folder,
            "skip_tokenizer_init": True,
            "attention_backend": backend,
            "sampling_backend": "fi" if backend == "fi" else "pytorch",
            "dtype": "bfloat16",
            "random_seed": 0,
            "grammar_backend": "none",
            "log_level": "warning",
            "host": "127.0.0.1",
            "disable_hybrid_swa_memory": True,
        }
        self.engine = sglang.Engine(**{**settings, **options})

    def _run(
        self, prompts: list[Tokens], num_new: int | list[int], sampling: dict[str, float] | None = None, **more: Any
    ) -> list[Any]:
        nums = [num_new] * len(prompts) if isinstance(num_new, int) else num_new
        drawn = sampling or {"temperature": 0.0}
        params = [{"max_new_tokens": num, "ignore_eos": True, **drawn} for num in nums]
        return self.engine.generate(input_ids=prompts, sampling_params=params, **more)

    def generate(self, prompts: list[Tokens], num_new: int | list[int], **sampling: float) -> list[Tokens]:
        return [out["output_ids"] for out in self._run(prompts, num_new, sampling)]

    def serve(self, requests: list[tuple[Tokens, int]], arrivals: list[float]) -> list[Latency]:
        inner, clocks, start = self.engine, [_Clock(num) for _, num in requests], time.perf_counter()

        async def one(number: int) -> None:
            clock, (prompt, num) = clocks[number], requests[number]
            clock.start = start + arrivals[number]
            await asyncio.sleep(clock.start - time.perf_counter())
            params = {"temperature": 0.0, "max_new_tokens": num, "ignore_eos": True}
            async for _ in await inner.async_generate(input_ids=prompt, sampling_params=params, stream=True):
                clock.tick()

        async def everything() -> None:
            await asyncio.gather(*(one(number) for number in range(len(requests))))

        inner.loop.run_until_complete(everything())
        return [clock.latency() for clock in clocks]

    def prompt_logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        found = self._run(prompts, 1, return_logprob=True, logprob_start_len=0)
        return [[item[0] for item in out["meta_info"]["input_token_logprobs"][1:]] for out in found]

    def decode_logprobs(self, prompts: list[Tokens], forced: list[Tokens]) -> tuple[list[Tokens], list[list[float]]]:
        """Of its own greedy tokens: SGLang cannot report what forced tokens had been before."""
        nums = [len(each) for each in forced]
        found = self._run(prompts, nums, return_logprob=True, logprob_start_len=-1)
        values = [[item[0] for item in out["meta_info"]["output_token_logprobs"]] for out in found]
        return [out["output_ids"] for out in found], values

    def greedy(self, prompts: list[Tokens], num_new: int) -> tuple[list[Tokens], list[list[float]]]:
        found = self._run(prompts, num_new, return_logprob=True, logprob_start_len=-1, top_logprobs_num=2)
        values = [[[item[0] for item in best] for best in out["meta_info"]["output_top_logprobs"]] for out in found]
        return [out["output_ids"] for out in found], [[_margin(each) for each in positions] for positions in values]

    def gaps(self, prompts: list[Tokens], answers: list[Tokens]) -> list[list[float]]:
        """From its own continuations, a few requests at a time: where one chooses another token than the answer, both
        log-probabilities tell the gap, and the rest is asked for from behind that token."""
        lists: list[list[float]] = [[] for _ in answers]
        while open_rows := [row for row, answer in enumerate(answers) if len(lists[row]) < len(answer)][:8]:
            starts = [prompts[row] + answers[row][: len(lists[row])] for row in open_rows]
            nums = [len(answers[row]) - len(lists[row]) for row in open_rows]
            found = self._run(starts, nums, return_logprob=True, logprob_start_len=-1, top_logprobs_num=8)
            for row, out in zip(open_rows, found, strict=True):
                wanted = answers[row][len(lists[row]) :]
                lists[row] += gaps_of(wanted, out["output_ids"], out["meta_info"]["output_top_logprobs"])
        return lists

    def forget(self) -> None:
        until(lambda: self.engine.flush_cache().success, EMPTIED)

    def close(self) -> None:
        self.engine.shutdown()


def gaps_of(wanted: Tokens, chosen: Tokens, best: list[list[tuple[float, int, Any]]]) -> list[float]:
    """0 for every token that was chosen as ``wanted``, up to the first that was not: its gap to the chosen one, by the best
    tokens there as (log-probability, token, text); infinite where it is not among them."""
    same = next((i for i, (a, b) in enumerate(zip(wanted, chosen, strict=True)) if a != b), None)
    if same is None:
        return [0.0] * len(wanted)
    values = {item[1]: item[0] for item in best[same]}
    return [0.0] * same + [values[chosen[same]] - values.get(wanted[same], float("-inf"))]


def engine_options(texts: list[str]) -> dict[str, Any]:
    """Options of an engine from JSON objects, as scripts take them; a later one wins."""
    options: dict[str, Any] = {}
    for text in texts:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"options are a JSON object, got {text}")
        options |= found
    return options
