"""Device headers in small kernels of their own: every variant compiles without spills, and on a GPU equals plain Python."""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from fi_core.random import random_bits, scale_bits
from fi_core.sampling import DrawKeys
from fi_cuda.compile import compile_source
from fi_cuda.params import ParamsLayout
from fi_cuda.source import CompileTarget
from fi_cuda.spec import KernelSpec, kernel_for
from fi_cuda.toolchain import compile_cubin

pytestmark = pytest.mark.timeout(120)

FOLDERS = (Path(__file__).parent / "include", *KernelSpec.include_folders)
ELEMENTS = {"int": np.int32, "long long": np.int64, "unsigned long long": np.uint64, "float": np.float32}


def layout_of(pointers, outputs, **scalars):
    named = [(name, "pointer") for name in pointers.split()] + [(name, "output") for name in outputs.split()]
    return ParamsLayout((*named, *scalars.items()))


@dataclass(frozen=True)
class Probe(KernelSpec):
    """A kernel of these tests: the members of its Config are its fields, types as text."""

    threads: int

    include_folders: ClassVar = FOLDERS

    @property
    def num_threads(self):
        return self.threads

    def config_lines(self):
        lines = [f"static constexpr int kNumThreads = {self.threads};"]
        for item in dataclasses.fields(self):
            value, camel = getattr(self, item.name), "".join(word.capitalize() for word in item.name.split("_"))
            lines.append(
                f"using {camel} = {value};" if isinstance(value, str) else f"static constexpr int k{camel} = {value};"
            )
        return lines


@dataclass(frozen=True)
class Prefix(Probe):
    element: str
    group: int

    stem: ClassVar = "probe_prefix"
    layout: ClassVar = layout_of("values", "exclusive inclusive total")


@dataclass(frozen=True)
class Reduce(Probe):
    group: int

    stem: ClassVar = "probe_reduce"
    layout: ClassVar = layout_of("values numbers", "largest first_of_largest sums")


@dataclass(frozen=True)
class Random(Probe):
    stem: ClassVar = "probe_random"
    layout: ClassVar = layout_of("seeds positions samples totals", "hi lo targets", purpose="int32")


@dataclass(frozen=True)
class Softmax(Probe):
    score: str
    tile: str
    width: int = 3

    stem: ClassVar = "probe_softmax"
    layout: ClassVar = layout_of(
        "raw values mask sinks",
        "out lse",
        **dict.fromkeys(("q_len", "kv_len", "causal", "window", "only_new", "num_splits"), "int32"),
        **dict.fromkeys(("scale", "cap", "slope"), "float"),
    )


@dataclass(frozen=True)
class RingCopy(Probe):
    group_threads: int
    stages: int
    consumers: int
    producer_registers: int
    consumer_registers: int
    stage_bytes: int
    bulk_bytes: int

    stem: ClassVar = "probe_ring"
    layout: ClassVar = layout_of("source", "target errors", num_bytes="int64")

    @property
    def shared_bytes(self):
        return self.stages * (self.stage_bytes + 16) + 128

    @property
    def blocks_per_multiprocessor(self):
        return 1


def ring_copy(stages, consumers, stage_bytes, bulk_bytes, group_threads=128):
    registers = {1: (56, 256), 2: (24, 240), 3: (32, 160)}[consumers] if group_threads == 128 else (0, 0)
    threads = group_threads * (1 + consumers)
    return RingCopy(threads, group_threads, stages, consumers, *registers, stage_bytes, bulk_bytes)


