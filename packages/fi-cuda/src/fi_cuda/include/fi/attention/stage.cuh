// A stage of a warp's ring: a chunk's rows of K, then of V, each as TMA's swizzle lays them out, so that the rows of an 8x8
// matrix that ldmatrix reads lie in different banks. The copies of cp.async follow the same layout.
#pragma once

#include "fi/tile/swizzle.cuh"

namespace fi {

// The widest swizzle whose boxes fill a row.
FI_HOST_DEVICE constexpr int swizzle_of(int row_bytes) { return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32; }

// Rows of kRowBytes (a multiple of 16) for kTokens tokens: column boxes one after another, the last one perhaps not full.
template <int kRowBytes, int kTokens>
struct ChunkRows {
  static constexpr int kSwizzle = swizzle_of(kRowBytes);
  static constexpr int kColumns = (kRowBytes + kSwizzle - 1) / kSwizzle;
  static constexpr int kColumnBytes = kTokens * kSwizzle;
  static constexpr int kBytes = kColumns * kColumnBytes;
  static_assert(kRowBytes % 16 == 0, "rows are moved in units of 16 bytes");

  static __device__ __forceinline__ int place(int row, int byte) { return swizzled_place<kSwizzle, kTokens>(row, byte); }
};

template <class Config>
struct ChunkStage {
  static constexpr int kTokens = Config::kChunkTokens;
  static constexpr int kKeyBytes = Config::kHeadDim * static_cast<int>(sizeof(typename Config::Stored));
  static constexpr int kValueBytes = Config::kHeadDimVo * static_cast<int>(sizeof(typename Config::Stored));
  using Keys = ChunkRows<kKeyBytes, kTokens>;
  using Values = ChunkRows<kValueBytes, kTokens>;
  static constexpr int kAlignment = 1024;  // of what a 128-byte swizzle begins with
  static constexpr int kValueBegin = (Keys::kBytes + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kBytes = (kValueBegin + Values::kBytes + kAlignment - 1) / kAlignment * kAlignment;
};

}  // namespace fi
