// A row of the work list as the attention kernels read it: the scheduler's record of an item, and what every layer of a step
// would otherwise look up again.
#pragma once

namespace fi {

// How a request's tokens are found, and which columns a packed mask has: numbered as in fi_cuda.kernels.attention.
enum TableForm { kRagged, kDense, kIndptr };
enum MaskForm { kNoMask, kMaskKv, kMaskNew };

// Packed query row r of a request is its new token r / group_size and query head kv_head * group_size + r % group_size.
struct alignas(16) AttentionItem {
  int request, kv_head, q_tile, kind;
  int kv_begin, kv_end;  // tokens
  int slot;              // where the partial result goes; -1: the item is its whole tile
  int kv_first;          // keys before it are another item's: 0 unless a shared prefix ends inside a page
  int q_begin, q_len, kv_len;
  int merge_idx;  // of the split tile; with slot -1: -1
  int head_slot, tail_begin, tail_end;  // the tile's pieces: head_slot, then tail_begin .. tail_end - 1
  int head_slots;  // a row of the order of tiles has the slots of a head here, if the tile is in pieces; else 0

  __device__ __forceinline__ int num_pieces() const { return 1 + tail_end - tail_begin; }
  // Its number among the pieces of its tile; 0 for a whole tile.
  __device__ __forceinline__ int piece() const { return slot < 0 || slot == head_slot ? 0 : slot - tail_begin + 1; }
  __device__ __forceinline__ int slot_of(int piece) const { return piece == 0 ? head_slot : tail_begin + piece - 1; }
  // Tokens before the request's first new one.
  __device__ __forceinline__ int offset() const { return kv_len - q_len; }
};
static_assert(sizeof(AttentionItem) == 64, "16 int32, as the planner writes them");

// What a worker begins with: the range of its items, and a copy of the first.
struct alignas(16) WorkerStart {
  int begin, end;
  int reserved[14];
  AttentionItem first;
};
static_assert(sizeof(WorkerStart) == 128, "32 int32, as the planner writes them");

}  // namespace fi
