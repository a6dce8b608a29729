"""Tensor maps: what the copy engine knows of a tensor, encoded by the driver once a tensor and box, and kept."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from cuda.bindings import driver
from fi_core.errors import ArgumentError
from torch import Tensor

from .launch import check
from .params import TensorMap

_TYPE = driver.CUtensorMapDataType
_DATA_TYPES = {
    torch.bfloat16: _TYPE.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: _TYPE.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    torch.float32: _TYPE.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    torch.float8_e4m3fn: _TYPE.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.float8_e5m2: _TYPE.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.uint8: _TYPE.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.int32: _TYPE.CU_TENSOR_MAP_DATA_TYPE_INT32,
    torch.int64: _TYPE.CU_TENSOR_MAP_DATA_TYPE_INT64,
}
_NAN_TYPES = (torch.bfloat16, torch.float16, torch.float32)

_SWIZZLES = {
    0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
_PROMOTIONS = {
    0: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
    64: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
    128: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    256: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
}
_FILLS = {
    False: driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    True: driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
}
_ALIGNMENT = 16
_MAX_DIMS = 5
_MAX_BOX = 256
_MAX_MAPS = 4096


class Box(NamedTuple):
    """What one copy moves: ``shape`` in elements, outermost dim first, as in the tensor's shape. ``swizzle_bytes`` 0, 32,
    64 or 128 (``fi/tile/swizzle.cuh``); ``l2_promotion_bytes`` 0, 64, 128 or 256 that L2 fetches at once; elements
    outside the tensor read as 0, or as NaN with ``nan_outside``."""

    shape: tuple[int, ...]
    swizzle_bytes: int = 128
    l2_promotion_bytes: int = 256
    nan_outside: bool = False


def tensor_map_of(tensor: Tensor, box: Box) -> TensorMap:
    """The map of a CUDA tensor as ``tensor_map`` makes it."""
    return tensor_map(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), box, tensor.device)


@lru_cache(maxsize=_MAX_MAPS)
def tensor_map(
    pointer: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: Box,
    device: torch.device,
) -> TensorMap:
    """The map of 1 to 5 dims at ``pointer`` of ``device``; ``shape`` and ``strides`` in elements, outermost dim first,
    the last dim contiguous. Coordinates in device code run the other way: innermost first.

    The map holds the address, not the memory: it stays right for whatever is allocated there with the same form, so the
    latest 4096 maps are kept. Thread-safe. ArgumentError for what the copy engine cannot do (a base or a stride that is
    not a multiple of 16 bytes, a box wider than the swizzle), LaunchError if the driver refuses.
    """
    if device.type != "cuda":
        raise ArgumentError("device", "a CUDA device", device)
    itemsize = _check_tensor(pointer, dtype, shape, strides)
    _check_box(box, dtype, len(shape))
    torch.cuda.current_stream(device)  # makes the device's primary context exist
    made = TensorMap()
    rank = len(shape)
    status = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(made.address),
        int(_DATA_TYPES[dtype]),
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*_outer_strides(shape, strides, itemsize)),
        (ctypes.c_uint32 * rank)(*reversed(box.shape)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(_SWIZZLES[box.swizzle_bytes]),
        int(_PROMOTIONS[box.l2_promotion_bytes]),
        int(_FILLS[box.nan_outside]),
    )
    check(driver.CUresult(status), f"tensor map of {dtype} {tuple(shape)}, strides {tuple(strides)}, {box}")
    return made


@cache
def _library() -> ctypes.CDLL:
    """The driver itself: cuda.bindings would have it write to an address that is not aligned."""
    return ctypes.CDLL("libcuda.so.1")


def _check_tensor(pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The element size of a tensor that a map can describe."""
    if dtype not in _DATA_TYPES:
        raise ArgumentError("dtype", f"one of {', '.join(map(str, _DATA_TYPES))}", dtype)
    if pointer == 0 or pointer % _ALIGNMENT:
        raise ArgumentError("pointer", f"the address of memory, a multiple of {_ALIGNMENT}", hex(pointer))
    if not 1 <= len(shape) <= _MAX_DIMS or not all(1 <= size <= 2**32 for size in shape):
        raise ArgumentError("shape", f"1 to {_MAX_DIMS} dims of 1 to 2^32", tuple(shape))
    if len(strides) != len(shape) or strides[-1] != 1:
        raise ArgumentError("strides", f"{len(shape)} of them, the last 1", tuple(strides))
    itemsize = dtype.itemsize
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size > 1 and not (0 <= stride * itemsize < 2**40 and stride * itemsize % _ALIGNMENT == 0):
            expected = f"multiples of {_ALIGNMENT} bytes below 2^40 for elements of {itemsize} bytes"
            raise ArgumentError("strides", expected, tuple(strides))
    return itemsize


def _check_box(box: Box, dtype: torch.dtype, num_dims: int) -> None:
    if box.swizzle_bytes not in _SWIZZLES:
        raise ArgumentError("box.swizzle_bytes", f"one of {tuple(_SWIZZLES)}", box.swizzle_bytes)
    if box.l2_promotion_bytes not in _PROMOTIONS:
        raise ArgumentError("box.l2_promotion_bytes", f"one of {tuple(_PROMOTIONS)}", box.l2_promotion_bytes)
    if box.nan_outside and dtype not in _NAN_TYPES:
        raise ArgumentError("box.nan_outside", f"False, or one of {', '.join(map(str, _NAN_TYPES))}", dtype)
    if len(box.shape) != num_dims or not all(1 <= size <= _MAX_BOX for size in box.shape):
        raise ArgumentError("box.shape", f"{num_dims} sizes of 1 to {_MAX_BOX}", box.shape)
    inner_bytes = box.shape[-1] * dtype.itemsize
    if inner_bytes % _ALIGNMENT or inner_bytes > (box.swizzle_bytes or inner_bytes):
        most = f", at most {box.swizzle_bytes}" if box.swizzle_bytes else ""
        raise ArgumentError("box.shape", f"an inner dim of a multiple of {_ALIGNMENT} bytes{most}", box.shape)


def _outer_strides(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> list[int]:
    """Bytes between neighbours of every dim but the last, innermost first. A dim of one element is never stepped along,
    and tensors have any stride there: it gets one that the driver takes."""
    steps = (stride * itemsize if size > 1 else _ALIGNMENT for size, stride in zip(shape, strides, strict=True))
    return list(steps)[-2::-1]