PREFIXES = [Prefix(256, element, group) for element in ELEMENTS for group in (1, 8, 32, 64, 256)]
PREFIXES += [Prefix(1024, "long long", 1024), Prefix(1024, "float", 1024)]
REDUCES = [Reduce(threads, group) for threads, group in ((32, 1), (128, 4), (256, 32), (256, 64), (1024, 1024))]
SCORES = ("fi::PlainScore", "fi::ScaledScore", "fi::SoftCapScore", "fi::FastSoftCapScore")
SOFTMAXES = [Softmax(32, score, tile) for score in SCORES for tile in ("fi::RowTile", "fi::ColumnTile")]
BULK = [ring_copy(stages, 2, 2048, 2048) for stages in (1, 2, 3, 5, 8)]
RINGS = [*BULK, ring_copy(4, 1, 16, 16), ring_copy(3, 3, 8192, 8192), ring_copy(6, 2, 32768, 32768)]
RINGS += [ring_copy(stages, 2, 4096, bulk) for stages in (1, 2, 4) for bulk in (0, 1024)]
RINGS += [ring_copy(7, 1, 4096, 0), ring_copy(2, 3, 6144, 2048)]
RINGS += [ring_copy(stages, 5, 2048, bulk, 32) for stages in (1, 3) for bulk in (2048, 512, 0)]


@pytest.mark.parametrize(
    "specs",
    [PREFIXES[::4], [*REDUCES, Random(128)], SOFTMAXES, RINGS[::2]],
    ids=["prefix", "reduce", "softmax", "ring"],
)
def test_probes_compile_and_nothing_leaves_the_registers(specs):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda spec: compile_source(spec.source(), CompileTarget("sm_90a")), specs))
    for spec, artifact in zip(specs, made, strict=True):
        resources = artifact.resources
        assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0, spec


def test_compiler_moves_the_registers_between_the_roles():
    source = ring_copy(2, 2, 2048, 1024).source()
    made = compile_cubin(source.text, source.stem, CompileTarget("sm_90a"), source.include_folders)
    assert "setmaxnreg" not in made.report, made.report
    plain = source.text.replace(", 1)", ")")
    assert "setmaxnreg" in compile_cubin(plain, source.stem, CompileTarget("sm_90a"), source.include_folders).report


# On the GPU


def launch(spec, num_blocks, *values):
    device = torch.device("cuda", torch.cuda.current_device())
    pointers = [
        value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value for value in values
    ]
    kernel_for(spec, device).launch(device, num_blocks, 1, *pointers)
    torch.cuda.synchronize()


def numbers(element, count, seed):
    """Numbers of every size: integers wrap round, floats of both signs and many magnitudes."""
    generator = np.random.default_rng(seed)
    dtype = ELEMENTS[element]
    if dtype is np.float32:
        return (generator.standard_normal(count) * np.exp2(generator.uniform(-20, 20, count))).astype(np.float32)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", PREFIXES, ids=str)
def test_prefix_sums(spec):
    num_blocks = 7
    values = numbers(spec.element, num_blocks * spec.threads, 1)
    signed = values.view(np.int64) if values.dtype == np.uint64 else values
    given = torch.from_numpy(signed.copy()).cuda()
    runs = []
    for _ in range(2):
        outs = [torch.full_like(given, 77) for _ in range(3)]
        launch(spec, num_blocks, given, *outs)
        runs.append([out.cpu().numpy().view(values.dtype).reshape(-1, spec.group) for out in outs])
    for first, second in zip(*runs, strict=True):
        assert first.tobytes() == second.tobytes()
    exclusive, inclusive, total = runs[0]
    groups = values.reshape(-1, spec.group)
    if spec.element == "float":
        wide = groups.astype(np.float64)
        slack = np.abs(wide).cumsum(1) * 1e-6
        assert (np.abs(inclusive - wide.cumsum(1)) <= slack).all()
        assert (np.abs(exclusive - (wide.cumsum(1) - wide)) <= slack).all()
    else:
        assert (inclusive == groups.cumsum(1, dtype=values.dtype)).all()
    assert (exclusive[:, 0] == 0).all()
    assert exclusive[:, 1:].tobytes() == inclusive[:, :-1].tobytes()
    assert total.tobytes() == np.repeat(inclusive[:, -1:], spec.group, axis=1).tobytes()


def first_of_largest(row):
    """(largest, index of the first) of what threads have to offer, NaN above all; idx counts within the group."""
    best = (-math.inf, 0x7FFFFFFF)
    for idx, value in row:
        above = math.isnan(value) and not math.isnan(best[0])
        equal = value == best[0] or (math.isnan(value) and math.isnan(best[0]))
        if above or value > best[0] or (equal and idx < best[1]):
            best = (value, idx)
    return best


