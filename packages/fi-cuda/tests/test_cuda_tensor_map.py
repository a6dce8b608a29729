"""Tensor maps, clusters and launch bounds on the way to the driver: what is refused, what reaches it, what is generated."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cuda.bindings import driver
from fi_core.errors import ArgumentError
from fi_cuda import launch as launch_module
from fi_cuda import tensor_map as module
from fi_cuda.launch import LaunchableKernel, LaunchError, LaunchShape, TensorMapKernel
from fi_cuda.params import ParamsLayout, TensorMap
from fi_cuda.shipped import shipped_specs
from fi_cuda.spec import KernelSpec
from fi_cuda.tensor_map import Box, tensor_map, tensor_map_of

CUDA = torch.device("cuda", 0)
LAYOUT = ParamsLayout((("out", "output"), ("count", "int32")))
VALID = {
    "pointer": 0x7F0000000010,
    "dtype": torch.bfloat16,
    "shape": (3, 100, 64),
    "strides": (12800, 128, 1),
    "box": Box((1, 64, 64)),
    "device": CUDA,
}


@pytest.fixture
def encoded(monkeypatch):
    """The arguments of the driver's calls; each succeeds and returns another map."""
    calls = []

    class Library:
        def cuTensorMapEncodeTiled(self, made, *arguments):  # noqa: N802 - the driver's name
            assert made.value % 128 == 0
            calls.append(arguments)
            ctypes.c_uint64.from_address(made.value).value = len(calls)
            ctypes.c_uint64.from_address(made.value + 120).value = len(calls)
            return 0

    monkeypatch.setattr(module, "_library", Library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    tensor_map.cache_clear()
    yield calls
    tensor_map.cache_clear()


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"dtype": torch.bool}, "dtype"),
        ({"pointer": 0}, "pointer"),
        ({"pointer": 0x7F0000000008}, "pointer"),
        ({"shape": (), "strides": (), "box": Box(())}, "shape"),
        ({"shape": (1,) * 6, "strides": (1,) * 6, "box": Box((1,) * 5 + (64,))}, "shape"),
        ({"shape": (3, 0, 64)}, "shape"),
        ({"shape": (3, 2**32 + 1, 64)}, "shape"),
        ({"strides": (128, 1)}, "strides"),
        ({"strides": (12800, 128, 2)}, "strides"),
        ({"strides": (12800, 68, 1)}, "strides"),
        ({"strides": (12804, 128, 1)}, "strides"),
        ({"strides": (2**39, 128, 1)}, "strides"),
        ({"strides": (-12800, 128, 1)}, "strides"),
        ({"box": Box((64, 64))}, "box.shape"),
        ({"box": Box((1, 257, 64))}, "box.shape"),
        ({"box": Box((0, 64, 64))}, "box.shape"),
        ({"box": Box((1, 64, 68))}, "box.shape"),
        ({"box": Box((1, 64, 128))}, "box.shape"),
        ({"box": Box((1, 64, 64), swizzle_bytes=64)}, "box.shape"),
        ({"box": Box((1, 64, 20), swizzle_bytes=0)}, "box.shape"),
        ({"box": Box((1, 64, 64), swizzle_bytes=16)}, "box.swizzle_bytes"),
        ({"box": Box((1, 64, 64), l2_promotion_bytes=32)}, "box.l2_promotion_bytes"),
        ({"dtype": torch.uint8, "box": Box((1, 64, 64), nan_outside=True)}, "box.nan_outside"),
        ({"device": torch.device("cpu")}, "device"),
    ],
)
def test_what_the_copy_engine_cannot_do_is_refused(encoded, changed, argument):
    tensor_map(**VALID)
    with pytest.raises(ArgumentError) as raised:
        tensor_map(**{**VALID, **changed})
    assert raised.value.argument == argument
    assert len(encoded) == 1


def test_dims_reach_the_driver_innermost_first_and_strides_in_bytes(encoded):
    tensor_map(**{**VALID, "box": Box((2, 32, 16), 32, 128, nan_outside=True)})
    dtype, rank, pointer, shape, strides, box, steps, interleave, swizzle, promotion, fill = encoded[0]
    assert dtype == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert (rank, pointer.value) == (3, VALID["pointer"])
    assert list(shape) == [64, 100, 3] and shape._type_ is ctypes.c_uint64
    assert list(strides)[:2] == [256, 25600] and strides._type_ is ctypes.c_uint64
    assert list(box) == [16, 32, 2] and box._type_ is steps._type_ is ctypes.c_uint32
    assert list(steps) == [1, 1, 1]
    assert interleave == driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert swizzle == driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B
    assert promotion == driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
    assert fill == driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA


