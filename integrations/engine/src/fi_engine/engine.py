"""The engine: requests in, streamed answers out, one batched step of the model at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fi_core.errors import ArgumentError, CapacityError, FiError
from fi_sampling import Pipeline, SampleResult, SamplingParams, SamplingState, StopChecker
from fi_scheduler.hookspecs import plugin_manager
from fi_scheduler.pages import PagePool
from fi_scheduler.requests import PlannerConfig, StepEntry, StepPlan
from fi_scheduler.steps import StepPlanner

from .checkpoint import Progress, open_checkpoint
from .config import EngineConfig
from .errors import RequestError, StepError
from .model import Model, load_model
from .placement import default_pages, device_of
from .prefixes import MAX_DEPTH
from .request import Chunk, RequestHandle, RequestOutput, TokenLogprobs
from .runner import Runner, Sizes, StepInput
from .slots import SlotHolders
from .stats import EngineStats
from .tokenizer import Message, TextCodec, TextStream

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

_LogprobRows = tuple[list[float], list[list[int]], list[list[float]]]

_LONGEST_DEFAULT = 8192


class Engine:
    """Serves one model: ``submit`` requests and call ``step`` until they are done, or let ``generate`` and ``stream`` do
    both. Not thread-safe.

    Greedy answers do not depend on how requests are batched, chunked, preempted or share prefixes, up to the rounding of
    floating sums; sampled ones depend on the seed alone, in the same sense.
    """

    def __init__(
        self,
        model: Model,
        codec: TextCodec | None,
        config: EngineConfig | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        """``codec``: None if the model has no tokeniser. ``pipeline``: logits to tokens, with operations of one's own
        (None: the built-in operations); where decode steps are CUDA graphs it must not synchronise with the host."""
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
            config.num_pages or default_pages(model, config, self.max_model_len),
        )
        self._pool = PagePool(sizes.num_pages, sizes.page_size)
        self._runner = Runner(model, sizes, config, pipeline)
        hooks = plugin_manager()
        hooks.register(self.stats, "fi-engine-stats")
        limits = PlannerConfig(
            max_tokens_per_step=config.max_step_tokens,
            max_batch=config.max_batch,
            prefill_chunk=config.max_step_tokens,
            prefix_cache="radix" if config.prefix_cache else "none",
            wait_for_shared_prefix=config.prefix_cache,
            sharing=self._runner.prefixes.costs,
            max_prefix_depth=MAX_DEPTH,
        )
        self._planner = StepPlanner(self._pool, limits, hooks)
        self._trial = SamplingState(1, model.config.vocab_size, eos_token_ids=model.config.eos_ids)
        self._holders = SlotHolders(config.max_batch)
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
        pipeline: Pipeline | None = None,
        progress: Progress = lambda line: None,
    ) -> Engine:
        """An engine for a .gguf file or a safetensors folder; raises ModelFileError naming what is wrong with it.

        ``device``: CUDA where there is one, else the CPU. ``dtype``: bfloat16 on CUDA, float32 on a CPU. ``progress``
        receives a line for each part of the loading. Raises ArgumentError for a device that is not there.
        """
        where = device_of(device)
        chosen = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        config = EngineConfig() if config is None else config
        checkpoint = open_checkpoint(path, progress)
        longest = config.max_model_len or _LONGEST_DEFAULT
        model = load_model(checkpoint, where, chosen, min(longest, checkpoint.config.max_position), progress)
        progress("ready")
        return cls(model, checkpoint.codec, config, pipeline)

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
        return self._submit(prompt, params, [sample], priority)[0]

    def submit_samples(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> list[RequestHandle]:
        """Queue all ``params.n`` samples of a prompt, which is computed once: they branch off where it ends, and share its
        pages until they write to them. All draw with one seed, each by its number. Raises what ``submit`` raises."""
        params = SamplingParams() if params is None else params
        return self._submit(prompt, params, range(params.n), priority)

    def _submit(
        self, prompt: Prompt, params: SamplingParams, samples: Sequence[int], priority: int
    ) -> list[RequestHandle]:
        ids = self.encode(prompt)
        params = self._checked(ids, params, samples[0])
        assert params.max_tokens is not None, "filled in by _checked"
        handles = []
        for request_id, sample in enumerate(samples, self._num_submitted):
            checker = StopChecker(params, self.model.config.eos_ids)
            stream = None if self.codec is None else TextStream(self.codec)
            handles.append(RequestHandle(request_id, tuple(ids), params, sample, checker, stream))
        first, *others = (str(handle.request_id) for handle in handles)
        self._planner.submit(first, ids, params.max_tokens, priority, samples=others)
        self._handles.update((handle.request_id, handle) for handle in handles)
        self._num_submitted += len(handles)
        return handles

    def fork(self, handle: RequestHandle, *, seed: int | None = None, token: int | None = None) -> RequestHandle:
        """A second request that goes on from where ``handle`` stands, between steps. It begins with its tokens and text,
        and shares its pages: a page is copied when one of the two writes to it. ``seed``: what the fork draws with from
        here on (None: a random one); where nothing is random both go the same way. ``token`` stands in the fork in the place
        of the last token that was drawn (None: that token).

        Raises ArgumentError for a finished request, one of another engine, and a token that cannot stand there or would end
        the fork.
        """
        self._check_own(handle)
        if handle.finished:
            raise ArgumentError("handle", "a request that is not finished", f"request {handle.request_id}")
        params = replace(handle.params, seed=seed)
        params = replace(params, seed=self._tried(handle.prompt_ids, params, handle.sample))
        child = handle.fork(self._num_submitted, params)
        if token is not None:
            self._put_last(child, token)
        self._planner.fork(str(handle.request_id), str(child.request_id), token)
        self._handles[child.request_id] = child
        self._num_submitted += 1
        return child

    def _put_last(self, handle: RequestHandle, token: int) -> None:
        """Replace the last token of a new fork."""
        if not handle.token_ids or not 0 <= token < self.model.config.vocab_size:
            raise ArgumentError("token", "one of the vocabulary, after a token was drawn", token)
        handle.replace_last(token)
        if handle.finished:
            raise ArgumentError("token", "one that does not end the fork", token)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises ArgumentError."""
        if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, Mapping)):
            raise ArgumentError("prompt", "text, token ids or the messages of a chat", type(prompt).__name__)
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
        room = self.max_model_len - len(ids)
        seed = self._tried(ids, params, sample)
        return replace(params, seed=seed, max_tokens=min(params.max_tokens or room, room))

    def _tried(self, ids: Sequence[int], params: SamplingParams, sample: int) -> int:
        """The request's seed, from a state of its own: nothing is refused once the request has a place in a batch."""
        seed = self._trial.add(0, params, ids, sample=sample)
        self._trial.remove(0)
        return seed

    def _check_own(self, handle: RequestHandle) -> None:
        if not handle.finished and self._handles.get(handle.request_id) is not handle:
            raise ArgumentError("handle", "a request of this engine", f"request {handle.request_id} of another")

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Run one step; returns a chunk of each request that it drew for, or that failed in it: none when a step only
        read prompts, and none when there is nothing to do."""
        plan = self._planner.plan()
        if plan is None:
            return []
        try:
            return self._run(plan)
        except FiError as error:
            # A plugin's logits operation, a check or a capture: these requests end, those that wait go on.
            return self._drop(plan, error)
        except BaseException as error:
            # Also an interrupt: the caller may go on with the requests that are left.
            self._drop(plan, StepError(plan.step_idx, error))
            raise

    def _run(self, plan: StepPlan) -> list[Chunk]:
        self._place(plan)
        for pairs in plan.copy_rounds():
            self._runner.copy_pages(pairs)
        drawing = [entry for entry in plan.entries if entry.samples]
        result = self._runner.run(self._step_input(plan))
        tokens = [] if result is None else self._runner.fetch(result, len(drawing))
        logprobs = None if result is None else _rows(result)
        chunks = [self._take(entry, tokens[row], logprobs, row) for row, entry in enumerate(drawing)]
        drawn = {
            entry.request_id: token
            for entry, token, chunk in zip(drawing, tokens, chunks, strict=True)
            if chunk.finish_reason in (None, "length")
        }
        self._planner.commit(plan, drawn)
        return chunks

    def _drop(self, plan: StepPlan, error: FiError) -> list[Chunk]:
        """End all requests of a step that failed, save those that had their last token."""
        handles = [self._handles.get(int(entry.request_id)) for entry in plan.entries]
        self._planner.drop(plan)
        return [self._fail(handle, error) for handle in handles if handle is not None]

    def _place(self, plan: StepPlan) -> None:
        """Give every request of the step a slot; those that sit it out lose theirs if need be."""
        holders = self._holders
        missing = [entry for entry in plan.entries if int(entry.request_id) not in holders.slot_of]
        if len(missing) > holders.num_free:
            present = {int(entry.request_id) for entry in plan.entries}
            absent = [request_id for request_id in holders.slot_of if request_id not in present]
            for request_id in absent[: len(missing) - holders.num_free]:
                self._release(request_id)
        for entry in missing:
            handle = self._handles[int(entry.request_id)]
            if not handle.started:
                handle.started, handle.num_cached_tokens = True, entry.start
            ids, made = handle.prompt_ids, handle.token_ids
            self._runner.sampling.add(holders.next_free, handle.params, ids, sample=handle.sample, output_ids=made)
            holders.take(handle.request_id)

    def _step_input(self, plan: StepPlan) -> StepInput:
        """Columns of the step; page tables that changed are written on the way."""
        holders, entries = self._holders, plan.entries
        slots = [holders.slot_of[int(entry.request_id)] for entry in entries]
        for slot, entry in zip(slots, entries, strict=True):
            held = holders.pages.get(slot)
            if held is not entry.pages and held != entry.pages:
                holders.pages[slot] = entry.pages
                self._runner.set_pages(slot, entry.pages)
        step = StepInput(
            np.array([token for entry in entries for token in entry.tokens]),
            np.array(slots),
            np.array([entry.start for entry in entries]),
            np.array([len(entry.tokens) for entry in entries]),
            np.array([entry.samples for entry in entries]),
            plan.levels,
        )
        self.stats.num_decode_steps += step.is_decode
        return step

    def _take(self, entry: StepEntry, token: int, logprobs: _LogprobRows | None, row: int) -> Chunk:
        """Give a request its drawn token."""
        handle = self._handles[int(entry.request_id)]
        if token < 0:
            problem = f"the logits at position {entry.start + len(entry.tokens) - 1} are NaN or have no finite value"
            self._planner.abort(entry.request_id)
            return self._fail(handle, RequestError(handle.request_id, problem))
        if handle.params.logprobs is not None and logprobs is not None:
            chosen, indices, values = logprobs
            wanted = slice(handle.params.logprobs)
            tops = zip(indices[row][wanted], values[row][wanted], strict=True)
            handle.logprobs.append(TokenLogprobs(chosen[row], tuple(tops)))
        text = handle.take(token)
        if handle.finish_reason is not None:
            if handle.finish_reason != "length":
                self._planner.abort(entry.request_id)
            self._forget(handle)
        return Chunk(handle, text, (token,), handle.finish_reason)

    def _fail(self, handle: RequestHandle, error: FiError) -> Chunk:
        """End a request that the planner has ended."""
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
        self._check_own(handle)
        if not handle.finished:
            self._planner.abort(str(handle.request_id))
            self._forget(handle)
            handle.end("abort")

    def stream(self, handles: Sequence[RequestHandle]) -> Iterator[Chunk]:
        """Step until ``handles`` are finished, yielding their chunks as they come; others advance as well. Raises
        ArgumentError for a handle of another engine."""
        for handle in handles:
            self._check_own(handle)
        wanted = set(map(id, handles))
        while not all(handle.finished for handle in handles):
            for chunk in self.step():
                if id(chunk.request) in wanted:
                    yield chunk

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[RequestOutput]:
        """Run all prompts at once; a RequestOutput of each, in their order, which has ``params.n`` samples. A prompt that is
        refused gives an output with ``error`` set and does not hold up the others. If a step raises, or is interrupted, none
        of them goes on."""
        if isinstance(prompts, str):
            raise ArgumentError("prompts", "a sequence of prompts", "one string")
        params = SamplingParams() if params is None else params
        groups = [self._submit_or_fail(prompt, params) for prompt in prompts]
        handles = [handle for group in groups for handle in group]
        try:
            for _ in self.stream(handles):
                pass
        finally:
            for handle in handles:
                self.abort(handle)
        return [RequestOutput.of(group) for group in groups]

    def _submit_or_fail(self, prompt: Prompt, params: SamplingParams) -> list[RequestHandle]:
        try:
            return self.submit_samples(prompt, params)
        except FiError as error:
            handle = RequestHandle(self._num_submitted, (), params, 0, StopChecker(params), None)
            self._num_submitted += 1
            handle.end("error", error)
            return [handle]

    def explain_sharing(self) -> list[str]:
        """Lines on shared prefixes: what serves them or why nothing does, and what the last step chose of them."""
        chosen = self._planner.sharing
        return [*self._runner.prefixes.explain(), *([] if chosen is None else chosen.explain())]

    def check_integrity(self) -> None:
        """Raise PoolIntegrityError unless every page belongs to exactly those that should hold it."""
        self._planner.check_integrity()


def _rows(result: SampleResult) -> _LogprobRows | None:
    """The log-probabilities of a step on the host: one transfer a column, however many requests want them."""
    found = result.logprobs
    return None if found is None else (found.chosen.tolist(), found.indices.tolist(), found.values.tolist())