@pytest.mark.gpu
@pytest.mark.parametrize("spec", REDUCES, ids=str)
@pytest.mark.parametrize("kind", ["ties", "infinite", "nan", "plain"])
def test_largest_its_place_and_sums(spec, kind):
    num_blocks = 5
    count = num_blocks * spec.threads
    generator = np.random.default_rng(2)
    values = generator.standard_normal(count).astype(np.float32)
    if kind == "ties":
        values = generator.integers(-1, 2, count).astype(np.float32) * np.float32(0.0 if spec.group == 4 else 1.0)
    elif kind != "plain":
        chosen = generator.random(count) < 0.02
        special = np.array([np.inf, -np.inf] if kind == "infinite" else [np.nan, np.inf, -np.inf], dtype=np.float32)
        values[chosen] = generator.choice(special, chosen.sum())
    whole = numbers("long long", count, 3)
    given = [torch.from_numpy(array).cuda() for array in (values, whole)]
    outs = [
        torch.full_like(given[0], -7),
        torch.full((count,), -7, dtype=torch.int32, device="cuda"),
        torch.full_like(given[1], -7),
    ]
    launch(spec, num_blocks, *given, *outs)
    largest, place, sums = (out.cpu().numpy().reshape(-1, spec.group) for out in outs)
    groups = values.reshape(-1, spec.group)
    np.testing.assert_array_equal(largest, np.repeat(groups.max(1, keepdims=True), spec.group, axis=1))
    assert (sums == whole.reshape(-1, spec.group).sum(1, keepdims=True)).all()
    thread = np.arange(count) % spec.threads
    offered = (thread % 3 != 1).reshape(-1, spec.group)
    for row in range(groups.shape[0]):
        entries = [(idx, float(value)) for idx, value in enumerate(groups[row]) if offered[row, idx]]
        assert (place[row] == first_of_largest(entries)[1]).all(), row


@pytest.mark.gpu
@pytest.mark.parametrize("purpose", [0, 1, 2])
def test_random_bits_and_targets(purpose):
    seeds, positions, totals = (torch.from_numpy(numbers("long long", 5 * 128, seed)) for seed in (4, 5, 6))
    samples = torch.from_numpy(numbers("int", 5 * 128, 7))
    totals = totals >> 12 & 2**52 - 1
    outs = [torch.full_like(seeds, -1).cuda() for _ in range(3)]
    launch(Random(128), 5, *(tensor.cuda() for tensor in (seeds, positions, samples, totals)), *outs, purpose)
    bits = random_bits(DrawKeys(seeds, samples, positions), purpose)
    for found, expected in zip(outs, (*bits, scale_bits(bits, totals)), strict=True):
        assert torch.equal(found.cpu(), expected)


@dataclass(frozen=True)
class Case:
    q_len: int
    kv_len: int
    causal: bool = False
    window: int = -1
    columns: str = ""
    sinks: bool = False
    num_splits: int = 1
    size: float = 3.0


CASES = [
    Case(16, 1),
    Case(16, 32),
    Case(40, 200, causal=True),
    Case(40, 333, causal=True, window=17, num_splits=5),
    Case(33, 20, causal=True, sinks=True),
    Case(5, 100, window=30, sinks=True, num_splits=7),
    Case(20, 75, columns="kv", num_splits=3),
    Case(20, 75, causal=True, columns="new", sinks=True, num_splits=2),
    Case(16, 2000, num_splits=9, size=40.0),
    Case(17, 64, sinks=True, size=0.0),
]
SINKS = (-math.inf, -200.0, -1.0, 0.0, 2.5, 200.0)


def visible_keys(case, generator):
    """bool [q_len, kv_len] and the mask's bytes (or None)."""
    position = torch.arange(case.q_len)[:, None] + case.kv_len - case.q_len
    key = torch.arange(case.kv_len)[None, :]
    visible = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
    if case.causal:
        visible &= key <= position
    if case.window > 0:
        visible &= key > position - case.window
    if not case.columns:
        return visible, None
    num_columns = case.kv_len if case.columns == "kv" else case.q_len
    allowed = generator.random((case.q_len, num_columns)) < 0.5
    visible[:, case.kv_len - num_columns :] &= torch.from_numpy(allowed)
    return visible, torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little").copy())


