// Where TMA's swizzles put bytes: 16-byte units within 128 bytes change places from row to row, so that 8 rows' units of one
// column lie in different banks. PTX ISA, section "Tensors: Swizzling Modes"; wgmma_descriptor.cuh describes the same tiles.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

// The place of byte `offset` of an unswizzled tile whose base is a multiple of 8 * kSwizzleBytes: address bits 4 to 6 (4 to
// 5, bit 4) are xored with bits 7 to 9 (7 to 8, bit 7) for 128 (64, 32) bytes. It is its own inverse.
template <int kSwizzleBytes>
FI_HOST_DEVICE constexpr int swizzled(int offset) {
  static_assert(kSwizzleBytes == 32 || kSwizzleBytes == 64 || kSwizzleBytes == 128);
  return offset ^ (offset >> 7 & (kSwizzleBytes / 16 - 1)) << 4;
}

// The place of byte `column` of `row` in a tile of kRows rows (a multiple of 8) of any width: boxes of kSwizzleBytes columns
// one after another, each as TMA writes it.
template <int kSwizzleBytes, int kRows>
FI_HOST_DEVICE constexpr int swizzled_place(int row, int column) {
  static_assert(kRows % 8 == 0, "the boxes would not begin where the pattern does");
  const int box = column / kSwizzleBytes * (kRows * kSwizzleBytes);
  return box + swizzled<kSwizzleBytes>(row * kSwizzleBytes + column % kSwizzleBytes);
}

}  // namespace fi
