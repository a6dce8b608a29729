"""The engine: requests in, streamed answers out, one batched step of the model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from fi_core.errors import ArgumentError, CapacityError, FiError
from fi_sampling import SampleResult, SamplingParams, SamplingState, StopChecker
from fi_scheduler.hookspecs import hookimpl, plugin_manager
from fi_scheduler.pages import PagePool
from fi_scheduler.requests import PlannerConfig, StepEntry, StepPlan, StepStats
from fi_scheduler.steps import StepPlanner

from .checkpoint import Progress, open_checkpoint
from .config import EngineConfig
from .errors import RequestError
from .model import Model, load_model
from .request import Chunk, RequestHandle, RequestOutput, TokenLogprobs
from .runner import Runner, Sizes, StepInput, page_bytes
from .tokenizer import Message, TextCodec, TextStream

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

_LONGEST_DEFAULT = 8192
_CPU_CACHE_BYTES = 512 << 20


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_decode_steps: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @hookimpl
    def fi_on_batch(self, plan: StepPlan, stats: StepStats) -> None:
        self.num_steps += 1
        self.num_preemptions += stats.num_preempted
        self.num_cached_tokens += stats.num_cached_tokens


class _SlotHolders:
    """Which request holds which slot. A slot is a place for what the device must know of a request: losing it costs a
    request nothing but writing it anew, so slots of requests that sit a step out are taken when none is free."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))[::-1]
        self.slot_of: dict[int, int] = {}
        self.pages: dict[int, tuple[int, ...]] = {}

    def release(self, request_id: int) -> int | None:
        """Free the request's slot; returns it, or None if it holds none."""
        slot = self.slot_of.pop(request_id, None)
        if slot is not None:
            self.pages.pop(slot, None)
            self._free.append(slot)
        return slot

    def take(self, request_id: int) -> int:
        slot = self._free.pop()
        self.slot_of[request_id] = slot
        return slot

    @property
    def num_free(self) -> int:
        return len(self._free)


