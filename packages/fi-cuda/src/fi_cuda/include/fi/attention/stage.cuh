// A stage of a warp's ring: a chunk's rows of K, then of V, each as TMA's swizzle lays them out, so that the rows of an 8x8
// matrix that ldmatrix reads lie in different banks. The copies of cp.async follow the same layout.
#pragma once

#include "fi/tile/swizzle.cuh"

namespace fi {

// The widest swizzle whose boxes fill a row.
FI_HOST_DEVICE constexpr int swizzle_of(int row_bytes) { return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32; }

// Rows of kRowBytes (a multiple of 16) for kTokens tokens, in boxes of kBoxTokens: a box has its columns of a swizzle's width
// one after another, the last one perhaps not full.
template <int kRowBytes, int kTokens, int kBoxTokens>
struct ChunkRows {
  static constexpr int kSwizzle = swizzle_of(kRowBytes);
  static constexpr int kColumns = (kRowBytes + kSwizzle - 1) / kSwizzle;
  static constexpr int kBoxBytes = kColumns * kBoxTokens * kSwizzle;
  static constexpr int kBytes = kTokens / kBoxTokens * kBoxBytes;
  static_assert(kRowBytes % 16 == 0, "rows are moved in units of 16 bytes");
  static_assert(kTokens % kBoxTokens == 0, "a chunk has whole boxes");

  static __device__ __forceinline__ int place(int row, int byte) {
    return row / kBoxTokens * kBoxBytes + swizzled_place<kSwizzle, kBoxTokens>(row % kBoxTokens, byte);
  }

  // The place of row first_row + row, byte first_byte + byte, for a lane's row below 16 and byte 0 or 16 of a 16-row tile
  // (first_byte a multiple of 32, or byte 0): written so that one addition a tile is left when the first ones are constants.
  static __device__ __forceinline__ int place(int first_row, int row, int first_byte, int byte) {
    const int pattern = (row * kSwizzle >> 7 & (kSwizzle / 16 - 1)) << 4 ^ byte;
    const int lane_place = row / kBoxTokens * kBoxBytes + row % kBoxTokens * kSwizzle + (first_byte % kSwizzle ^ pattern);
    return lane_place + (first_row / kBoxTokens * kBoxBytes + first_row % kBoxTokens * kSwizzle +
                         first_byte / kSwizzle * (kBoxTokens * kSwizzle));
  }
};

template <class Config>
struct ChunkStage {
  static constexpr int kTokens = Config::kChunkTokens;
  // Those of a page where a chunk has several that the copy engine brings one by one.
  static constexpr bool kPagesApart = Config::kBoxes && Config::kPageSize > 0 && Config::kPageSize < kTokens;
  static constexpr int kBoxTokens = kPagesApart ? Config::kPageSize : kTokens;
  static constexpr int kKeyBytes = Config::kHeadDim * static_cast<int>(sizeof(typename Config::Stored));
  static constexpr int kValueBytes = Config::kHeadDimVo * static_cast<int>(sizeof(typename Config::Stored));
  using Keys = ChunkRows<kKeyBytes, kTokens, kBoxTokens>;
  using Values = ChunkRows<kValueBytes, kTokens, kBoxTokens>;
  static constexpr int kAlignment = 1024;  // of what a 128-byte swizzle begins with
  static constexpr int kValueBegin = (Keys::kBytes + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kBytes = (kValueBegin + Values::kBytes + kAlignment - 1) / kAlignment * kAlignment;
};

}  // namespace fi
