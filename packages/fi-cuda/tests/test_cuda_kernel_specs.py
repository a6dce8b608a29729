"""What the host decides for a kernel: vector widths, how threads share the work, the packed struct, what is served."""

import ctypes
import importlib
import itertools
import struct
import subprocess
import sys

import pytest
import torch
from fi_core.contract import Target, check_entry
from fi_core.ops import OPERATIONS
from fi_core.records import Batch, KVCache
from fi_core.rope import RopeConfig, RopeTable, YarnScaling
from fi_cuda.entries import ENTRIES
from fi_cuda.kernels.append_kv import AppendKVSpec, AppendShape, num_units, spec_for
from fi_cuda.kernels.append_kv import append_kv as run_append_kv
from fi_cuda.kernels.copy_pages import CopyPagesSpec
from fi_cuda.kernels.gated_activation import GatedActivationSpec
from fi_cuda.kernels.merge_states import MergeStatesSpec
from fi_cuda.kernels.merge_states import merge_states as run_merge_states
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.kernels.rope import RopeSpec
from fi_cuda.kernels.rows import vector_bytes
from fi_cuda.params import KINDS, ParamsLayout
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import CompileError, compile_cubin

pytestmark = pytest.mark.timeout(120)

SPEC_CLASSES = (AppendKVSpec, CopyPagesSpec, GatedActivationSpec, MergeStatesSpec, RmsNormSpec, RopeSpec)
CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


def shape(**changes):
    plain = AppendShape(torch.bfloat16, "bf16", 128, 128, 16, "dense", 0, "none", False, 0, 8, 16, 16)
    return plain._replace(**changes)


# Vector widths


@pytest.mark.parametrize(
    ("dtype", "view", "width", "expected"),
    [
        (torch.bfloat16, lambda x: x, 64, 16),
        (torch.float32, lambda x: x, 64, 16),
        (torch.bfloat16, lambda x: x[:, :60], 60, 8),
        (torch.bfloat16, lambda x: x[:, :63], 63, 2),
        (torch.bfloat16, lambda x: x[:, 4:], 60, 8),
        (torch.bfloat16, lambda x: x[:, 1:33], 32, 2),
        (torch.float32, lambda x: x[:, 2:34], 32, 8),
        (torch.bfloat16, lambda x: x[:1, 2:34], 32, 4),
    ],
)
def test_vector_width_follows_base_strides_and_width(dtype, view, width, expected):
    tensor = view(torch.empty(4, 64, dtype=dtype))
    assert tensor.shape[-1] == width
    assert vector_bytes(tensor, multiple_of=width) == expected


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 8),
        ({"dtype": torch.float32, "kv_format": "fp32"}, 4),
        ({"kv_format": "fp8_e4m3"}, 8),
        ({"dtype": torch.float32, "kv_format": "fp8_e5m2"}, 4),
        ({"kv_format": "fp32"}, 4),  # a store is 16 bytes at most
        ({"kv_format": "fp8_e4m3", "stored_vector": 4}, 4),
        ({"vector": 2}, 1),
    ],
)
def test_elements_of_a_pack_fit_loads_and_stores(changes, count):
    assert spec_for(shape(**changes)).count == count


# How the threads of a token share its heads

HEADS = [(0, 1), (0, 8), (9, 3), (32, 8), (28, 4), (64, 8), (128, 1), (128, 128), (5, 200)]
DIMS = [(64, 64, 64), (128, 128, 128), (128, 128, 0), (192, 128, 64), (80, 80, 80), (512, 512, 2), (40, 24, 0)]


