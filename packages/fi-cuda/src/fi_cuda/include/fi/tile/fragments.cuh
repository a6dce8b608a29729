// Which element of a matrix a thread holds in its registers. Elements are counted through the registers, low bits first.
// PTX ISA, sections "Warp Level Matrix Instructions: Matrix Fragments for mma.m16n8k16" and "Asynchronous Warpgroup Level
// Matrix Instructions: Register Fragments".
//
// 16 columns of a wgmma accumulator (elements 8 j to 8 j + 7) lie as the 16-bit A operand does: converted in place, a
// product is the next product's operand.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

struct Element {
  int row, column;
};

// mma.m16n8k16: A is [16, 16], 8 elements a lane.
FI_HOST_DEVICE constexpr Element mma_a_element(int lane, int idx) {
  return {lane / 4 + idx / 2 % 2 * 8, lane % 4 * 2 + idx % 2 + idx / 4 * 8};
}

// B is [16 (K), 8 (N)], 4 elements a lane.
FI_HOST_DEVICE constexpr Element mma_b_element(int lane, int idx) {
  return {lane % 4 * 2 + idx % 2 + idx / 2 * 8, lane / 4};
}

// The accumulator is [16, 8], 4 elements a lane.
FI_HOST_DEVICE constexpr Element mma_accumulator_element(int lane, int idx) {
  return {lane / 4 + idx / 2 * 8, lane % 4 * 2 + idx % 2};
}

// wgmma: the accumulator is [64, N], N / 2 elements a thread; `thread` counts within the warpgroup.
FI_HOST_DEVICE constexpr Element wgmma_accumulator_element(int thread, int idx) {
  return {thread / 32 * 16 + thread % 32 / 4 + idx / 2 % 2 * 8, idx / 4 * 8 + thread % 4 * 2 + idx % 2};
}

// A in registers: [64, 16] of 16 bits with 8 elements a thread, or [64, 32] of 8 bits with 16.
template <int kElementBytes>
FI_HOST_DEVICE constexpr Element wgmma_a_element(int thread, int idx) {
  static_assert(kElementBytes == 1 || kElementBytes == 2);
  constexpr int kTogether = 4 / kElementBytes;
  return {thread / 32 * 16 + thread % 32 / 4 + idx / kTogether % 2 * 8,
          thread % 4 * kTogether + idx % kTogether + idx / (2 * kTogether) * 4 * kTogether};
}

}  // namespace fi