def exact_softmax(spec, case, raw, values, sinks, visible):
    """(out, lse) in float64 from the definition, for scale, cap and slope of the test."""
    scale, cap, slope = scalars_of(spec)
    logits = raw.double() * scale
    if "Cap" in spec.score:
        logits = cap * torch.tanh(logits / cap)
    distance = torch.arange(case.kv_len)[None, :] - (torch.arange(case.q_len)[:, None] + case.kv_len - case.q_len)
    logits = (logits + slope * distance).masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[: case.q_len, None]], dim=1)
    lse = torch.logsumexp(logits, dim=1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[:, None])[:, : case.kv_len]
    return weights @ values.double(), lse


def scalars_of(spec):
    return (-0.4 if "Scaled" in spec.score else 0.25), 8.0, 0.03125


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SOFTMAXES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_online_softmax(spec, case):
    generator = np.random.default_rng(case.kv_len + case.q_len)
    num_blocks = -(-case.q_len // 16)
    visible, mask = visible_keys(case, generator)
    raw = torch.from_numpy((generator.standard_normal((16 * num_blocks, case.kv_len)) * case.size).astype(np.float32))
    values = torch.from_numpy(generator.standard_normal((case.kv_len, spec.width)).astype(np.float32))
    sinks = torch.tensor(SINKS).repeat(16 * num_blocks)[: 16 * num_blocks] if case.sinks else None
    out, lse = exact_softmax(spec, case, raw[: case.q_len], values, sinks, visible)
    # What a query may not see has no effect, whatever it is.
    raw[: case.q_len][~visible] = math.nan
    given = [None if tensor is None else tensor.cuda() for tensor in (raw, values, mask, sinks)]
    got_out = torch.full((16 * num_blocks, spec.width), math.nan, device="cuda")
    got_lse = torch.full((16 * num_blocks,), math.nan, device="cuda")
    whole_numbers = (case.q_len, case.kv_len, case.causal, case.window, case.columns == "new", case.num_splits)
    launch(spec, num_blocks, *given, got_out, got_lse, *whole_numbers, *scalars_of(spec))
    # The fast soft cap errs by 2^-11 of a logit of up to 8.
    error = 1e-2 if "Fast" in spec.score else 2e-5
    torch.testing.assert_close(got_lse[: case.q_len].cpu().double(), lse, rtol=error, atol=error)
    torch.testing.assert_close(got_out[: case.q_len].cpu().double(), out, rtol=error, atol=error)
    assert got_lse[case.q_len :].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SOFTMAXES[::4], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_scores_reach_the_result(spec, bad):
    raw = torch.zeros(16, 50, device="cuda")
    raw[3, 41] = bad
    values = torch.ones(50, spec.width, device="cuda")
    out, lse = torch.full((16, spec.width), 7.0, device="cuda"), torch.full((16,), 7.0, device="cuda")
    launch(spec, 1, raw, values, None, None, out, lse, 16, 50, 0, -1, 0, 2, *scalars_of(spec))
    # A soft cap makes an infinite logit finite.
    expected = 0 if "Cap" in spec.score and bad == math.inf else 1
    assert int(out.isnan().any(dim=1).sum()) == int((~lse.isfinite()).sum()) == expected
    assert bool(out[3].isnan().all()) == bool(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", RINGS, ids=str)
def test_ring_carries_every_byte(spec):
    for num_bytes, num_blocks in (
        (16, 1),
        (spec.stage_bytes, 3),
        (45 * spec.stage_bytes + 48, 2),
        (401 * spec.stage_bytes - 16, 5),
    ):
        source = torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
        target = torch.zeros(num_bytes + 64, dtype=torch.uint8, device="cuda")
        errors = torch.zeros(1, dtype=torch.int32, device="cuda")
        launch(spec, num_blocks, source, target, errors, num_bytes)
        assert torch.equal(target[:num_bytes], source), (num_bytes, num_blocks)
        assert not target[num_bytes:].any() and errors.item() == 0
