"""The packed struct of a launch: the compiler agrees with the packer, and each value goes under its name."""

import ctypes
import importlib
import struct

import pytest
import torch
from fi_core.records import Batch, KVCache
from fi_core.rope import RopeConfig, RopeTable, YarnScaling
from fi_cuda.kernels import rmsnorm as rmsnorm_module
from fi_cuda.kernels.append_kv import AppendKVSpec
from fi_cuda.kernels.append_kv import append_kv as run_append_kv
from fi_cuda.kernels.copy_pages import CopyPagesSpec
from fi_cuda.kernels.gated_activation import GatedActivationSpec
from fi_cuda.kernels.merge_states import MergeStatesSpec
from fi_cuda.kernels.merge_states import merge_states as run_merge_states
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.kernels.rope import RopeSpec
from fi_cuda.params import KINDS, ParamsLayout
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import CompileError, compile_cubin

pytestmark = pytest.mark.timeout(120)

SPEC_CLASSES = (AppendKVSpec, CopyPagesSpec, GatedActivationSpec, MergeStatesSpec, RmsNormSpec, RopeSpec)
CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


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
        for name in {"_bound", "_form"} & set(dir(module)):  # no kernel of an earlier recorder
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)

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
    assert recorder.spec.packed == (layout == "NHD") and recorder.spec.scales_per_head


@pytest.mark.parametrize("name", ["k", "v", "q", "k_cache", "v_cache"])
def test_append_assumes_no_stride_that_one_tensor_breaks(monkeypatch, name):
    recorder = Recorder(monkeypatch, "append_kv")
    shapes = {"k": (3, 2, 64), "v": (3, 2, 64), "q": (3, 4, 64), "k_cache": (5, 16, 2, 64), "v_cache": (5, 16, 2, 64)}
    tensors = {
        key: torch.zeros(*size[:-1], 64 + 16 * (key == name), dtype=torch.bfloat16) for key, size in shapes.items()
    }
    k, v, q, k_cache, v_cache = (tensor[..., :64] for tensor in tensors.values())
    batch = Batch(
        torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    )
    rope = RopeTable.make(RopeConfig(64), "cpu", 128)
    run_append_kv(k, v, KVCache(k_cache, v_cache), batch, rope, q)
    assert not recorder.spec.packed
    # One scale for all heads needs no scales of their own.
    assert not recorder.spec.scales_per_head


def test_append_takes_strides_of_the_cache_it_is_given(monkeypatch):
    recorder = Recorder(monkeypatch, "append_kv")
    k = torch.zeros(3, 2, 64)
    memory = torch.zeros(2, 7, 16, 2, 64)
    others = memory.transpose(2, 3).contiguous()
    indptr, lens = torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    batch = Batch(indptr, lens, torch.zeros(1, 1, dtype=torch.int32))
    addresses = set()
    for _ in range(20):  # each cache dies before the next is made, often at its address
        for tensors, layout, strides in ((memory, "NHD", (128, 64)), (others, "HND", (64, 1024))):
            kv = KVCache(tensors[0], tensors[1], layout)
            addresses.add(id(kv))
            for _ in range(2):
                run_append_kv(k, k, kv, batch, None, None)
                recorder.expect({"k_cache_strides.inner": strides[0], "v_head_stride": strides[1]})
                recorder.expect({"k_cache": tensors[0].data_ptr()})
            del kv
    assert len(addresses) < 40


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


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_fp8_norm_packs_each_value_under_its_name(monkeypatch, add, in_memory):
    recorder = Recorder(monkeypatch, "rmsnorm")
    wide, residual = torch.zeros(5, 6, 128, dtype=torch.bfloat16), torch.zeros(5, 4, 128, dtype=torch.bfloat16)
    x, weight, out = (
        wide[:, 1:5],
        torch.zeros(128, dtype=torch.bfloat16),
        torch.zeros(5, 4, 128, dtype=torch.float8_e5m2),
    )
    scale = torch.tensor([0.5]) if in_memory else 0.5
    if add:
        rmsnorm_module.add_rmsnorm(x, residual, weight, 1e-5, 0.25, scale, out)
    else:
        rmsnorm_module.rmsnorm(x, weight, 1e-5, 0.25, scale, out)
    named = recorder.expect(
        {
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "scale": scale.data_ptr() if in_memory else 0,
            "residual": residual.data_ptr() if add else 0,
            "out": out.data_ptr(),
            "x_strides.outer": 768,
            "x_strides.inner": 128,
            "residual_strides.outer": 512 if add else 0,
            "residual_strides.inner": 128 if add else 0,
            "out_strides.outer": 512,
            "out_strides.inner": 128,
            "num_rows": 20,
            "inner_size": 4,
            "eps": 1e-5,
            "weight_bias": 0.25,
            "out_scale": 1.0 if in_memory else 0.5,
        }
    )
    assert named == set(recorder.values)
    assert recorder.spec == RmsNormSpec(torch.bfloat16, torch.float8_e5m2, 128, 16, add, False, True)
    assert recorder.grid == (-(-20 // (recorder.spec.num_threads // recorder.spec.threads_per_row)), 1)


def test_fp8_norm_takes_packs_that_loads_and_stores_align_to(monkeypatch):
    recorder = Recorder(monkeypatch, "rmsnorm")
    x, weight = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    wide = torch.zeros(3, 80, dtype=torch.float8_e4m3fn)
    for first, expected in ((0, 16), (4, 8), (2, 4), (1, 2)):
        rmsnorm_module.rmsnorm(x, weight, 1e-5, 0.0, 1.0, wide[:, first : first + 64])
        assert recorder.spec.vector_bytes == expected
