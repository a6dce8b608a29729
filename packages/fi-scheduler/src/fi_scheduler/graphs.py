"""CUDA-graph capture and replay of a step function, padded to a few batch sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from fi_core.errors import ArgumentError, CapacityError, FiError

Inputs = Mapping[str, torch.Tensor]
Result = TypeVar("Result")

_NUM_WARM_UPS = 2


class GraphCaptureError(FiError):
    """The step function could not be captured for ``bucket``; the cause is chained."""

    def __init__(self, bucket: int, cause: BaseException) -> None:
        self.bucket = bucket
        super().__init__(f"CUDA-graph capture for bucket {bucket} failed: {type(cause).__name__}: {cause}")


@dataclass(frozen=True)
class _Bucket(Generic[Result]):
    """Static buffers of one batch size, and on a GPU the graph that reads them and writes ``result``."""

    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None
    result: Result | None


class GraphRunner(Generic[Result]):
    """Runs ``step_fn`` at the smallest bucket that holds the batch: captured once per bucket and replayed, on a GPU.

    ``step_fn(inputs)`` reads the static buffers and returns tensors (in any structure) that stay at the same addresses;
    it must be legal inside a capture. ``make_inputs(bucket)`` makes the buffers of a bucket, all on one device, filled
    with values that ``step_fn`` can run on (padding rows will do). All graphs share one memory pool, so the result of
    a run is valid until the next run of any bucket. On a CPU there is nothing to capture: ``step_fn`` runs directly, on
    the same padded buffers; ``describe`` says so. Not thread-safe.
    """

    def __init__(
        self,
        step_fn: Callable[[Inputs], Result],
        buckets: Sequence[int],
        make_inputs: Callable[[int], Inputs],
    ) -> None:
        """``buckets``: the batch sizes to pad to, positive and ascending."""
        ascending = all(low < high for low, high in zip(buckets, buckets[1:], strict=False))
        if not buckets or not all(isinstance(size, int) for size in buckets) or buckets[0] < 1 or not ascending:
            raise ArgumentError("buckets", "positive ascending ints", list(buckets))
        self._step_fn = step_fn
        self._sizes = list(buckets)
        self._make_inputs = make_inputs
        self._buckets: dict[int, _Bucket[Result]] = {}
        self._memory_pool: Any = None  # torch names the type of a pool handle differently from release to release

    def bucket_for(self, batch_size: int) -> int:
        """The smallest bucket that holds ``batch_size`` rows; raises CapacityError beyond the largest."""
        if batch_size < 1:
            raise ArgumentError("batch_size", "a positive int", batch_size)
        if batch_size > self._sizes[-1]:
            raise CapacityError("batch_size", f"at most {self._sizes[-1]} (the largest bucket)", batch_size)
        return self._sizes[bisect_left(self._sizes, batch_size)]

    def capture(self) -> None:
        """Capture every bucket now, the largest first: the smaller ones then fit in the memory it took.

        Without this call a bucket is captured at its first run.
        """
        for size in reversed(self._sizes):
            self._bucket(size)

    def run(self, batch_size: int, fill: Callable[[Inputs, int], None]) -> Result:
        """Run a batch: ``fill(inputs, batch_size)`` writes the buffers, then the step runs on all rows of the bucket.

        ``fill`` writes real rows to [0, batch_size) and padding (kv_len 0, slot -1) to all rows after, as a
        bucket keeps what its last run left. It cannot replace a buffer (a TypeError). The result has the bucket's rows;
        those past ``batch_size`` are padding. On a GPU the run is enqueued on the current stream and not waited
        for.
        """
        bucket = self._bucket(self.bucket_for(batch_size))
        fill(bucket.inputs, batch_size)
        if bucket.graph is None:
            return self._step_fn(bucket.inputs)
        bucket.graph.replay()
        assert bucket.result is not None
        return bucket.result

    def describe(self) -> str:
        """One line for a person: how each bucket runs."""
        sizes = ", ".join(
            f"{size}: {'not used yet' if size not in self._buckets else self._mode(self._buckets[size])}"
            for size in self._sizes
        )
        return f"buckets {{{sizes}}}"

    @staticmethod
    def _mode(bucket: _Bucket[Result]) -> str:
        return "run directly, no CUDA graph on a CPU" if bucket.graph is None else "CUDA graph"

    def _bucket(self, size: int) -> _Bucket[Result]:
        if size not in self._buckets:
            # Read-only: a graph goes on reading the buffer it was captured with, whatever replaces it here.
            inputs = MappingProxyType(dict(self._make_inputs(size)))
            devices = {tensor.device for tensor in inputs.values()}
            if len(devices) != 1:
                raise ArgumentError("make_inputs", "buffers on one device", sorted(map(str, devices)))
            (device,) = devices
            if device.type == "cpu":
                self._buckets[size] = _Bucket(inputs, None, None)
            elif device.type == "cuda":
                self._buckets[size] = self._captured(size, inputs, device)
            else:
                raise ArgumentError("make_inputs", "buffers on a cuda or cpu device", device)
        return self._buckets[size]

    def _captured(self, size: int, inputs: Inputs, device: torch.device) -> _Bucket[Result]:
        """Warm up on a side stream (lazy initialisation must not be captured), then capture."""
        with torch.cuda.device(device):
            if self._memory_pool is None:
                self._memory_pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_NUM_WARM_UPS):
                        self._step_fn(inputs)
                torch.cuda.current_stream().wait_stream(stream)
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, pool=self._memory_pool, stream=stream):
                    result = self._step_fn(inputs)
            except RuntimeError as error:
                raise GraphCaptureError(size, error) from error
        return _Bucket(inputs, graph, result)
