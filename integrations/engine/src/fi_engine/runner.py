"""Runs steps of a model: device memory of the caches, plans, staged inputs, the forward pass and the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import fi_core as fi
import numpy as np
import numpy.typing as npt
import torch
from fi_core import AttentionSpec, Batch, KVCache, Plan, SharedPrefixes
from fi_sampling import Pipeline, SampleResult, SamplingState
from fi_scheduler.graphs import GraphRunner, Inputs
from fi_scheduler.requests import SharedLevel
from torch import Tensor

from .buffers import StepBlock
from .config import EngineConfig
from .model import Model
from .prefixes import SharedPlans

_MAX_GRAPH_SETS = 8


@dataclass(frozen=True)
class Sizes:
    """Capacities of a runner; ``num_pages`` pages of ``page_size`` tokens."""

    max_batch: int
    max_step_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int

    @property
    def table_entries(self) -> int:
        """Pages of the longest request."""
        return -(-self.max_model_len // self.page_size)


@dataclass(frozen=True)
class StepInput:
    """A step's B requests, in the order of their tokens.

    ``tokens`` int [T]; int [B] each: ``slots`` (whose page table and sampling parameters), ``starts`` (position of the
    first token) and ``counts`` (tokens); bool [B] ``draws``: whether the last token's logits give the next token. ``levels``
    are the prefixes to read once.
    """

    tokens: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    draws: npt.NDArray[np.bool_]
    levels: Sequence[SharedLevel] = ()

    @cached_property
    def is_decode(self) -> bool:
        """Whether every request has one new token, and draws."""
        return bool((self.counts == 1).all() and self.draws.all())


def page_bytes(model: Model, page_size: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    config = model.config
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * model.dtype.itemsize


class Runner:
    """One model on one device, its KV pages, and the sampling parameters of its slots; not thread-safe.

    A step is staged (one copy to the device), then runs: with ``cuda_graphs`` decode steps go through GraphRunner, padded
    to a bucket and on a GPU replayed as one CUDA graph from the lengths to the drawn tokens; others run directly. Steps that
    read shared prefixes once have plans and graphs of their own (``prefixes``), so that the others pay nothing for it.
    """

    def __init__(self, model: Model, sizes: Sizes, config: EngineConfig, pipeline: Pipeline | None = None) -> None:
        self.model = model
        self.sizes = sizes
        shape_of, device = model.config, model.device
        shape = (sizes.num_pages, sizes.page_size, shape_of.num_kv_heads, shape_of.head_dim)
        memory = torch.zeros((shape_of.num_layers, 2, *shape), dtype=model.dtype, device=device)
        self.caches = [KVCache(keys, values) for keys, values in memory]
        self.spec = AttentionSpec(
            shape_of.num_qo_heads,
            shape_of.num_kv_heads,
            shape_of.head_dim,
            dtype=model.dtype,
            page_size=sizes.page_size,
        )
        self.mixed_plan = self._plan(sizes.max_step_tokens, min(sizes.max_step_tokens, sizes.max_model_len))
        self.decode_plan = self._plan(sizes.max_batch, 1)
        self.prefixes = SharedPlans.beside(self.decode_plan, self.mixed_plan, config)
        self.sampling = SamplingState(
            sizes.max_batch, shape_of.vocab_size, device=device, eos_token_ids=shape_of.eos_ids, pipeline=pipeline
        )
        self._use_graphs = config.cuda_graphs
        # By the signature of the sampling state and whether prefixes are shared, the one used last at the end.
        self._graphs: dict[tuple[frozenset[str], int, bool], GraphRunner[SampleResult]] = {}
        batch, entries = sizes.max_batch, sizes.table_entries
        columns = {
            "tokens": (torch.int32, sizes.max_step_tokens),
            "q_indptr": (torch.int32, batch + 1),
            "kv_lens": (torch.int32, batch),
            "table_row": (torch.int32, batch),
            "rows": (torch.int32, batch),
            "slots": (torch.int64, batch),
            "positions": (torch.int64, batch),
            "nodes": (torch.int32, 4 * self.prefixes.max_nodes),
        }
        self._block = StepBlock(columns, device)
        self._levels = SharedPrefixes(self._block.device["nodes"].view(-1, 4))
        self._tables = StepBlock({"table": (torch.int32, batch * entries)}, device)
        self._host_table = self._tables.host["table"].reshape(batch, entries)
        self._table = self._tables.device["table"].view(batch, entries)
        self._table_changed = False
        self._drawn = torch.zeros(batch, dtype=torch.int64, pin_memory=device.type == "cuda")

    def _plan(self, max_q_tokens: int, max_q_len: int) -> Plan:
        sizes = self.sizes
        return fi.plan(
            self.spec,
            max_batch=sizes.max_batch,
            max_q_tokens=max_q_tokens,
            max_q_len=max_q_len,
            max_kv_len=sizes.max_model_len,
            device=self.model.device,
        )

    def set_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Write ``pages`` to the front of a slot's page table; the next step sees them."""
        self._tables.wait()
        self._host_table[slot, : len(pages)] = pages
        self._table_changed = True

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) in every layer; the pairs may be done in any order."""
        sources, destinations = torch.tensor(pairs, dtype=torch.int64).T.contiguous().to(self.model.device)
        for cache in self.caches:
            fi.copy_pages(cache, cache, sources, destinations)

    def stage(self, step: StepInput, padded_to: int) -> None:
        """Bring the inputs of ``step`` to the device, followed by empty requests up to ``padded_to``."""
        self._block.wait()
        host, num = self._block.host, len(step.counts)
        ends = np.cumsum(step.counts)
        host["tokens"][: len(step.tokens)] = step.tokens
        host["q_indptr"][1 : num + 1] = ends
        host["q_indptr"][num + 1 : padded_to + 1] = len(step.tokens)
        kv_lens = step.starts + step.counts
        host["kv_lens"][:num] = kv_lens
        host["kv_lens"][num:padded_to] = 0
        host["table_row"][:num] = step.slots
        num_draws = int(step.draws.sum())
        host["rows"][:num_draws] = (ends - 1)[step.draws]
        host["slots"][:num_draws] = step.slots[step.draws]
        host["slots"][num_draws:padded_to] = -1
        host["positions"][:num_draws] = kv_lens[step.draws]
        nodes = host["nodes"].reshape(-1, 4)
        nodes[: len(step.levels)] = np.array(step.levels, dtype=np.int32).reshape(-1, 4)
        nodes[len(step.levels) :] = 0
        self._block.push()
        if self._table_changed:
            self._tables.push()
            self._table_changed = False

    def logits(self, step: StepInput) -> Tensor:
        """Logits [num_draws, vocab] of a staged step, run directly."""
        num, num_draws = len(step.counts), int(step.draws.sum())
        inputs = self._inputs(num)
        plan, shared = self._plan_for(step)
        batch = self._batch(inputs, shared)
        plan.update(batch)
        columns = self._block.device
        tokens, rows = columns["tokens"][: len(step.tokens)], columns["rows"][:num_draws]
        return self.model.forward(tokens, batch, self.caches, plan, rows)

    def run(self, step: StepInput) -> SampleResult | None:
        """Run ``step`` and draw; None if nothing draws. Results stay valid until the next run."""
        if step.is_decode and self._use_graphs:
            runner = self._graph_runner(self._plan_for(step)[1])
            num = len(step.counts)
            return runner.run(num, lambda inputs, size: self.stage(step, runner.bucket_for(size)))
        self.stage(step, len(step.counts))
        logits = self.logits(step)
        if not len(logits):
            return None
        inputs = self._inputs(len(logits))
        return self._draw(logits, inputs["slots"], inputs["positions"])

    def fetch(self, result: SampleResult, num: int) -> list[int]:
        """The first ``num`` tokens on the host; waits for the step."""
        self._drawn[:num].copy_(result.tokens[:num], non_blocking=True)
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        found: list[int] = self._drawn[:num].tolist()
        return found

    def _plan_for(self, step: StepInput) -> tuple[Plan, bool]:
        """The plan of a step, and whether it is one that reads shared prefixes once."""
        plain, shared = (
            (self.decode_plan, self.prefixes.decode) if step.is_decode else (self.mixed_plan, self.prefixes.mixed)
        )
        return (plain, False) if shared is None or not step.levels else (shared, True)

    def _graph_runner(self, shared: bool) -> GraphRunner[SampleResult]:
        """The graphs of what the sampling state is to run now. Only the last few are kept: each set takes memory, and
        requests could ask for any number of combinations."""
        key = *self.sampling.signature, shared
        runner = self._graphs.pop(key, None)
        if runner is None:
            runner = GraphRunner(partial(self._decode, shared=shared), self._buckets(), self._empty_inputs)
        self._graphs[key] = runner
        if len(self._graphs) > _MAX_GRAPH_SETS:
            del self._graphs[next(iter(self._graphs))]
        return runner

    def _buckets(self) -> list[int]:
        """Batch sizes of decode steps: on a CPU all, as padding costs time and nothing is captured."""
        largest = self.sizes.max_batch
        if self.model.device.type == "cpu":
            return list(range(1, largest + 1))
        return sorted({largest, *(size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest)})

    def _inputs(self, num: int) -> dict[str, Tensor]:
        """Views of the staged columns for ``num`` requests."""
        columns = self._block.device
        named = {name: columns[name][:num] for name in ("tokens", "kv_lens", "table_row", "slots", "positions")}
        return {**named, "q_indptr": columns["q_indptr"][: num + 1]}

    def _empty_inputs(self, bucket: int) -> dict[str, Tensor]:
        """The inputs of a bucket, staged as empty requests: warming up must write neither pages nor histories."""
        nothing = np.zeros(0, dtype=np.int64)
        self.stage(StepInput(nothing, nothing, nothing, nothing, nothing.astype(bool)), bucket)
        return self._inputs(bucket)

    def _batch(self, inputs: Inputs, shared: bool) -> Batch:
        levels = self._levels if shared else None
        return Batch(inputs["q_indptr"], inputs["kv_lens"], self._table, inputs["table_row"], levels=levels)

    def _decode(self, inputs: Inputs, shared: bool) -> SampleResult:
        """A whole decode step from staged inputs: what a graph holds."""
        batch = self._batch(inputs, shared)
        plan = self.prefixes.decode if shared else self.decode_plan
        assert plan is not None, "only steps that it serves are shared"
        plan.update(batch)
        logits = self.model.forward(inputs["tokens"], batch, self.caches, plan, None)
        return self._draw(logits, inputs["slots"], inputs["positions"])

    def _draw(self, logits: Tensor, slots: Tensor, positions: Tensor) -> SampleResult:
        result = self.sampling.sample(logits, slots, positions)
        self.sampling.record(slots, result.tokens)
        return result