def test_a_wide_box_needs_no_swizzle(encoded):
    tensor_map(**{**VALID, "shape": (3, 100, 128), "box": Box((1, 64, 128), swizzle_bytes=0)})
    assert encoded[0][8] == driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE
    assert encoded[0][10] == driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


def test_the_stride_of_a_single_element_does_not_matter(encoded):
    tensor_map(**{**VALID, "shape": (3, 1, 64), "strides": (128, 7, 1), "box": Box((1, 1, 64))})
    inner, outer = list(encoded[0][4])[:2]
    assert inner % 16 == 0 and inner > 0 and outer == 256


def test_a_map_is_made_once_and_again_for_anything_else(encoded):
    first = tensor_map(**VALID)
    assert tensor_map(**VALID) is first
    other = {
        "pointer": VALID["pointer"] + 16,
        "dtype": torch.float16,
        "shape": (2, 100, 64),
        "strides": (25600, 128, 1),
        "box": Box((1, 32, 64)),
        "device": torch.device("cuda", 1),
    }
    made = [tensor_map(**{**VALID, name: value}) for name, value in other.items()]
    made.append(tensor_map(**{**VALID, "box": Box((1, 64, 32), 64)}))
    assert len({item.address for item in (first, *made)}) == len(encoded) == 8
    assert [ctypes.c_uint64.from_address(item.address).value for item in (first, *made)] == list(range(1, 9))


def test_the_number_of_maps_kept_is_bounded(encoded):
    for page in range(module._MAX_MAPS + 10):
        tensor_map(**{**VALID, "pointer": VALID["pointer"] + 16 * page})
    assert tensor_map.cache_info().currsize == module._MAX_MAPS


def test_a_refusal_of_the_driver_names_the_tensor(encoded, monkeypatch):
    class Library:
        def cuTensorMapEncodeTiled(self, *arguments):  # noqa: N802 - the driver's name
            return int(driver.CUresult.CUDA_ERROR_INVALID_VALUE)

    monkeypatch.setattr(module, "_library", Library)
    monkeypatch.setattr(launch_module.driver, "cuGetErrorString", lambda status: (None, b"invalid argument"))
    with pytest.raises(LaunchError, match=r"tensor map of torch.bfloat16 \(3, 100, 64\).*invalid argument"):
        tensor_map(**VALID)


def test_a_cpu_tensor_has_no_map():
    with pytest.raises(ArgumentError, match="device: expected a CUDA device, got cpu"):
        tensor_map_of(torch.zeros(64, 64, dtype=torch.bfloat16), Box((64, 64)))


@dataclass(frozen=True)
class MappedSpec(KernelSpec):
    blocks: int | None = None

    stem: ClassVar = "mapped"
    layout: ClassVar = LAYOUT
    tensor_maps: ClassVar = ("q_map", "k_map")

    @property
    def num_threads(self) -> int:
        return 384

    @property
    def blocks_per_multiprocessor(self) -> int | None:
        return self.blocks

    def config_lines(self) -> list[str]:
        return []


def test_maps_follow_the_struct_in_the_generated_entry():
    lines = MappedSpec(blocks=1).source().text.splitlines()
    assert lines[:2] == ['#include "fi/kernels/mapped.cuh"', '#include "fi/ptx/tma.cuh"']
    assert lines[-6:] == [
        'extern "C" __global__ void __launch_bounds__(384, 1)',
        "    fi_mapped(const __grid_constant__ Params params,",
        "    const __grid_constant__ fi::ptx::TensorMap q_map,",
        "    const __grid_constant__ fi::ptx::TensorMap k_map) {",
        "  fi::mapped<Config>(params, q_map, k_map);",
        "}",
    ]
    assert "__launch_bounds__(384)\n" in MappedSpec().source().text


