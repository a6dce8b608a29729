// output [M, N] = A [M, K] B [N, K]^T, or A B for B [K, N]: a warpgroup loads tiles into a ring, two multiply 64 rows each.
#pragma once

#include "fi/pipeline/ring.cuh"
#include "fi/pipeline/roles.cuh"
#include "fi/ptx/tma.cuh"
#include "fi/ptx/wgmma.cuh"
#include "fi/tile/fragments.cuh"

namespace fi {

template <class Config>
struct GemmTiles {
  static constexpr int kRows = 128;
  static constexpr int kDepth = Config::kSwizzleBytes / static_cast<int>(sizeof(typename Config::Operand));
  static constexpr int kABytes = kRows * Config::kSwizzleBytes;
  static constexpr int kBBytes = Config::kColumns * Config::kSwizzleBytes;
  static constexpr int kStageBytes = kBBytes + (Config::kRegisterA ? 0 : kABytes);
  static constexpr int kSteps = Config::kSwizzleBytes / 32;
  using Roles = WarpgroupRoles<2, 40, 232>;
  static constexpr int kReleases = 8;  // one by each consumer warp

  Ring<Config::kStages>& ring;
  unsigned char* stages;

  __device__ __forceinline__ unsigned char* b(int stage) const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* a(int stage) const { return b(stage) + kBBytes; }
};

template <class Config, class Params>
__device__ __forceinline__ void load_tiles(const Params& params, const ptx::TensorMap& a_map, const ptx::TensorMap& b_map,
                                           const GemmTiles<Config>& tiles) {
  using Tiles = GemmTiles<Config>;
  const int row = blockIdx.x * Tiles::kRows;
  const int column = blockIdx.y * Config::kColumns;
  auto cursor = RingCursor<Config::kStages>::producer();
  for (int depth = 0; depth < params.depth; depth += Tiles::kDepth, cursor.advance()) {
    tiles.ring.acquire(cursor);
    unsigned long long* full = tiles.ring.expect(cursor, Tiles::kStageBytes);
    unsigned char* b = tiles.b(cursor.stage);
    if constexpr (Config::kTransposedB) {
      // Boxes of kDepth columns, as wide as the swizzle.
      for (int part = 0; part < Config::kColumns; part += Tiles::kDepth) {
        ptx::tma_load_2d(b + part * Config::kSwizzleBytes, &b_map, full, column + part, depth);
      }
    } else {
      ptx::tma_load_2d(b, &b_map, full, depth, column);
    }
    if constexpr (!Config::kRegisterA) ptx::tma_load_2d(tiles.a(cursor.stage), &a_map, full, depth, row);
  }
}

// The A operands of a tile's steps, from global memory.
template <class Config, class Params>
__device__ __forceinline__ void read_a(const Params& params, int first_row, int first_column,
                                       unsigned (&fragments)[GemmTiles<Config>::kSteps][4]) {
  using Operand = typename Config::Operand;
  constexpr int kElements = 4 / static_cast<int>(sizeof(Operand));
#pragma unroll
  for (int part = 0; part < 4 * GemmTiles<Config>::kSteps; ++part) {
    const Element place = wgmma_a_element<sizeof(Operand)>(threadIdx.x % kWarpgroupThreads, part % 4 * kElements);
    const int column = first_column + part / 4 * 8 * kElements + place.column;
    const Operand* a = static_cast<const Operand*>(params.a) + (first_row + place.row) * params.depth + column;
    fragments[part / 4][part % 4] = *reinterpret_cast<const unsigned*>(a);
  }
}

template <class Config, class Params>
__device__ __forceinline__ void multiply_tiles(const Params& params, const GemmTiles<Config>& tiles, int warpgroup) {
  using Tiles = GemmTiles<Config>;
  using Operand = typename Config::Operand;
  constexpr ptx::Major kMajorB = Config::kTransposedB ? ptx::Major::kMN : ptx::Major::kK;
  constexpr int kStepBytesB = Config::kTransposedB ? 16 * Config::kSwizzleBytes : 32;
  const int first_row = blockIdx.x * Tiles::kRows + warpgroup * 64;
  float accumulator[Config::kColumns / 2] = {};
  auto cursor = RingCursor<Config::kStages>::consumer();
  for (int depth = 0; depth < params.depth; depth += Tiles::kDepth, cursor.advance()) {
    const unsigned b = ptx::shared_address(tiles.b(cursor.stage));
    const unsigned long long descriptor_b = Config::kTransposedB
        ? ptx::mn_major_descriptor<Config::kSwizzleBytes>(b, Tiles::kDepth * Config::kSwizzleBytes)
        : ptx::k_major_descriptor<Config::kSwizzleBytes>(b);
    const unsigned long long descriptor_a = ptx::k_major_descriptor<Config::kSwizzleBytes>(
        ptx::shared_address(tiles.a(cursor.stage)) + warpgroup * 64 * Config::kSwizzleBytes);
    unsigned fragments[Tiles::kSteps][4];
    if constexpr (Config::kRegisterA) read_a<Config>(params, first_row, depth, fragments);
    tiles.ring.wait_full(cursor);
    ptx::pin_registers(accumulator);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tiles::kSteps; ++step) {
      const unsigned long long step_b = ptx::advance(descriptor_b, step * kStepBytesB);
      if constexpr (Config::kRegisterA) {
        ptx::wgmma_rs<Operand, Config::kColumns, kMajorB>(accumulator, fragments[step], step_b, depth + step > 0);
      } else {
        ptx::wgmma_ss<Operand, Config::kColumns, ptx::Major::kK, kMajorB>(
            accumulator, ptx::advance(descriptor_a, step * 32), step_b, depth + step > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(accumulator);
    if (threadIdx.x % kWarpThreads == 0) tiles.ring.release(cursor);
  }
#pragma unroll
  for (int idx = 0; idx < Config::kColumns / 2; ++idx) {
    const Element place = wgmma_accumulator_element(threadIdx.x % kWarpgroupThreads, idx);
    const int row = first_row + place.row;
    const int column = blockIdx.y * Config::kColumns + place.column;
    if (row < params.num_rows && column < params.num_columns) {
      static_cast<float*>(params.output)[row * params.num_columns + column] = accumulator[idx];
    }
  }
}

template <class Config, class Params>
__device__ __forceinline__ void wgmma_gemm(const Params& params, const ptx::TensorMap& a_map, const ptx::TensorMap& b_map) {
  using Tiles = GemmTiles<Config>;
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Ring<Config::kStages> ring;
  const unsigned to_pattern = -ptx::shared_address(dynamic_shared) % 1024;
  const Tiles tiles = {ring, dynamic_shared + to_pattern};
  if (threadIdx.x == 0) {
    ring.init(1, Tiles::kReleases);
    ptx::prefetch_tensor_map(&b_map);
  }
  __syncthreads();
  Tiles::Roles::run(
      [&] {
        if (elect_one_of_warpgroup()) load_tiles(params, a_map, b_map, tiles);
      },
      [&](int warpgroup) { multiply_tiles(params, tiles, warpgroup); });
}

}  // namespace fi
