"""What the device reaches in the same run: copies, streaming reads, a page-table read, a matmul, an empty graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fi_core.bench.timing import Clock, measure_in_turns
from fi_core.contract import Cost
from torch import Tensor

from .kernels import bulk_copy, stream_pages
from .problem import Maker, Outputs, generator_on

COPY_TORCH, COPY_BULK, READ_BULK, READ_PAGES = "copy-torch", "copy-bulk", "read-bulk", "floor-pages"
_STREAM_PAGE = 32768


def has_bulk_copies(device: torch.device) -> bool:
    """Whether our kernels, which use Hopper's copy engine, run on ``device``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def random_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes rounded up to 16]: never zeros, whose power and timing differ."""
    size = -(-num_bytes // 16) * 16
    return torch.randint(1, 256, (size,), dtype=torch.uint8, device=device, generator=generator_on(device))


def copies(cost: Cost, device: torch.device) -> dict[str, Maker]:
    """Calls that copy half of the cost's bytes: as many are read and written as the operation reads and writes."""

    def torch_copy() -> Outputs:
        target.copy_(source)
        return {}

    def bulk() -> Outputs:
        bulk_copy(source, target)
        return {}

    source = random_bytes(cost.num_bytes // 2, device)
    target = torch.empty_like(source)
    found: dict[str, Maker] = {COPY_TORCH: lambda: torch_copy}
    if has_bulk_copies(device):
        found[COPY_BULK] = lambda: bulk
    return found


def reads(data: Tensor) -> dict[str, Maker]:
    """A call that streams ``data`` (contiguous) into shared memory, in order."""
    if not has_bulk_copies(data.device):
        return {}
    flat = data.view(torch.uint8).flatten()
    half = flat.numel() // 32 * 16
    num_pages = -(-half // _STREAM_PAGE)
    pages = torch.arange(num_pages, dtype=torch.int32, device=data.device)
    valid = torch.full_like(pages, _STREAM_PAGE)
    valid[-1] = half - (num_pages - 1) * _STREAM_PAGE

    def call() -> Outputs:
        stream_pages(flat[:half], flat[half:], _STREAM_PAGE, pages, valid)
        return {}

    return {READ_BULK: lambda: call}


@dataclass(frozen=True)
class Rates:
    """Bytes a second of the best large copy and read, operations a second of a large matmul."""

    copy: float
    read: float
    matmul: float


@dataclass(frozen=True)
class Measured:
    """A ceiling's row: its case (named as in the peers' file), who reached it, microseconds, and its cost."""

    case: str
    impl: str
    us: float
    p10: float
    p90: float
    warm_us: float
    cost: Cost


@dataclass(frozen=True)
class Bench:
    """Where to measure, by which clock, and how many cold and warm samples of each call."""

    device: torch.device
    clock: Clock
    rounds: int


def measure_ceilings(bench: Bench) -> tuple[Rates, list[Measured]]:
    """The device's ceilings, and a row for everything that was tried."""
    device = bench.device
    num_bytes, size = (1 << 31, 8192) if device.type == "cuda" else (1 << 26, 512)
    copy_cost, read_cost = Cost(2 * num_bytes, 0), Cost(num_bytes, 0)
    copied = _measured(bench, f"ceiling copy {_size(num_bytes)}", copies(copy_cost, device), copy_cost)
    data = random_bytes(num_bytes, device)
    words = data.view(torch.int32)
    makers: dict[str, Maker] = {"torch-sum": lambda: lambda: {"sum": words.sum()}, **reads(data)}
    read = _measured(bench, f"ceiling read {_size(num_bytes)}", makers, read_cost)
    left, right = (
        torch.randn(size, size, device=device, generator=generator_on(device, seed)).bfloat16() for seed in (0, 1)
    )
    product, tiny = torch.empty_like(left), torch.ones(1, device=device)
    makers = {"cublas": lambda: lambda: {"out": torch.mm(left, right, out=product)}}
    matmul = _measured(bench, f"ceiling mm {size}", makers, Cost(6 * size * size, 2 * size**3))
    launch = _measured(bench, "ceiling launch", {"torch": lambda: lambda: {"out": tiny.neg_()}}, Cost(8, 1))
    best = [min(row.us for row in rows) for rows in (copied, read, matmul)]
    rates = Rates(2e6 * num_bytes / best[0], 1e6 * num_bytes / best[1], 2e6 * size**3 / best[2])
    return rates, [*copied, *read, *matmul, *launch]


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 30}GiB" if num_bytes >> 30 else f"{num_bytes >> 20}MiB"


def _measured(bench: Bench, case: str, makers: dict[str, Maker], cost: Cost) -> list[Measured]:
    timed = measure_in_turns([make() for make in makers.values()], bench.clock, bench.rounds)
    return [
        Measured(case, impl, times.cold.us, times.cold.p10, times.cold.p90, times.warm.us, cost)
        for impl, times in zip(makers, timed, strict=True)
    ]
