// Copies pages of K and V from one paged cache to another, or within one, bit for bit (Kwon et al., 2023, section 4).
//
// A block copies kPacksPerThread * kNumThreads packs of one pair of pages, K's packs before V's; pinned host memory is reached
// by its address. All loads of a thread are in flight before its first store.
// Config: Index, kVectorBytes, kFlat (pages are contiguous), kStreaming (written lines leave L2 first), kPacksPerThread,
// kNumThreads.
// Params: *_k and *_v (begin of the cache), source_pages and target_pages [pairs], ids below 0 skip the pair;
// *_page_stride and *_strides (outer, inner dim of a page) in packs; k_packs and v_packs a page, of which k_width and
// v_width are contiguous, and k_inner and v_inner such rows make up an outer index.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

// The unsigned words that one load or store moves.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> { using Type = unsigned char; };
template <>
struct WordOf<2> { using Type = unsigned short; };
template <>
struct WordOf<4> { using Type = unsigned int; };
template <>
struct WordOf<8> { using Type = uint2; };
template <>
struct WordOf<16> { using Type = uint4; };

// Packs before pack `pack` of a page whose rows of `width` packs are `inner` to an outer index; a flat page is one row.
template <bool kFlat>
__device__ __forceinline__ int64 pack_offset(int pack, int width, int inner, RowStrides strides) {
  if constexpr (kFlat) return pack;
  const int row = pack / width;
  return row_offset(row, inner, strides) + (pack - row * width);
}

template <bool kStreaming, class Word>
__device__ __forceinline__ void put_word(Word* address, const Word& word) {
  if constexpr (kStreaming) {
    __stcs(address, word);
  } else {
    *address = word;
  }
}

template <class Config, class Params>
__device__ __forceinline__ void copy_pages(const Params& params) {
  using Word = typename WordOf<Config::kVectorBytes>::Type;
  using Index = typename Config::Index;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int64 source = static_cast<const Index*>(params.source_pages)[blockIdx.x];
  const int64 target = static_cast<const Index*>(params.target_pages)[blockIdx.x];
  if (source < 0 || target < 0) return;

  const Word* source_k = static_cast<const Word*>(params.source_k) + source * params.source_k_page_stride;
  const Word* source_v = static_cast<const Word*>(params.source_v) + source * params.source_v_page_stride;
  Word* target_k = static_cast<Word*>(params.target_k) + target * params.target_k_page_stride;
  Word* target_v = static_cast<Word*>(params.target_v) + target * params.target_v_page_stride;
  const int num_packs = params.k_packs + params.v_packs;
  const int first = static_cast<int>(blockIdx.y) * Config::kPacksPerThread * Config::kNumThreads + threadIdx.x;

  Word held[Config::kPacksPerThread];
#pragma unroll
  for (int idx = 0; idx < Config::kPacksPerThread; ++idx) {
    const int pack = first + idx * Config::kNumThreads;
    if (pack < params.k_packs) {
      held[idx] = source_k[pack_offset<Config::kFlat>(pack, params.k_width, params.k_inner, params.source_k_strides)];
    } else if (pack < num_packs) {
      const int rest = pack - params.k_packs;
      held[idx] = source_v[pack_offset<Config::kFlat>(rest, params.v_width, params.v_inner, params.source_v_strides)];
    }
  }
#pragma unroll
  for (int idx = 0; idx < Config::kPacksPerThread; ++idx) {
    const int pack = first + idx * Config::kNumThreads;
    if (pack < params.k_packs) {
      Word* to = target_k + pack_offset<Config::kFlat>(pack, params.k_width, params.k_inner, params.target_k_strides);
      put_word<Config::kStreaming>(to, held[idx]);
    } else if (pack < num_packs) {
      const int rest = pack - params.k_packs;
      Word* to = target_v + pack_offset<Config::kFlat>(rest, params.v_width, params.v_inner, params.target_v_strides);
      put_word<Config::kStreaming>(to, held[idx]);
    }
  }
}

}  // namespace fi
