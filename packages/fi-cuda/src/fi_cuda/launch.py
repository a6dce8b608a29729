"""Loading an artifact into the driver and launching it: pack the parameters, one driver call on the current stream."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import ObjectCode
from fi_core.errors import FiError

from .cache import Artifact
from .params import ParamsLayout

_DEFAULT_DYNAMIC_SHARED_BYTES = 48 * 1024


class LaunchError(FiError):
    """The driver refused to load or launch a kernel; the message names both."""


def check(status: Any, what: str) -> None:
    """Raise LaunchError unless a driver call succeeded."""
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise LaunchError(f"{what}: {text.decode() if text else status}")


class _Arguments(threading.local):
    """A thread's packed struct and the argument array that points at it; the driver copies it while it launches."""

    def __init__(self, num_bytes: int) -> None:
        self.packed = ctypes.create_string_buffer(num_bytes)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.packed))
        self.address = ctypes.addressof(self.pointers)


class LaunchableKernel:
    """A kernel in the driver. ``num_threads`` a block, ``shared_bytes`` of dynamic shared memory; ``overlapping`` lets
    it start before the previous kernel of the stream has ended (programmatic dependent launch: its code waits where it
    first needs that kernel's results).

    Needs a driver and a device that runs the artifact's arch. Launching is thread-safe.
    """

    def __init__(
        self,
        artifact: Artifact,
        layout: ParamsLayout,
        num_threads: int,
        shared_bytes: int = 0,
        overlapping: bool = False,
    ) -> None:
        self.artifact = artifact
        self.layout = layout
        self.num_threads = num_threads
        self.shared_bytes = shared_bytes
        self.overlapping = overlapping
        torch.cuda.current_stream()  # makes the device's primary context current
        # The object code owns the library, so it must live as long as the kernel.
        self._code = ObjectCode.from_cubin(artifact.cubin, name=artifact.stem)
        self._function = driver.CUfunction(int(self._code.get_kernel(artifact.symbol).handle))
        if shared_bytes > _DEFAULT_DYNAMIC_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(
                attribute, shared_bytes, driver.CUkernel(int(self._function)), torch.cuda.current_device()
            )
            check(status, f"{artifact.stem}: {shared_bytes} bytes of shared memory")
        self._pack_into = layout.packer.pack_into
        self._arguments = _Arguments(layout.packer.size)
        self._configs: dict[tuple[int, int, int], Any] = {}

    def launch(self, device: torch.device, grid_x: int, grid_y: int, *values: int | float) -> None:
        """Launch grid_x x grid_y blocks on ``device``'s current stream with the struct's field values, in order.

        An empty grid launches nothing. Raises LaunchError, struct.error for values that do not fit the layout.
        """
        if grid_x == 0 or grid_y == 0:
            return
        device_idx = device.index
        if device_idx != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self.launch(device, grid_x, grid_y, *values)
            return
        arguments = self._arguments
        self._pack_into(arguments.packed, 0, *values)
        stream = torch._C._cuda_getCurrentRawStream(device_idx)
        config = self._configs.get((stream, grid_x, grid_y))
        if config is None:
            config = self._remember((stream, grid_x, grid_y))
        (status,) = driver.cuLaunchKernelEx(config, self._function, arguments.address, 0)
        if status:
            check(status, f"launch of {self.artifact.name} with grid ({grid_x}, {grid_y})")

    def _remember(self, key: tuple[int, int, int]) -> Any:
        config = driver.CUlaunchConfig()
        config.hStream, config.gridDimX, config.gridDimY = key
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = self.num_threads
        config.sharedMemBytes = self.shared_bytes
        if self.overlapping:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        if len(self._configs) >= 1024:  # streams come and go; grids are few
            self._configs.clear()
        self._configs[key] = config
        return config
