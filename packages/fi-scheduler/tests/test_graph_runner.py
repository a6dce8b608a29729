"""Bucket choice and padding on the CPU; capture and replay on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fi_core.errors import ArgumentError, CapacityError
from fi_scheduler.graphs import GraphCaptureError, GraphRunner, Inputs


def make_inputs(device: str) -> Callable[[int], Inputs]:
    def make(bucket: int) -> Inputs:
        return {
            "x": torch.zeros(bucket, device=device),
            "kv_lens": torch.zeros(bucket, dtype=torch.int32, device=device),
            "slots": torch.full((bucket,), -1, dtype=torch.int64, device=device),
        }

    return make


def fill_with(value: float) -> Callable[[Inputs, int], None]:
    def fill(inputs: Inputs, batch_size: int) -> None:
        inputs["x"].fill_(float("nan"))
        inputs["x"][:batch_size] = value
        inputs["kv_lens"][:batch_size] = 7
        inputs["kv_lens"][batch_size:] = 0
        inputs["slots"][:batch_size] = 3
        inputs["slots"][batch_size:] = -1

    return fill


def step(inputs: Inputs) -> torch.Tensor:
    """Real rows doubled, padding rows 0."""
    return torch.where(inputs["slots"] >= 0, inputs["x"] * 2 + inputs["kv_lens"], 0.0)


@pytest.mark.parametrize(("batch_size", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16)])
def test_smallest_bucket_and_padding(batch_size: int, bucket: int) -> None:
    shapes = []

    def recording(inputs: Inputs) -> torch.Tensor:
        shapes.append({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        return step(inputs)

    runner = GraphRunner(recording, (1, 4, 16), make_inputs("cpu"))
    assert runner.bucket_for(batch_size) == bucket
    result = runner.run(batch_size, fill_with(1.5))
    assert shapes == [{"x": (bucket,), "kv_lens": (bucket,), "slots": (bucket,)}]
    assert result.tolist() == [10.0] * batch_size + [0.0] * (bucket - batch_size)


def test_buffers_are_made_once_and_a_smaller_batch_leaves_no_rows_behind() -> None:
    made = []

    def make(bucket: int) -> Inputs:
        made.append(bucket)
        return make_inputs("cpu")(bucket)

    runner = GraphRunner(step, (4, 8), make)
    assert runner.run(4, fill_with(1.0)).tolist() == [9.0] * 4
    assert runner.run(2, fill_with(2.0)).tolist() == [11.0, 11.0, 0.0, 0.0]
    assert made == [4]
    runner.capture()
    assert made == [4, 8]


def test_describe_says_what_a_cpu_does() -> None:
    runner = GraphRunner(step, (2, 4), make_inputs("cpu"))
    runner.run(1, fill_with(1.0))
    assert runner.describe() == "buckets {2: run directly, no CUDA graph on a CPU, 4: not used yet}"


def test_bad_arguments_are_named() -> None:
    for buckets in ((), (0, 1), (4, 2), (2, 2), (1.5, 2)):
        with pytest.raises(ArgumentError, match="buckets"):
            GraphRunner(step, buckets, make_inputs("cpu"))
    runner = GraphRunner(step, (2, 4), make_inputs("cpu"))
    with pytest.raises(CapacityError, match=r"batch_size: expected at most 4 \(the largest bucket\), got 5"):
        runner.run(5, fill_with(1.0))
    with pytest.raises(ArgumentError, match="batch_size"):
        runner.run(0, fill_with(1.0))
    with pytest.raises(ArgumentError, match="make_inputs: expected buffers on a cuda or cpu device, got meta"):
        GraphRunner(step, (2,), make_inputs("meta")).run(1, fill_with(1.0))
    mixed = GraphRunner(step, (2,), lambda bucket: {"a": torch.zeros(1), "b": torch.zeros(1, device="meta")})
    with pytest.raises(ArgumentError, match="one device"):
        mixed.capture()


def test_buffers_cannot_be_replaced() -> None:
    def replacing(inputs: Inputs, batch_size: int) -> None:
        inputs["x"] = torch.ones(batch_size)

    with pytest.raises(TypeError, match="item assignment"):
        GraphRunner(step, (2,), make_inputs("cpu")).run(1, replacing)


@pytest.mark.gpu
def test_replay_equals_eager_on_a_gpu() -> None:
    calls = []

    def counted(inputs: Inputs) -> torch.Tensor:
        calls.append(inputs["x"].shape[0])
        return step(inputs)

    runner = GraphRunner(counted, (1, 4, 16), make_inputs("cuda"))
    runner.capture()
    captured = len(calls)
    assert calls[0] == 16 and set(calls) == {1, 4, 16}
    for batch_size in (3, 16, 1, 4, 9):
        result = runner.run(batch_size, fill_with(float(batch_size)))
        padding = runner.bucket_for(batch_size) - batch_size
        assert result.tolist() == [2.0 * batch_size + 7] * batch_size + [0.0] * padding
    assert len(calls) == captured
    assert runner.describe() == "buckets {1: CUDA graph, 4: CUDA graph, 16: CUDA graph}"


@pytest.mark.gpu
def test_capture_errors_name_the_bucket() -> None:
    def synchronising(inputs: Inputs) -> torch.Tensor:
        return inputs["x"] * inputs["x"].sum().item()

    runner = GraphRunner(synchronising, (2, 4), make_inputs("cuda"))
    with pytest.raises(GraphCaptureError, match="bucket 4") as caught:
        runner.run(3, fill_with(1.0))
    assert caught.value.bucket == 4 and caught.value.__cause__ is not None
    torch.cuda.synchronize()
    assert GraphRunner(step, (2,), make_inputs("cuda")).run(1, fill_with(1.0)).tolist() == [9.0, 0.0]
