"""The Hopper instructions' headers and tensor maps at work: small kernels that use each, compiled on the CPU and compared
with float64 on a GPU. Inputs are integers whose sums float32 holds, so results are equal, not close."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fi_cuda.compile import INCLUDE_FOLDER, compile_source
from fi_cuda.launch import LaunchError
from fi_cuda.params import ParamsLayout
from fi_cuda.source import CompileTarget
from fi_cuda.spec import KernelSpec, kernel_for
from fi_cuda.tensor_map import Box, tensor_map_of

pytestmark = pytest.mark.timeout(180)

FOLDERS = (Path(__file__).parent / "include", INCLUDE_FOLDER)
BF16, FP16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class WgmmaGemmSpec(KernelSpec):
    operand: torch.dtype
    columns: int
    swizzle_bytes: int = 128
    transposed_b: bool = False
    register_a: bool = False
    stages: int = 3

    stem: ClassVar = "wgmma_gemm"
    include_folders: ClassVar = FOLDERS
    tensor_maps: ClassVar = ("a_map", "b_map")
    layout: ClassVar = ParamsLayout(
        (
            ("output", "output"),
            ("a", "pointer"),
            ("num_rows", "int32"),
            ("num_columns", "int32"),
            ("depth", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 384

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.swizzle_bytes * (128 + self.columns) + 1024


@dataclass(frozen=True)
class CopyEngineSpec(KernelSpec):
    swizzle_bytes: int
    rows: int = 16
    bytes: int = 4096

    stem: ClassVar = "copy_engine"
    include_folders: ClassVar = FOLDERS
    tensor_maps: ClassVar = ("from_map", "to_map")
    layout: ClassVar = ParamsLayout(
        (
            ("source", "pointer"),
            ("target", "output"),
            ("plain", "output"),
            ("load_column", "int32"),
            ("load_row", "int32"),
            ("store_column", "int32"),
            ("store_row", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 128


@dataclass(frozen=True)
class WarpMmaSpec(KernelSpec):
    operand: torch.dtype

    stem: ClassVar = "warp_mma"
    include_folders: ClassVar = FOLDERS
    layout: ClassVar = ParamsLayout(
        (
            ("a", "pointer"),
            ("b", "pointer"),
            ("v", "pointer"),
            ("by_b", "output"),
            ("by_v", "output"),
            ("rounded", "output"),
            ("num_rows", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 32


@dataclass(frozen=True)
class ClusterShareSpec(KernelSpec):
    blocks: int

    stem: ClassVar = "cluster_share"
    include_folders: ClassVar = FOLDERS
    tensor_maps: ClassVar = ("box_map",)
    layout: ClassVar = ParamsLayout((("totals", "output"), ("boxes", "output")))

    @property
    def num_threads(self) -> int:
        return 64

    @property
    def cluster_size(self) -> int:
        return self.blocks


GEMMS = [
    WgmmaGemmSpec(BF16, 128),
    WgmmaGemmSpec(FP16, 256),
    WgmmaGemmSpec(BF16, 72, swizzle_bytes=64),
    WgmmaGemmSpec(BF16, 8, swizzle_bytes=32, stages=5),
    WgmmaGemmSpec(BF16, 128, transposed_b=True),
    WgmmaGemmSpec(FP16, 96, swizzle_bytes=64, transposed_b=True),
    WgmmaGemmSpec(BF16, 128, transposed_b=True, register_a=True),
    WgmmaGemmSpec(BF16, 256, transposed_b=True, register_a=True),
    WgmmaGemmSpec(FP16, 48, swizzle_bytes=32, transposed_b=True, register_a=True),
    WgmmaGemmSpec(BF16, 64, register_a=True),
    WgmmaGemmSpec(E4M3, 128),
    WgmmaGemmSpec(E5M2, 64, swizzle_bytes=64),
    WgmmaGemmSpec(E4M3, 192, register_a=True),
]
SPECS = [*GEMMS, *map(CopyEngineSpec, (32, 64, 128)), *map(WarpMmaSpec, (BF16, FP16)), *map(ClusterShareSpec, (2, 4))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_compiles_and_nothing_leaves_the_registers(spec):
    resources = compile_source(spec.source(), CompileTarget("sm_90a")).resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def integers(generator, shape, dtype, largest):
    values = torch.randint(-largest, largest + 1, shape, generator=generator, device="cpu")
    return values.to(torch.float32).to(dtype).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", GEMMS, ids=str)
def test_gemm_equals_float64(device, spec):
    generator = torch.Generator().manual_seed(spec.columns)
    largest = 7 if spec.operand.itemsize == 2 else 2  # FP8 sums keep 13 bits
    row_depth = spec.swizzle_bytes // spec.operand.itemsize
    # More tiles than stages, and edges inside tiles; the kernel reads an A that goes to registers without asking for its.
    num_rows, depth = 3 * 128 - (0 if spec.register_a else 9), 7 * row_depth
    num_columns = 2 * spec.columns - spec.columns // 16 * 8
    a = integers(generator, (num_rows, depth), spec.operand, largest)
    b = integers(generator, (num_columns, depth), spec.operand, largest)
    expected = a.float().double() @ b.float().double().T
    if spec.transposed_b:
        b = b.T.contiguous()
    output = torch.full((num_rows, num_columns), float("nan"), device=device)
    maps = (
        tensor_map_of(a, Box((128, row_depth), spec.swizzle_bytes)),
        tensor_map_of(b, Box((row_depth if spec.transposed_b else spec.columns, row_depth), spec.swizzle_bytes)),
    )
    grid = (-(-num_rows // 128), -(-num_columns // spec.columns))
    kernel_for(spec, device).launch(device, *grid, output.data_ptr(), a.data_ptr(), num_rows, num_columns, depth, *maps)
    assert torch.equal(output.double(), expected)


def check_copies(device, swizzle_bytes, load, store):
    """Boxes of (3, 20, 48) elements whose first columns and rows are ``load`` and ``store``."""
    spec = CopyEngineSpec(swizzle_bytes)
    width = swizzle_bytes // 2
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (3, spec.bytes), generator=generator, dtype=torch.uint8).cuda()
    planes = integers(generator, (3, 20, 48), BF16, 100)
    target = torch.full_like(source, 77)
    plain = torch.full((3, spec.rows, width), float("nan"), dtype=BF16, device=device)
    stored = torch.full_like(planes, float("nan"))
    box = Box((1, spec.rows, width), swizzle_bytes)
    pointers = (tensor.data_ptr() for tensor in (source, target, plain))
    maps = (tensor_map_of(planes, box), tensor_map_of(stored, box))
    kernel_for(spec, device).launch(device, 3, 1, *pointers, *load, *store, *maps)
    (load_column, load_row), (column, row) = load, store
    padded = torch.nn.functional.pad(planes, (64, 64, 16, 16))
    read = padded[:, 16 + load_row : 16 + load_row + spec.rows, 64 + load_column : 64 + load_column + width]
    assert torch.equal(target, source)
    assert torch.equal(plain, read)
    expected = torch.full_like(planes, float("nan"))
    inside = expected[:, row : row + spec.rows, column : column + width]
    inside.copy_(-read[:, : inside.shape[1], : inside.shape[2]])
    assert torch.equal(stored.nan_to_num(1000), expected.nan_to_num(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("swizzle_bytes", [32, 64, 128])
@pytest.mark.parametrize("store", [(0, 0), (8, 5), (24, 11), (40, 19)], ids=str)
def test_stores_drop_what_is_past_the_end(device, swizzle_bytes, store):
    check_copies(device, swizzle_bytes, (8, 3), store)


@pytest.mark.gpu
@pytest.mark.parametrize("swizzle_bytes", [32, 64, 128])
@pytest.mark.parametrize(
    "load", [(0, 0), (8, 5), (24, 11), (48, 20), (-8, 5), (8, -3), (-8, -3), (-64, 0), (0, -16)], ids=str
)
def test_loads_read_zeros_outside(device, swizzle_bytes, load):
    check_copies(device, swizzle_bytes, load, (0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_rows", [16, 11, 0])
def test_a_warp_multiplies_what_it_copied(device, dtype, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    a, b, v = (integers(generator, shape, dtype, 1) for shape in ((16, 64), (8, 64), (64, 8)))
    by_b, by_v = torch.full((2, 16, 8), float("nan"), device=device)
    rounded = torch.full((16, 8), float("nan"), dtype=dtype, device=device)
    pointers = (tensor.data_ptr() for tensor in (a, b, v, by_b, by_v, rounded))
    kernel_for(WarpMmaSpec(dtype), device).launch(device, 1, 1, *pointers, num_rows)
    kept = a.double() * (torch.arange(16, device=device) < num_rows)[:, None]
    assert torch.equal(by_b.double(), kept @ b.double().T)
    assert torch.equal(by_v.double(), kept @ v.double())
    assert torch.equal(rounded.double(), kept @ v.double())


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_of_a_cluster_reach_each_other(device, blocks):
    num_clusters = 3
    source = integers(torch.Generator().manual_seed(0), (num_clusters * 8, 32), torch.float32, 1000)
    totals = torch.full((num_clusters * blocks,), float("nan"), device=device)
    boxes = torch.full((num_clusters, blocks, 8, 32), float("nan"), device=device)
    kernel = kernel_for(ClusterShareSpec(blocks), device)
    box = tensor_map_of(source, Box((8, 32)))
    kernel.launch(device, num_clusters * blocks, 1, totals.data_ptr(), boxes.data_ptr(), box)
    expected = torch.arange(1, num_clusters * blocks + 1, device=device).view(num_clusters, blocks).sum(1) * blocks
    assert torch.equal(totals.view(num_clusters, blocks).long(), expected[:, None].expand(-1, blocks))
    # With the default swizzle of 128 bytes, units of 16 bytes lie where row and unit xor to.
    unit = torch.arange(8, device=device)
    places = unit[:, None] ^ unit[None, :]
    swizzled = source.view(num_clusters, 8, 8, 4)[:, unit[:, None], places]
    assert torch.equal(boxes.view(num_clusters, blocks, 8, 8, 4), swizzled[:, None].expand(-1, blocks, -1, -1, -1))
    with pytest.raises(LaunchError, match=f"in clusters of {blocks}"):
        kernel.launch(device, num_clusters * blocks + 1, 1, totals.data_ptr(), boxes.data_ptr(), box)


@pytest.mark.gpu
def test_a_launch_needs_its_tensor_maps(device):
    kernel = kernel_for(ClusterShareSpec(2), device)
    with pytest.raises(LaunchError, match="box_map is 0, not a TensorMap"):
        kernel.launch(device, 2, 1, 16, 16, 0)