def test_kernels_without_maps_are_generated_as_ever():
    for spec in shipped_specs():
        if spec.tensor_maps or spec.blocks_per_multiprocessor is not None:
            continue
        text = spec.source().text
        assert text.count("#include") == 1
        assert text.endswith(
            f'extern "C" __global__ void __launch_bounds__({spec.num_threads})\n'
            f"    fi_{spec.stem}(const __grid_constant__ Params params) {{\n"
            f"  fi::{spec.stem}<Config>(params);\n}}\n"
        )


class Driver:
    """Records what a launch gives the driver: the configuration, the struct's bytes, the maps' addresses."""

    def __init__(self, monkeypatch, num_maps):
        self.num_maps = num_maps
        self.launches = []
        self.shared = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device_idx: 0, raising=False)
        monkeypatch.setattr(launch_module.driver, "cuLaunchKernelEx", self.launch)
        monkeypatch.setattr(launch_module.driver, "cuKernelSetAttribute", self.set_attribute)
        monkeypatch.setattr(launch_module, "ObjectCode", self)

    def from_cubin(self, cubin, name):
        return self

    def get_kernel(self, symbol):
        return self

    handle = 1

    def set_attribute(self, attribute, value, kernel, device):
        self.shared.append((value, device))
        return (driver.CUresult.CUDA_SUCCESS,)

    def launch(self, config, function, address, extra):
        pointers = (ctypes.c_void_p * (1 + self.num_maps)).from_address(address)
        self.launches.append((config, ctypes.string_at(pointers[0], LAYOUT.packer.size), list(pointers[1:])))
        return (driver.CUresult.CUDA_SUCCESS,)


class Code:
    """Stands in for an artifact."""

    stem = name = symbol = "mapped"
    cubin = b""


def test_a_launch_hands_over_struct_and_maps(monkeypatch):
    recorded = Driver(monkeypatch, 2)
    shape = LaunchShape(384, 100_000, overlapping=True, cluster_size=2)
    kernel = TensorMapKernel(Code, LAYOUT, shape, ("q_map", "k_map"))
    first, second = (TensorMap() for _ in range(2))
    kernel.launch(CUDA, 4, 1, 64, 7, first, second)
    kernel.launch(CUDA, 4, 1, 64, 8, second, first)
    kernel.launch(CUDA, 0, 1, 64, 8, second, first)
    (config, packed, maps), (again, packed_again, maps_again) = recorded.launches
    assert packed == LAYOUT.packer.pack(64, 7) and packed_again == LAYOUT.packer.pack(64, 8)
    assert maps == [first.address, second.address] and maps_again == [second.address, first.address]
    assert again is config
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, config.numAttrs) == (4, 384, 100_000, 2)
    dims = config.attrs[1].value.clusterDim
    assert (dims.x, dims.y, dims.z) == (2, 1, 1)
    assert recorded.shared == [(100_000, 0)]


def test_a_launch_refuses_what_is_not_a_map(monkeypatch):
    recorded = Driver(monkeypatch, 2)
    kernel = TensorMapKernel(Code, LAYOUT, LaunchShape(384), ("q_map", "k_map"))
    made = TensorMap()
    for values, name in (((64, 7, made, 5), "k_map"), ((64, 7, made), "q_map"), ((64, 7), "q_map"), ((), "q_map")):
        with pytest.raises(LaunchError, match=f"{name} is .*, not a TensorMap"):
            kernel.launch(CUDA, 1, 1, *values)
    assert recorded.launches == []


def test_clusters_divide_the_grid_and_have_up_to_16_blocks(monkeypatch):
    recorded = Driver(monkeypatch, 0)
    with pytest.raises(LaunchError, match="5 blocks in x, in clusters of 2"):
        LaunchableKernel(Code, LAYOUT, LaunchShape(32, cluster_size=2)).launch(CUDA, 5, 1, 64, 7)
    for size in (0, 17):
        with pytest.raises(LaunchError, match=f"clusters of {size} blocks"):
            LaunchableKernel(Code, LAYOUT, LaunchShape(32, cluster_size=size))
    LaunchableKernel(Code, LAYOUT, LaunchShape(32)).launch(CUDA, 5, 1, 64, 7)
    ((config, _, maps),) = recorded.launches
    assert config.numAttrs == 0 and maps == []
    assert recorded.shared == []
    # More than 8 blocks are not portable: the driver wants to be told.
    LaunchableKernel(Code, LAYOUT, LaunchShape(32, cluster_size=16)).launch(CUDA, 32, 1, 64, 7)
    assert recorded.shared == [(1, 0)]
