// One warp's products of A [16, 64] with B [8, 64] transposed and with V [64, 8], rows of A from `num_rows` on taken as 0.
#pragma once

#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/ldmatrix.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/ptx/mma.cuh"
#include "fi/tile/fragments.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

template <int kRows, int kRowBytes>
__device__ __forceinline__ void copy_rows(unsigned char* shared, const void* global, int num_rows) {
  for (int unit = threadIdx.x; unit < kRows * kRowBytes / 16; unit += 32) {
    const int row = unit / (kRowBytes / 16), column = unit % (kRowBytes / 16) * 16;
    int place = row * kRowBytes + column;
    if constexpr (kRowBytes == 128) place = swizzled_place<128, kRows>(row, column);
    const unsigned char* from = static_cast<const unsigned char*>(global);
    ptx::cp_async_16(shared + place, row < num_rows ? from + row * kRowBytes + column : from, row < num_rows);
  }
}

template <class Config, class Params>
__device__ __forceinline__ void warp_mma(const Params& params) {
  using Operand = typename Config::Operand;
  __shared__ alignas(1024) unsigned char a[16 * 128], b[8 * 128], v[64 * 16], result[16 * 16];
  __shared__ unsigned long long barrier;
  const int lane = threadIdx.x;
  if (lane == 0) ptx::init_barrier(&barrier, 32);
  __syncwarp();
  copy_rows<16, 128>(a, params.a, params.num_rows);
  copy_rows<8, 128>(b, params.b, 8);
  ptx::cp_async_commit();
  copy_rows<64, 16>(v, params.v, 64);
  ptx::cp_async_arrive_noinc(&barrier);
  ptx::cp_async_wait<0>();
  ptx::wait_barrier(&barrier, 0);
  __syncwarp();

  float by_b[4] = {}, by_v[4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    unsigned fragment_a[4], fragment_b[2], fragment_v[2];
    ptx::ldmatrix_x4(fragment_a, a + swizzled_place<128, 16>(lane % 16, (2 * step + lane / 16) * 16));
    ptx::ldmatrix_x2(fragment_b, b + swizzled_place<128, 8>(lane % 8, (2 * step + lane / 8 % 2) * 16));
    ptx::ldmatrix_x2_trans(fragment_v, v + (step * 16 + lane % 16) * 16);
    ptx::mma_m16n8k16<Operand>(by_b, fragment_a, fragment_b);
    ptx::mma_m16n8k16<Operand>(by_v, fragment_a, fragment_v);
  }
#pragma unroll
  for (int idx = 0; idx < 4; ++idx) {
    const Element place = mma_accumulator_element(lane, idx);
    static_cast<float*>(params.by_b)[place.row * 8 + place.column] = by_b[idx];
    static_cast<float*>(params.by_v)[place.row * 8 + place.column] = by_v[idx];
  }
  const Operand rounded[4] = {static_cast<Operand>(by_v[0]), static_cast<Operand>(by_v[1]), static_cast<Operand>(by_v[2]),
                              static_cast<Operand>(by_v[3])};
  unsigned packed[2];
  memcpy(packed, rounded, sizeof(packed));
  ptx::stmatrix_x2(result + lane % 16 * 16, packed);
  __syncwarp();
  for (int idx = lane; idx < 16 * 8; idx += 32) {
    static_cast<Operand*>(params.rounded)[idx] = reinterpret_cast<const Operand*>(result)[idx];
  }
}

}  // namespace fi