class Engine:
    """Serves one model: ``submit`` requests and call ``step`` until they are done, or let ``generate`` and ``stream`` do
    both. Not thread-safe.

    Greedy answers do not depend on how requests are batched, chunked, preempted or share prefixes, up to the rounding of
    floating sums; sampled ones depend on the seed alone, in the same sense.
    """

    def __init__(self, model: Model, codec: TextCodec | None, config: EngineConfig | None = None) -> None:
        config = EngineConfig() if config is None else config
        longest = min(model.config.max_position, model.rope.cos_sin.shape[0] if model.rope.cos_sin is not None else 0)
        self.max_model_len = config.max_model_len or min(longest, _LONGEST_DEFAULT)
        if self.max_model_len > longest:
            raise ArgumentError("config.max_model_len", f"at most the model's {longest} positions", self.max_model_len)
        self.model = model
        self.codec = codec
        self.config = config
        self.stats = EngineStats()
        sizes = Sizes(
            config.max_batch,
            config.max_step_tokens,
            self.max_model_len,
            config.page_size,
            config.num_pages or _default_pages(model, config, self.max_model_len),
        )
        self._pool = PagePool(sizes.num_pages, sizes.page_size)
        hooks = plugin_manager()
        hooks.register(self.stats, "fi-engine-stats")
        limits = PlannerConfig(
            max_tokens_per_step=config.max_step_tokens,
            max_batch=config.max_batch,
            prefill_chunk=config.max_step_tokens,
            prefix_cache="radix" if config.prefix_cache else "none",
            wait_for_shared_prefix=config.prefix_cache,
        )
        self._planner = StepPlanner(self._pool, limits, hooks)
        self._runner = Runner(model, sizes, config.cuda_graphs)
        self._trial = SamplingState(1, model.config.vocab_size, eos_token_ids=model.config.eos_ids)
        self._holders = _SlotHolders(config.max_batch)
        self._handles: dict[int, RequestHandle] = {}
        self._num_submitted = 0

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        progress: Progress = lambda line: None,
    ) -> Engine:
        """An engine for a .gguf file or a safetensors folder; raises ModelFileError naming what is wrong with it.

        ``device``: CUDA where there is one, else the CPU. ``dtype``: bfloat16 on CUDA, float32 on a CPU. ``progress``
        receives a line for each part of the loading.
        """
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        chosen = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        config = EngineConfig() if config is None else config
        checkpoint = open_checkpoint(path, progress)
        longest = config.max_model_len or _LONGEST_DEFAULT
        model = load_model(checkpoint, where, chosen, min(longest, checkpoint.config.max_position), progress)
        progress("ready")
        return cls(model, checkpoint.codec, config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._handles)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, sample: int = 0
    ) -> RequestHandle:
        """Queue a request; it runs in the steps to come, higher ``priority`` first. ``sample`` says which of the
        prompt's ``params.n`` samples it is (they draw differently). ``params.max_tokens`` is cut to what the model's
        length leaves.

        Raises ArgumentError naming what is wrong with the prompt or the parameters, CapacityError for a prompt beyond
        ``max_model_len`` or a request that the whole page pool could not hold. Nothing is queued then.
        """
        params = SamplingParams() if params is None else params
        ids = self.encode(prompt)
        params = self._checked(ids, params, sample)
        checker = StopChecker(params, self.model.config.eos_ids)
        stream = None if self.codec is None else TextStream(self.codec)
        handle = RequestHandle(self._num_submitted, tuple(ids), params, sample, checker, stream)
        assert params.max_tokens is not None, "filled in by _checked"
        self._planner.submit(str(handle.request_id), ids, params.max_tokens, priority)
        self._handles[handle.request_id] = handle
        self._num_submitted += 1
        return handle

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises ArgumentError."""
        if not isinstance(prompt, str) and all(isinstance(item, (int, np.integer)) for item in prompt):
            return [int(item) for item in prompt]  # type: ignore[arg-type]
        if self.codec is None:
            raise ArgumentError("prompt", "token ids, as the model has no tokenizer.json", type(prompt).__name__)
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        return self.codec.encode_chat(prompt)  # type: ignore[arg-type]

    def _checked(self, ids: Sequence[int], params: SamplingParams, sample: int) -> SamplingParams:
        """``params`` with its seed and the most tokens there is room for; raises what ``submit`` raises."""
        if not ids:
            raise ArgumentError("prompt", "at least one token", "none")
        if len(ids) >= self.max_model_len:
            expected = f"at most {self.max_model_len - 1} tokens (max_model_len, less one to generate)"
            raise CapacityError("prompt", expected, f"{len(ids)} tokens")
        if params.stop and self.codec is None:
            raise ArgumentError("params.stop", "none, as the model has no tokeniser", params.stop)
        # A trial on a state of its own, so that nothing is refused once the request has a place in a batch.
        seed = self._trial.add(0, params, ids, sample=sample)
        self._trial.remove(0)
        room = self.max_model_len - len(ids)
        return replace(params, seed=seed, max_tokens=min(params.max_tokens or room, room))

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Run one step; returns a chunk of each request that it drew for, or that failed in it: none when a step only
        read prompts, and none when there is nothing to do."""
        plan = self._planner.plan()
        if plan is None:
            return []
        assert not plan.copies, "the engine forks no request"
        self._place(plan)
        drawing = [entry for entry in plan.entries if entry.samples]
        try:
            result = self._run(plan.entries)
        except FiError as error:
            # A plugin's logits operation, a check or a capture: these requests end, those that wait go on.
            failed = [self._fail(self._handles[int(entry.request_id)], error) for entry in plan.entries]
            self._planner.commit(plan, {})
            return failed
        tokens = [] if result is None else self._runner.fetch(result, len(drawing))
        chunks = [self._take(entry, row, tokens[row], result) for row, entry in enumerate(drawing)]
        drawn = {
            entry.request_id: token
            for entry, token, chunk in zip(drawing, tokens, chunks, strict=True)
            if chunk.finish_reason in (None, "length")
        }
        self._planner.commit(plan, drawn)
        return chunks

    def _place(self, plan: StepPlan) -> None:
        """Give every request of the step a slot; those that sit it out lose theirs if need be."""
        present = {int(entry.request_id) for entry in plan.entries}
        missing = [entry for entry in plan.entries if int(entry.request_id) not in self._holders.slot_of]
        absent = [request_id for request_id in self._holders.slot_of if request_id not in present]
        for request_id in absent[: max(0, len(missing) - self._holders.num_free)]:
            self._release(request_id)
        for entry in missing:
            handle = self._handles[int(entry.request_id)]
            slot = self._holders.take(handle.request_id)
            if not handle.token_ids:
                handle.num_cached_tokens = max(handle.num_cached_tokens, entry.start)
            ids, made = handle.prompt_ids, handle.token_ids
            self._runner.sampling.add(slot, handle.params, ids, sample=handle.sample, output_ids=made)

    def _run(self, entries: Sequence[StepEntry]) -> SampleResult | None:
        holders = self._holders
        slots = [holders.slot_of[int(entry.request_id)] for entry in entries]
        for slot, entry in zip(slots, entries, strict=True):
            if holders.pages.get(slot) != entry.pages:
                holders.pages[slot] = entry.pages
                self._runner.set_pages(slot, entry.pages)
        step = StepInput(
            np.array([token for entry in entries for token in entry.tokens]),
            np.array(slots),
            np.array([entry.start for entry in entries]),
            np.array([len(entry.tokens) for entry in entries]),
            np.array([entry.samples for entry in entries]),
        )
        self.stats.num_decode_steps += step.is_decode
        wanted = (self._handles[request_id].params.logprobs for request_id in holders.slot_of)
        return self._runner.run(step, max((number or 0 for number in wanted), default=0))

    def _take(self, entry: StepEntry, row: int, token: int, result: SampleResult | None) -> Chunk:
        """Give a request its drawn token."""
        handle = self._handles[int(entry.request_id)]
        if token < 0:
            problem = f"the logits at position {entry.start + len(entry.tokens) - 1} are NaN or have no finite value"
            return self._fail(handle, RequestError(handle.request_id, problem))
        if handle.params.logprobs is not None and result is not None and result.logprobs is not None:
            found, wanted = result.logprobs, handle.params.logprobs
            tops = zip(found.indices[row, :wanted].tolist(), found.values[row, :wanted].tolist(), strict=True)
            handle.logprobs.append(TokenLogprobs(float(found.chosen[row]), tuple(tops)))
        text = handle.take(token)
        if handle.finish_reason is not None:
            if handle.finish_reason != "length":
                self._planner.abort(entry.request_id)
            self._forget(handle)
        return Chunk(handle, text, (token,), handle.finish_reason)

    def _fail(self, handle: RequestHandle, error: FiError) -> Chunk:
        self._planner.abort(str(handle.request_id))
        self._forget(handle)
        return Chunk(handle, handle.end("error", error), (), "error")

    def _forget(self, handle: RequestHandle) -> None:
        del self._handles[handle.request_id]
        self._release(handle.request_id)

    def _release(self, request_id: int) -> None:
        slot = self._holders.release(request_id)
        if slot is not None:
            self._runner.sampling.remove(slot)

    def abort(self, handle: RequestHandle) -> None:
        """End a request between steps, keeping what it generated; nothing happens to one that is finished."""
        if not handle.finished:
            if self._handles.get(handle.request_id) is not handle:
                raise ArgumentError("handle", "a request of this engine", f"request {handle.request_id} of another")
            self._planner.abort(str(handle.request_id))
            self._forget(handle)
            handle.end("abort")

    def stream(self, handles: Sequence[RequestHandle]) -> Iterator[Chunk]:
        """Step until ``handles`` are finished, yielding their chunks as they come; others advance as well."""
        wanted = set(map(id, handles))
        while not all(handle.finished for handle in handles):
            for chunk in self.step():
                if id(chunk.request) in wanted:
                    yield chunk

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[RequestOutput]:
        """Run all prompts at once; outputs in their order, ``params.n`` of each. A prompt that is refused gives an output
        with ``error`` set and does not hold up the others."""
        samples = range(1 if params is None else params.n)
        handles = [self._submit_or_fail(prompt, params, sample) for prompt in prompts for sample in samples]
        for _ in self.stream(handles):
            pass
        return [handle.output() for handle in handles]

    def _submit_or_fail(self, prompt: Prompt, params: SamplingParams | None, sample: int) -> RequestHandle:
        try:
            return self.submit(prompt, params, sample=sample)
        except FiError as error:
            params = SamplingParams() if params is None else params
            handle = RequestHandle(self._num_submitted, (), params, sample, StopChecker(params), None)
            self._num_submitted += 1
            handle.end("error", error)
            return handle

    def check_integrity(self) -> None:
        """Raise PoolIntegrityError unless every page belongs to exactly those that should hold it."""
        self._planner.check_integrity()


def _default_pages(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Pages for ``max_batch`` requests of full length, within the memory that may be taken."""
    full = config.max_batch * -(-max_model_len // config.page_size)
    limit = _CPU_CACHE_BYTES
    if model.device.type == "cuda":
        limit = torch.cuda.mem_get_info(model.device)[0] // 2
    return max(1, min(full, limit // page_bytes(model, config.page_size)))
