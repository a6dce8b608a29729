// Descriptors of wgmma's operands in shared memory, in the layouts that TMA's swizzles give.
// PTX ISA, section "Asynchronous Warpgroup Level Matrix Instructions: Shared Memory Matrix Layout, Matrix Descriptor Format".
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi::ptx {

// Which dim of an operand is contiguous: K, or M of A and N of B.
enum class Major { kK, kMN };

// Fields of 16-byte units: address in bits 0-13, leading offset in 16-29, stride offset in 32-45; swizzle in 62-63.
// kSwizzleBytes 32, 64 or 128. The swizzle's pattern of 8 rows must begin at a multiple of 8 * kSwizzleBytes; `address` is
// that of the operand's first element and may be advanced from there by the functions below.
template <int kSwizzleBytes>
FI_HOST_DEVICE constexpr unsigned long long descriptor(unsigned address, unsigned leading_bytes, unsigned stride_bytes) {
  static_assert(kSwizzleBytes == 32 || kSwizzleBytes == 64 || kSwizzleBytes == 128);
  constexpr unsigned long long kMode = kSwizzleBytes == 128 ? 1 : kSwizzleBytes == 64 ? 2 : 3;
  return kMode << 62 | static_cast<unsigned long long>(stride_bytes >> 4 & 0x3fffu) << 32 |
         static_cast<unsigned long long>(leading_bytes >> 4 & 0x3fffu) << 16 | (address >> 4 & 0x3fffu);
}

// K-major: rows of M or N, of kSwizzleBytes of K each, one after another, as TMA writes a box whose inner dim is K. Groups of
// 8 rows follow one another without gaps. To advance K within a row, add its bytes (32 an instruction) to the address; K
// beyond a row is another box.
template <int kSwizzleBytes>
FI_HOST_DEVICE constexpr unsigned long long k_major_descriptor(unsigned address) {
  return descriptor<kSwizzleBytes>(address, 16, 8 * kSwizzleBytes);
}

// MN-major: rows of K, of kSwizzleBytes of M or N each, as TMA writes a box whose inner dim is M or N (a V of [tokens, dim]).
// Where M or N exceeds a row, the next box of the same rows begins `box_bytes` later. To advance K, add kSwizzleBytes a row
// (16 rows an instruction) to the address.
template <int kSwizzleBytes>
FI_HOST_DEVICE constexpr unsigned long long mn_major_descriptor(unsigned address, unsigned box_bytes) {
  return descriptor<kSwizzleBytes>(address, box_bytes, 8 * kSwizzleBytes);
}

// The descriptor of the operand `num_bytes` further on (a multiple of 16).
FI_HOST_DEVICE constexpr unsigned long long advance(unsigned long long descriptor, unsigned num_bytes) {
  return descriptor + (num_bytes >> 4);
}

}  // namespace fi::ptx
