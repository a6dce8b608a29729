"""The ceilings' kernels: compiled without a GPU; on one, the copy is exact and the page reader reads any batch."""

import pytest
import torch
from fi_benchmarks.kernels import SPECS, bulk_copy, copy_piece_bytes, piece_bytes_of, stream_pages
from fi_cuda.compile import compile_source
from fi_cuda.source import CompileTarget

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_they_compile_for_hopper_and_fit_on_a_multiprocessor(spec):
    artifact = compile_source(spec.source(), CompileTarget("sm_90a"))
    resources = artifact.resources
    assert artifact.cubin.startswith(b"\x7fELF")
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    assert resources.num_registers <= 64
    assert spec.shared_bytes + resources.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("page_bytes", "piece"), [(32768, 2048), (4096, 2048), (256, 256), (16 * 96 * 2, 1024), (48, 16)]
)
def test_pieces_divide_pages(page_bytes, piece):
    assert piece_bytes_of(page_bytes) == piece
    assert page_bytes % piece == 0 and piece % 16 == 0


def test_pages_that_bulk_copies_cannot_read_are_refused():
    with pytest.raises(ValueError, match="24 bytes"):
        piece_bytes_of(24)


@pytest.mark.parametrize("num_bytes", [16, 65536, 524288, 4 << 20, 1 << 30])
def test_pieces_of_a_copy_fit_a_stage(num_bytes):
    piece = copy_piece_bytes(num_bytes, 132, 16384)
    assert piece % 16 == 0 and 1024 <= piece <= 16384


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [16, 1008, 16384 * 132, (1 << 24) + 48])
def test_the_copy_is_exact_and_stays_within_its_target(num_bytes):
    source = torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.zeros(num_bytes + 64, dtype=torch.uint8, device="cuda")
    bulk_copy(source, target[:num_bytes])
    assert torch.equal(target[:num_bytes], source)
    assert not target[num_bytes:].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_pages", "page_bytes"), [(1, 256), (7, 4096), (1000, 32768), (40000, 256)])
def test_the_page_reader_ends_for_any_batch(num_pages, page_bytes):
    k, v = (torch.ones(num_pages * page_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    pages = torch.randperm(num_pages, device="cuda").int()
    for valid in (0, 16, page_bytes):
        stream_pages(k, v, page_bytes, pages, torch.full_like(pages, valid))
    torch.cuda.synchronize()
