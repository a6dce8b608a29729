// The floor of decode attention: reads the pages of a batch through its page table into shared memory, and nothing else.
//
// K and V lie apart. A page is cut into pieces, and the pieces of all pages are shared evenly among the blocks. A block is
// one warp: each lane issues the bulk copy of one piece of a stage, because pages of few bytes need many issuers, and has
// read where its next piece is before it waits. Nobody reads what arrives; a stage is filled again when its bytes are there.
// Config: kRingBytes, kMaxStages, kNumThreads (32).
// Params: k, v (begin of the caches; a page has page_bytes), pages int32 [num_pages] ids, valid_bytes int32 [num_pages] of
// each page that belong to its request; piece_bytes, a multiple of 16, divides page_bytes; a stage is a piece a lane.
#pragma once

#include "fi/ptx/bulk_copy.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

// Where a piece is, and its bytes (0: past the request's end, or past the block's share).
struct Piece {
  const char* source;
  int num_bytes;
};

template <class Params>
__device__ __forceinline__ Piece piece_at(const Params& params, int piece, int end, int pieces_per_page) {
  if (piece >= end) return {nullptr, 0};
  const int entry = piece / pieces_per_page;
  const int within = (piece - entry * pieces_per_page) * params.piece_bytes;
  const int which = entry >> 1;  // K and V of a page follow each other
  const char* cache = static_cast<const char*>(entry & 1 ? params.v : params.k);
  const int64 page = static_cast<const int*>(params.pages)[which];
  const int left = static_cast<const int*>(params.valid_bytes)[which] - within;
  return {cache + page * params.page_bytes + within, max(0, min(left, params.piece_bytes))};
}

template <class Config, class Params>
__device__ __forceinline__ void stream_pages(const Params& params) {
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) unsigned long long full[Config::kMaxStages];
  const int lane = static_cast<int>(threadIdx.x);
  const int stage_bytes = Config::kNumThreads * params.piece_bytes;
  const int num_stages = min(Config::kMaxStages, Config::kRingBytes / stage_bytes);
  if (lane == 0) {
    for (int idx = 0; idx < num_stages; ++idx) ptx::init_barrier(&full[idx], Config::kNumThreads);
    ptx::fence_barrier_init();
  }
  __syncwarp();
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  const int pieces_per_page = params.page_bytes / params.piece_bytes;
  const int64 total = 2 * params.num_pages * pieces_per_page;
  const int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
  const int num_fills = (end - begin + Config::kNumThreads - 1) / Config::kNumThreads;

  char* slot = ring + lane * params.piece_bytes;
  Piece next = piece_at(params, begin + lane, end, pieces_per_page);
  int stage = 0;
  unsigned parity = 1;  // of the stage's previous fill: the first round waits for none
  for (int fill = 0; fill < num_fills; ++fill) {
    const Piece piece = next;
    next = piece_at(params, begin + (fill + 1) * Config::kNumThreads + lane, end, pieces_per_page);
    if (fill >= num_stages) ptx::wait_barrier(&full[stage], parity);
    ptx::arrive_and_expect_bytes(&full[stage], piece.num_bytes);
    if (piece.num_bytes > 0) ptx::bulk_load(slot + stage * stage_bytes, piece.source, piece.num_bytes, &full[stage]);
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  for (int fill = max(0, num_fills - num_stages); fill < num_fills; ++fill) {
    ptx::wait_barrier(&full[fill % num_stages], (fill / num_stages) & 1);
  }
}

}  // namespace fi
