"""The spec of ``fi/kernels/warp_rmsnorm.cuh`` and its launch; fi_cuda compiles and caches what the spec describes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from fi_cuda.kernels.rows import inner_size, row_strides
from fi_cuda.params import ParamsLayout
from fi_cuda.spec import KernelSpec, kernel_for

ROWS_PER_BLOCK = 4


@dataclass(frozen=True)
class WarpRmsNormSpec(KernelSpec):
    """One row width and element type: ``Dtype`` and ``kWidth`` of the header's Config."""

    dtype: torch.dtype
    width: int

    stem: ClassVar = "warp_rmsnorm"
    include_folders: ClassVar = (Path(__file__).parent / "include", *KernelSpec.include_folders)
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("x", "pointer"),
            ("weight", "pointer"),
            ("out", "output"),
            ("x_strides", "rows"),
            ("out_strides", "rows"),
            ("num_rows", "int64"),
            ("inner_size", "int32"),
            ("eps", "float"),
            ("weight_bias", "float"),
        )
    )

    @property
    def num_threads(self):
        return 32 * ROWS_PER_BLOCK


def rmsnorm(x, weight, eps, weight_bias, scale, out):
    """The ``RMSNorm`` protocol of fi-core: x [rows, D] or [outer, inner, D]; out may be x. The rules admit no FP8 output, so
    ``scale`` is None."""
    kernel = kernel_for(WarpRmsNormSpec(x.dtype, x.shape[-1]), x.device)
    pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    num_rows = x.shape[:-1].numel()
    grid = (-(-num_rows // ROWS_PER_BLOCK), 1)
    strides = (*row_strides(x.stride()), *row_strides(out.stride()))
    kernel.launch(x.device, *grid, *pointers, *strides, num_rows, inner_size(x.shape), eps, weight_bias)