@pytest.mark.parametrize(("heads", "dims"), list(itertools.product(HEADS, DIMS)))
@pytest.mark.parametrize("vector", [2, 16])
@pytest.mark.parametrize("few_tokens", [False, True])
def test_every_pack_of_every_head_has_one_thread(heads, dims, vector, few_tokens):
    num_q_heads, num_kv_heads = heads
    head_dim, head_dim_vo, rotary_dim = dims
    if rotary_dim == 0:
        num_q_heads = 0
    count_fits = (rotary_dim // 2 | head_dim | head_dim_vo | (head_dim - rotary_dim)) * 2
    vector = min(vector, count_fits & -count_fits)
    spec = spec_for(
        shape(
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            rotary_dim=rotary_dim,
            pairs="half" if rotary_dim else "none",
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            vector=vector,
            few_tokens=few_tokens,
        )
    )
    assert spec.threads_per_token % 32 == 0
    assert spec.tokens_per_block * spec.threads_per_token == spec.num_threads <= 1024
    assert bool(spec.q_rounds) == bool(num_q_heads)
    assert not few_tokens or num_q_heads or max(spec.q_rounds, spec.k_rounds, spec.v_rounds) == 1
    slices = spec.num_slices(num_q_heads, num_kv_heads)
    for num_heads, dim, rotated, rounds in (
        (num_q_heads, head_dim, rotary_dim, spec.q_rounds),
        (num_kv_heads, head_dim, rotary_dim, spec.k_rounds),
        (num_kv_heads, head_dim_vo, 0, spec.v_rounds),
    ):
        lanes = spec.threads_per_token // num_units(dim, rotated, spec.count)
        assert lanes >= 1
        # As fi/kv/heads.cuh: head = (slice * rounds + round) * lanes + lane.
        served = [
            (part * rounds + turn) * lanes + lane
            for part in range(slices)
            for turn in range(rounds)
            for lane in range(lanes)
        ]
        assert sorted(head for head in served if head < num_heads) == list(range(num_heads))


def test_merge_has_a_thread_for_each_pack():
    spec = MergeStatesSpec(torch.bfloat16, 80, 16)
    assert [spec.num_blocks(rows) for rows in (0, 1, 12, 13, 128)] == [0, 1, 1, 2, 10]
    assert spec.num_blocks(2**31) == 2**31 * 10 // 128


# The packed struct


def struct_fields(layout):
    """(name, type code) of every value in order; "rows" gives two."""
    for name, kind in layout.fields:
        codes = KINDS[kind][1]
        yield from ((name, codes),) if len(codes) == 1 else ((f"{name}.outer", "q"), (f"{name}.inner", "q"))


def assertions(layout):
    codes = ""
    for name, code in struct_fields(layout):
        offset = struct.calcsize(f"@{codes}0{code}")
        # NVRTC has no offsetof; this is what the macro is made of.
        yield f'static_assert(__INTADDR__(&((Params*)0)->{name}) == {offset}, "{name}");'
        codes += code


def compile_lines(*lines):
    include = next(iter(AppendKVSpec.include_folders))
    text = ['#include "fi/tile/rows.cuh"', *lines, 'extern "C" __global__ void probe(const Params p) {}']
    return compile_cubin("\n".join(text), "probe", CompileTarget("sm_90a"), (include,))


@pytest.mark.parametrize("spec_class", SPEC_CLASSES, ids=lambda item: item.stem)
def test_compiler_agrees_with_the_packer_on_every_field(spec_class):
    layout = spec_class.layout
    assert compile_lines(*layout.declaration(), *assertions(layout)).code.startswith(b"\x7fELF")


@pytest.mark.parametrize("size_error", [-8, 8])
def test_layout_of_another_size_does_not_compile(size_error):
    lines = list(MergeStatesSpec.layout.declaration())
    size = MergeStatesSpec.layout.packer.size
    assert str(size) in lines[-1]
    lines[-1] = lines[-1].replace(str(size), str(size + size_error))
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_lines(*lines)


def test_layout_with_a_field_of_another_kind_does_not_compile():
    wrong = ParamsLayout((("a", "int64"), ("b", "float"), ("c", "int32"), ("d", "int32")))
    right = ParamsLayout((("a", "int32"), ("b", "float"), ("c", "int32"), ("d", "int32")))
    lines = [*right.declaration()[:-1], wrong.declaration()[-1]]
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_lines(*lines)


class Recorder:
    """Stands in for the kernel of a spec: keeps the last launch as the device would read it."""

    def __init__(self, monkeypatch, stem):
        module = importlib.import_module(f"fi_cuda.kernels.{stem}")
        monkeypatch.setattr(module, "kernel_for", self.kernel_for)

    def kernel_for(self, spec, device):
        self.spec = spec
        return self

    def launch(self, device, grid_x, grid_y, *values):
        layout = self.spec.layout
        fields = [(name, CTYPES[code]) for name, code in struct_fields(layout)]
        packed = type("Packed", (ctypes.Structure,), {"_fields_": fields}).from_buffer_copy(
            layout.packer.pack(*values) + bytes(8)
        )
        self.grid = (grid_x, grid_y)
        self.values = {name: getattr(packed, name) or 0 for name, _ in fields}

    def expect(self, expected):
        assert {name: self.values[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        return set(expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_packs_each_value_under_its_name(monkeypatch, layout):
    recorder = Recorder(monkeypatch, "append_kv")
    wide = torch.zeros(11, 4 + 2 * 2, 64, dtype=torch.bfloat16)
    q, k, v = wide[:, :4], wide[:, 4:6], wide[:, 6:]
    form = (7, 16, 2, 64) if layout == "NHD" else (7, 2, 16, 64)
    caches = torch.zeros(2, 7, *form[1:], dtype=torch.uint8)
    scales = torch.tensor([0.5, 2.0])
    kv = KVCache(caches[0], caches[1], layout, "fp8_e4m3", k_scale=scales, v_scale=0.25)
    table, rows = torch.zeros(9, 5, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    batch = Batch(torch.zeros(4, dtype=torch.int32), torch.ones(3, dtype=torch.int32), table, rows)
    rope = RopeTable.make(RopeConfig(64, scaling=YarnScaling(4.0, 32)), "cpu", 128)
    run_append_kv(k, v, kv, batch, rope, q)
    page, token, head = (2048, 128, 64) if layout == "NHD" else (2048, 64, 1024)
    named = recorder.expect(
        {
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "q": q.data_ptr(),
            "k_scales": scales.data_ptr(),
            "v_scales": 0,
            "q_indptr": batch.q_indptr.data_ptr(),
            "kv_lens": batch.kv_lens.data_ptr(),
            "table": table.data_ptr(),
            "table_row": rows.data_ptr(),
            "indptr": 0,
            "slots": 0,
            "rope": rope.cos_sin.data_ptr(),
            "k_cache": caches[0].data_ptr(),
            "v_cache": caches[1].data_ptr(),
            **{f"{name}_strides.outer": 512 for name in "kvq"},
            **{f"{name}_strides.inner": 64 for name in "kvq"},
            **{f"{name}_cache_strides.outer": page for name in "kv"},
            **{f"{name}_cache_strides.inner": token for name in "kv"},
            **{f"{name}_head_stride": head for name in "kv"},
            "table_stride": 5,
            "rope_stride": 64,
            "num_tokens": 11,
            "num_requests": 3,
            "num_q_heads": 4,
            "num_kv_heads": 2,
            "k_scale_stride": 1,
            "v_scale_stride": 0,
            "k_scale": 1.0,
            "v_scale": 0.25,
            "factor": rope.config.attention_factor,
        }
    )
    assert named == set(recorder.values)
    assert recorder.grid == (-(-11 // recorder.spec.tokens_per_block), 1)
    assert (recorder.spec.count, recorder.spec.stored) == (8, torch.float8_e4m3fn)


def test_append_of_a_ragged_cache_has_no_pages(monkeypatch):
    recorder = Recorder(monkeypatch, "append_kv")
    k = torch.zeros(3, 2, 64, dtype=torch.float16)
    cache = torch.zeros(2, 30, 2, 64, dtype=torch.float16)
    indptr = torch.zeros(2, dtype=torch.int32)
    lens = torch.ones(1, dtype=torch.int32)
    run_append_kv(k, k, KVCache(cache[0], cache[1]), Batch(indptr, lens, kv_indptr=indptr), None, None)
    named = {
        "indptr": indptr.data_ptr(),
        "table": 0,
        "rope": 0,
        "q": 0,
        "num_q_heads": 0,
        "v_scale": 1.0,
        "k_scale": 1.0,
    }
    recorder.expect({**named, "k_cache_strides.outer": 0, "k_cache_strides.inner": 128, "k_head_stride": 64})
    assert (recorder.spec.page_size, recorder.spec.addressing, recorder.spec.q_rounds) == (0, 2, 0)


@pytest.mark.parametrize(("num_tokens", "num_requests"), [(0, 2), (3, 0)])
def test_append_of_nothing_launches_nothing(monkeypatch, num_tokens, num_requests):
    recorder = Recorder(monkeypatch, "append_kv")
    k = torch.zeros(num_tokens, 2, 64)
    cache = torch.zeros(2, 3, 16, 2, 64)
    indptr = torch.zeros(num_requests + 1, dtype=torch.int32)
    batch = Batch(indptr, indptr[1:], torch.zeros(num_requests, 1, dtype=torch.int32))
    run_append_kv(k, k, KVCache(cache[0], cache[1]), batch, None, None)
    assert not hasattr(recorder, "values")


def test_merge_packs_each_value_under_its_name(monkeypatch):
    recorder = Recorder(monkeypatch, "merge_states")
    o, lse = torch.zeros(3, 5, 12, 64)[:, :, :6], torch.zeros(3, 5, 6)
    o_out, lse_out = torch.zeros(5, 6, 64), torch.zeros(5, 6)
    run_merge_states(o, lse, o_out, lse_out)
    expected = {"o": o, "lse": lse, "o_out": o_out, "lse_out": lse_out}
    named = recorder.expect(
        {
            **{name: tensor.data_ptr() for name, tensor in expected.items()},
            **{f"{name}_strides.outer": tensor.stride(-3 + ("lse" in name)) for name, tensor in expected.items()},
            **{f"{name}_strides.inner": tensor.stride(-2 + ("lse" in name)) for name, tensor in expected.items()},
            "o_state_stride": 5 * 12 * 64,
            "lse_state_stride": 30,
            "num_rows": 30,
            "num_heads": 6,
            "num_states": 3,
        }
    )
    assert named == set(recorder.values)
    assert recorder.grid == (30 * 16 // 128 + 1, 1)


# What is served


def test_entries_declare_every_field_of_their_operation():
    operations = {operation.name: operation for operation in OPERATIONS}
    for entry in ENTRIES:
        check_entry(entry, operations)
    assert len({entry.op for entry in ENTRIES}) == len(ENTRIES) == 8


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.op)
def test_entry_serves_every_conformance_case_but_float64(entry):
    operation = next(operation for operation in OPERATIONS if operation.name == entry.op)
    served = 0
    for case in operation.cases():
        reasons = entry.reject(operation.request(Target("cuda", (9, 0)), **case.values))
        assert bool(reasons) == (case.values.get("dtype") == torch.float64), (case.name, reasons)
        served += not reasons
    assert served > 5
    typical = operation.request(Target("cuda", (9, 0)), **operation.typical)
    assert not entry.reject(typical)
    assert entry.reject(operation.request(Target("cpu"), **operation.typical))
    assert entry.reject(operation.request(Target("cuda", (7, 5)), **operation.typical))


def test_entries_import_no_kernel_and_load_the_right_function():
    check = (
        "import sys, fi_cuda.entries as e; assert {m for m in sys.modules if 'fi_cuda' in m} == {'fi_cuda', 'fi_cuda.entries'};"
        "print(' '.join(entry.load().__name__ for entry in e.ENTRIES))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.split() == [entry.op for entry in ENTRIES]
