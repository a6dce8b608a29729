"""Index maths of swizzles, fragments and descriptors, run on the CPU: against the PTX ISA's tables written another way, and
swizzles and descriptors against each other."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess

import pytest
from fi_cuda.compile import INCLUDE_FOLDER

SOURCE = """
#include "fi/ptx/wgmma_descriptor.cuh"
#include "fi/tile/fragments.cuh"
#include "fi/tile/swizzle.cuh"

static_assert(fi::swizzled<128>(128) == 144);
static_assert(fi::mma_a_element(31, 7).row == 15);
static_assert(fi::ptx::k_major_descriptor<128>(1024) == 0x4000004000010040ull);

template <int kBytes>
int place(int rows, int row, int column) {
  return rows == 8 ? fi::swizzled_place<kBytes, 8>(row, column) : fi::swizzled_place<kBytes, 64>(row, column);
}

extern "C" {
int swizzled(int bytes, int offset) {
  return bytes == 128 ? fi::swizzled<128>(offset) : bytes == 64 ? fi::swizzled<64>(offset) : fi::swizzled<32>(offset);
}
int swizzled_place(int bytes, int rows, int row, int column) {
  return bytes == 128 ? place<128>(rows, row, column)
         : bytes == 64 ? place<64>(rows, row, column) : place<32>(rows, row, column);
}
unsigned long long k_major(int bytes, unsigned address) {
  return bytes == 128 ? fi::ptx::k_major_descriptor<128>(address)
         : bytes == 64 ? fi::ptx::k_major_descriptor<64>(address) : fi::ptx::k_major_descriptor<32>(address);
}
unsigned long long mn_major(int bytes, unsigned address, unsigned box) {
  return bytes == 128 ? fi::ptx::mn_major_descriptor<128>(address, box)
         : bytes == 64 ? fi::ptx::mn_major_descriptor<64>(address, box) : fi::ptx::mn_major_descriptor<32>(address, box);
}
unsigned long long advance(unsigned long long descriptor, unsigned bytes) { return fi::ptx::advance(descriptor, bytes); }
void element(int kind, int thread, int idx, int* out) {
  const fi::Element found = kind == 0   ? fi::mma_a_element(thread, idx)
                            : kind == 1 ? fi::mma_b_element(thread, idx)
                            : kind == 2 ? fi::mma_accumulator_element(thread, idx)
                            : kind == 3 ? fi::wgmma_accumulator_element(thread, idx)
                            : kind == 4 ? fi::wgmma_a_element<2>(thread, idx)
                                        : fi::wgmma_a_element<1>(thread, idx);
  out[0] = found.row;
  out[1] = found.column;
}
}
"""
MMA_A, MMA_B, MMA_ACCUMULATOR, WGMMA_ACCUMULATOR, WGMMA_A16, WGMMA_A8 = range(6)


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "a C++ compiler is needed to run the headers on the CPU"
    folder = tmp_path_factory.mktemp("maths")
    (folder / "maths.cpp").write_text(SOURCE)
    library = folder / "maths.so"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{INCLUDE_FOLDER}"]
    subprocess.run([compiler, *options, "-o", library, folder / "maths.cpp"], check=True, timeout=100)
    loaded = ctypes.CDLL(str(library))
    loaded.k_major.restype = loaded.mn_major.restype = loaded.advance.restype = ctypes.c_ulonglong
    loaded.advance.argtypes = (ctypes.c_ulonglong, ctypes.c_uint)
    return loaded


def swizzle_by_bits(num_bytes, offset):
    """The rule as bits: address bit 4 + i takes in bit 7 + i, for as many i as 16-byte units double to the width."""
    bits = [offset >> i & 1 for i in range(16)]
    for i in range({32: 1, 64: 2, 128: 3}[num_bytes]):
        bits[4 + i] ^= bits[7 + i]
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("num_bytes", [32, 64, 128])
def test_swizzle_exchanges_units_within_a_row_of_banks(maths, num_bytes):
    found = [maths.swizzled(num_bytes, offset) for offset in range(4096)]
    assert found == [swizzle_by_bits(num_bytes, offset) for offset in range(4096)]
    assert sorted(found) == list(range(4096))
    assert all(maths.swizzled(num_bytes, place) == offset for offset, place in enumerate(found))


@pytest.mark.parametrize("num_bytes", [32, 64, 128])
def test_column_of_8_rows_lies_in_all_banks(maths, num_bytes):
    for unit in range(num_bytes // 16):
        places = [maths.swizzled_place(num_bytes, 8, row, 16 * unit) for row in range(8)]
        assert len({place // 16 % 8 for place in places}) == 8


@pytest.mark.parametrize("num_bytes", [32, 64, 128])
def test_wide_tiles_are_boxes_one_after_another(maths, num_bytes):
    for row, column in itertools.product(range(64), range(0, 256, 4)):
        box, inner = divmod(column, num_bytes)
        expected = box * 64 * num_bytes + swizzle_by_bits(num_bytes, row * num_bytes + inner)
        assert maths.swizzled_place(num_bytes, 64, row, column) == expected


def elements(maths, kind, thread, count):
    out = (ctypes.c_int * 2)()
    found = []
    for idx in range(count):
        maths.element(kind, thread, idx, out)
        found.append(tuple(out))
    return found


def mma_tables(lane):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16": group = lane >> 2, in_group = lane % 4."""
    group, in_group = lane >> 2, lane % 4
    a = [(group if i in (0, 1, 4, 5) else group + 8, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)]
    b = [(in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]
    accumulator = [(group if i < 2 else group + 8, in_group * 2 + (i & 1)) for i in range(4)]
    return a, b, accumulator


def test_mma_fragments_are_those_of_the_tables(maths):
    for lane in range(32):
        a, b, accumulator = mma_tables(lane)
        assert elements(maths, MMA_A, lane, 8) == a
        assert elements(maths, MMA_B, lane, 4) == b
        assert elements(maths, MMA_ACCUMULATOR, lane, 4) == accumulator


def test_wgmma_fragments_are_four_warps_of_mma_fragments(maths):
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        a, _, accumulator = mma_tables(lane)
        assert elements(maths, WGMMA_A16, thread, 8) == [(16 * warp + row, column) for row, column in a]
        expected = [(16 * warp + row, 8 * part + column) for part in range(32) for row, column in accumulator]
        assert elements(maths, WGMMA_ACCUMULATOR, thread, 128) == expected


def test_wgmma_a_of_bytes_has_4_neighbours_a_register(maths):
    # PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk32": 16-bit pairs become groups of 4 bytes.
    for thread in range(128):
        wide = elements(maths, WGMMA_A16, thread, 8)
        expected = [(row, 2 * column + i) for row, column in wide[::2] for i in range(4)]
        assert elements(maths, WGMMA_A8, thread, 16) == expected


@pytest.mark.parametrize(
    ("kind", "threads", "count", "size"),
    [
        (MMA_A, 32, 8, (16, 16)),
        (MMA_B, 32, 4, (16, 8)),
        (MMA_ACCUMULATOR, 32, 4, (16, 8)),
        (WGMMA_ACCUMULATOR, 128, 128, (64, 256)),
        (WGMMA_A16, 128, 8, (64, 16)),
        (WGMMA_A8, 128, 16, (64, 32)),
    ],
)
def test_each_element_has_one_holder(maths, kind, threads, count, size):
    held = [place for thread in range(threads) for place in elements(maths, kind, thread, count)]
    assert sorted(held) == list(itertools.product(*map(range, size)))


def test_16_accumulator_columns_are_an_a_operand(maths):
    for thread in (0, 37, 127):
        accumulator = elements(maths, WGMMA_ACCUMULATOR, thread, 32)
        for part in range(4):
            operand = [(row, 16 * part + column) for row, column in elements(maths, WGMMA_A16, thread, 8)]
            assert accumulator[8 * part : 8 * part + 8] == operand


MODES = {128: 1, 64: 2, 32: 3}


def fields(descriptor):
    """(address, leading, stride) in bytes and the mode; everything else must be 0."""
    address, leading, stride = (descriptor >> shift & 0x3FFF for shift in (0, 16, 32))
    mode = descriptor >> 62
    assert descriptor == address | leading << 16 | stride << 32 | mode << 62
    return 16 * address, 16 * leading, 16 * stride, mode


@pytest.mark.parametrize("num_bytes", [32, 64, 128])
def test_k_major_descriptor_finds_the_units_of_the_tile(maths, num_bytes):
    base = 0x8000
    address, _, stride, mode = fields(maths.k_major(num_bytes, base))
    assert (address, mode) == (base, MODES[num_bytes])
    for row, step in itertools.product(range(64), range(num_bytes // 32)):
        advanced, *same = fields(maths.advance(maths.k_major(num_bytes, base), 32 * step))
        assert same == [16, stride, mode]
        for half in range(2):
            # The canonical layout: 8 rows of the swizzle's width, then the stride; swizzled as addresses.
            plain = advanced + row // 8 * stride + row % 8 * num_bytes + 16 * half
            expected = base + maths.swizzled_place(num_bytes, 64, row, 32 * step + 16 * half)
            assert swizzle_by_bits(num_bytes, plain) == expected


@pytest.mark.parametrize("num_bytes", [32, 64, 128])
def test_mn_major_descriptor_finds_the_units_of_the_tile(maths, num_bytes):
    base, box = 0x4000, 64 * num_bytes
    for step in range(4):
        address, leading, stride, mode = fields(
            maths.advance(maths.mn_major(num_bytes, base, box), 16 * num_bytes * step)
        )
        assert mode == MODES[num_bytes]
        for depth, unit in itertools.product(range(16), range(256 // 16)):
            part, inner = divmod(16 * unit, num_bytes)
            # Columns: units within the swizzle's width, then the leading offset; rows: 8, then the stride.
            plain = address + part * leading + inner + depth // 8 * stride + depth % 8 * num_bytes
            expected = base + maths.swizzled_place(num_bytes, 64, 16 * step + depth, 16 * unit)
            assert swizzle_by_bits(num_bytes, plain) == expected


def test_addresses_beyond_a_descriptor_wrap_as_the_hardware_does(maths):
    # 18 bits of address: all of a multiprocessor's 227 KiB.
    assert fields(maths.k_major(128, 227 * 1024 // 1024 * 1024))[0] == 227 * 1024
