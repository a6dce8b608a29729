"""Loading an artifact into the driver and launching it: pack the parameters, one driver call on the current stream."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import ObjectCode
from fi_core.errors import FiError

from .cache import Artifact
from .params import ParamsLayout, TensorMap

_DEFAULT_DYNAMIC_SHARED_BYTES = 48 * 1024
_MAX_CLUSTER_SIZE = 16
_MAX_PORTABLE_CLUSTER_SIZE = 8


class LaunchError(FiError):
    """The driver refused to load or launch a kernel; the message names both."""


def check(status: Any, what: str) -> None:
    """Raise LaunchError unless a driver call succeeded."""
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise LaunchError(f"{what}: {text.decode() if text else status}")


@dataclass(frozen=True)
class LaunchShape:
    """What every launch of a kernel has in common: threads a block, bytes of dynamic shared memory a block, blocks a
    cluster; ``overlapping`` lets it start before the previous kernel of the stream has ended (programmatic dependent
    launch: its code waits where it first needs that kernel's results). ``cooperative``: its blocks wait for one another, so
    it starts only where all of them fit, whatever other streams run."""

    num_threads: int
    shared_bytes: int = 0
    overlapping: bool = False
    cluster_size: int = 1
    cooperative: bool = False

    def attributes(self) -> list[Any]:
        """The driver's attributes of a launch."""
        attributes = []
        if self.overlapping:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if self.cluster_size > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dims = attribute.value.clusterDim
            dims.x, dims.y, dims.z = self.cluster_size, 1, 1
            attributes.append(attribute)
        if self.cooperative:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        return attributes


class _Arguments:
    """A packed struct and the argument array that points at it and at tensor maps; the driver copies what they point at
    while it launches."""

    def __init__(self, num_bytes: int, num_maps: int) -> None:
        self.packed = ctypes.create_string_buffer(num_bytes)
        self.pointers = (ctypes.c_void_p * (1 + num_maps))(ctypes.addressof(self.packed))
        self.address = ctypes.addressof(self.pointers)
        self.maps: tuple[Any, ...] | None = None  # that the pointers after the first point at


class _ThreadArguments(_Arguments, threading.local):
    """Each thread's own."""


class LaunchableKernel:
    """A kernel in the driver. Needs a driver and a device that runs the artifact's arch. Launching is thread-safe."""

    def __init__(self, artifact: Artifact, layout: ParamsLayout, shape: LaunchShape, num_maps: int = 0) -> None:
        if not 1 <= shape.cluster_size <= _MAX_CLUSTER_SIZE:
            raise LaunchError(f"{artifact.stem}: clusters of {shape.cluster_size} blocks, of 1 to {_MAX_CLUSTER_SIZE}")
        self.artifact = artifact
        self.layout = layout
        self.shape = shape
        torch.cuda.current_stream()  # makes the device's primary context current
        # The object code owns the library, so it must live as long as the kernel.
        self._code = ObjectCode.from_cubin(artifact.cubin, name=artifact.stem)
        self._function = driver.CUfunction(int(self._code.get_kernel(artifact.symbol).handle))
        self._pack_into = layout.packer.pack_into
        self._num_maps = num_maps
        self._arguments = _ThreadArguments(layout.packer.size, num_maps)
        self._configs: dict[tuple[int, int, int, int], Any] = {}

    def launch(self, device: torch.device, grid_x: int, grid_y: int, *values: Any) -> None:
        """Launch grid_x x grid_y blocks on ``device``'s current stream with the struct's field values, in order
        (int or float).

        An empty grid launches nothing. Raises LaunchError, struct.error for values that do not fit the layout.
        """
        self._launch(device, grid_x, grid_y, values)

    def _launch(self, device: torch.device, grid_x: int, grid_y: int, values: tuple[Any, ...]) -> None:
        if grid_x == 0 or grid_y == 0:
            return
        device_idx = device.index
        if device_idx != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(device, grid_x, grid_y, values)
            return
        arguments = self._arguments
        self._pack(arguments, values)
        self._launch_packed(device_idx, grid_x, grid_y, arguments.address)

    def _launch_packed(self, device_idx: int, grid_x: int, grid_y: int, address: int) -> None:
        """With the argument array at ``address``, on the current device."""
        key = (device_idx, torch._C._cuda_getCurrentRawStream(device_idx), grid_x, grid_y)
        config = self._configs.get(key)
        if config is None:
            config = self._remember(key)
        (status,) = driver.cuLaunchKernelEx(config, self._function, address, 0)
        if status:
            check(status, f"launch of {self.artifact.name} with grid ({grid_x}, {grid_y})")

    def _pack(self, arguments: _Arguments, values: tuple[Any, ...]) -> None:
        self._pack_into(arguments.packed, 0, *values)

    def repeated(self, device: torch.device, grid_x: int) -> RepeatedLaunch:
        """This kernel for many launches of ``grid_x`` blocks, most of them with equal values."""
        return RepeatedLaunch(self, device, grid_x, _Arguments(self.layout.packer.size, self._num_maps))

    def _remember(self, key: tuple[int, int, int, int]) -> Any:
        shape = self.shape
        device_idx, stream, grid_x, grid_y = key
        if grid_x % shape.cluster_size:
            raise LaunchError(f"{self.artifact.name}: {grid_x} blocks in x, in clusters of {shape.cluster_size}")
        # A device's own settings, so not made at loading.
        names = driver.CUfunction_attribute
        if shape.shared_bytes > _DEFAULT_DYNAMIC_SHARED_BYTES:
            self._set(names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shape.shared_bytes, device_idx)
        if shape.cluster_size > _MAX_PORTABLE_CLUSTER_SIZE:
            self._set(names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, device_idx)
        config = driver.CUlaunchConfig()
        config.hStream, config.gridDimX, config.gridDimY = stream, grid_x, grid_y
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = shape.num_threads
        config.sharedMemBytes = shape.shared_bytes
        attributes = shape.attributes()
        if attributes:
            config.attrs = attributes
            config.numAttrs = len(attributes)
        if len(self._configs) >= 1024:  # streams come and go; grids are few
            self._configs.clear()
        self._configs[key] = config
        return config

    def _set(self, attribute: Any, value: int, device_idx: int) -> None:
        kernel = driver.CUkernel(int(self._function))
        (status,) = driver.cuKernelSetAttribute(attribute, value, kernel, device_idx)
        check(status, f"{self.artifact.stem}: {attribute.name} = {value}")


class TensorMapKernel(LaunchableKernel):
    """A kernel whose parameters are the struct and tensor maps: values of a launch are the struct's, then one TensorMap a
    name."""

    def __init__(self, artifact: Artifact, layout: ParamsLayout, shape: LaunchShape, names: tuple[str, ...]) -> None:
        super().__init__(artifact, layout, shape, len(names))
        self.names = names

    def _pack(self, arguments: _Arguments, values: tuple[Any, ...]) -> None:
        first = len(values) - self._num_maps
        maps = values[first:]
        if maps != arguments.maps:  # most calls of a kernel are of one layer's cache again
            self._point_at(maps, arguments)
        self._pack_into(arguments.packed, 0, *values[:first])

    def _point_at(self, maps: tuple[Any, ...], arguments: _Arguments) -> None:
        given = dict(zip(self.names, maps, strict=False))
        for idx, name in enumerate(self.names):
            tensor_map = given.get(name)
            if type(tensor_map) is not TensorMap:
                raise LaunchError(f"launch of {self.artifact.name}: {name} is {tensor_map!r}, not a TensorMap")
            arguments.pointers[1 + idx] = tensor_map.address
        arguments.maps = maps


class RepeatedLaunch:
    """Launches of one kernel whose parameters stay packed, for one thread at a time; made by ``repeated``. ``packed_for`` is
    the caller's: what the values follow from, so that equal ones need not be packed again."""

    def __init__(self, kernel: LaunchableKernel, device: torch.device, grid_x: int, arguments: _Arguments) -> None:
        self._kernel = kernel
        self._device = device
        self._grid_x = grid_x
        self._arguments = arguments
        self.packed_for: tuple[object, ...] | None = None

    def pack(self, *values: Any) -> None:
        """The values of the launches from now on, as ``LaunchableKernel.launch`` takes them."""
        self._kernel._pack(self._arguments, values)

    def launch(self) -> None:
        """On the device's current stream. Raises LaunchError."""
        device = self._device
        if device.index == torch._C._cuda_getDevice():
            self._kernel._launch_packed(device.index, self._grid_x, 1, self._arguments.address)
        else:
            with torch.cuda.device(device):
                self._kernel._launch_packed(device.index, self._grid_x, 1, self._arguments.address)
