// Copies bytes through a ring in shared memory, a chunk a stage: a group of threads loads, kConsumers groups store.
//
// Config: kStages, kGroupThreads (32 or 128), kConsumers, kProducerRegisters, kConsumerRegisters (for 128), kStageBytes
// (a multiple of 16), kBulkBytes (of a stage that the copy engine brings, the rest comes by cp.async), kNumThreads.
// Params: source, target, errors (an int, set if cp.async did not pad with zeros), num_bytes (a multiple of 16).
#pragma once

#include "fi/pipeline/ring.cuh"
#include "fi/pipeline/roles.cuh"
#include "fi/ptx/bulk_copy.cuh"

namespace fi {

template <class Config>
struct RingMemory {
  alignas(128) unsigned char stages[Config::kStages][Config::kStageBytes];
  Ring<Config::kStages> ring;
};

// Chunks in the order this block takes them; sometimes late, so that the other side has to wait.
template <class Config, class Params, class Body>
__device__ __forceinline__ void for_each_chunk(
    const Params& params, RingCursor<Config::kStages> cursor, int late, Body body) {
  int round = 0;
  for (int64 begin = static_cast<int64>(blockIdx.x) * Config::kStageBytes; begin < params.num_bytes;
       begin += static_cast<int64>(gridDim.x) * Config::kStageBytes) {
    if (round++ % 11 == late) __nanosleep(3000);
    const int64 left = params.num_bytes - begin;
    body(cursor, begin, left < Config::kStageBytes ? static_cast<int>(left) : Config::kStageBytes);
    cursor.advance();
  }
}

template <class Config, class Params>
__device__ __forceinline__ void produce_chunks(const Params& params, RingMemory<Config>& memory) {
  const unsigned char* source = static_cast<const unsigned char*>(params.source);
  const bool elected = Config::kGroupThreads == 32 ? ptx::elect_one() : elect_one_of_warpgroup();
  const bool leads = Config::kBulkBytes > 0 && elected;
  const auto fill = [&](RingCursor<Config::kStages> cursor, int64 begin, int num_bytes) {
    unsigned char* stage = memory.stages[cursor.stage];
    if (Config::kBulkBytes == Config::kStageBytes && !leads) return;
    memory.ring.acquire(cursor);
    if (leads) {
      const int bulk_bytes = num_bytes < Config::kBulkBytes ? num_bytes : Config::kBulkBytes;
      unsigned long long* barrier = memory.ring.expect(cursor, bulk_bytes);
      ptx::bulk_load(stage, source + begin, bulk_bytes, barrier);
    }
    if (Config::kBulkBytes < Config::kStageBytes) {
      for (int at = Config::kBulkBytes + 16 * static_cast<int>(threadIdx.x); at < Config::kStageBytes;
           at += 16 * Config::kGroupThreads) {
        ptx::cp_async_16(stage + at, source + (at < num_bytes ? begin + at : 0), at < num_bytes);
      }
      memory.ring.arrive_when_copied(cursor);
    }
  };
  for_each_chunk<Config>(params, RingCursor<Config::kStages>::producer(), 3, fill);
}

template <class Config, class Params>
__device__ __forceinline__ void consume_chunks(const Params& params, RingMemory<Config>& memory, int consumer) {
  unsigned char* target = static_cast<unsigned char*>(params.target);
  const auto drain = [&](RingCursor<Config::kStages> cursor, int64 begin, int num_bytes) {
    const unsigned char* stage = memory.stages[cursor.stage];
    memory.ring.wait_full(cursor);
    if (!memory.ring.is_full(cursor)) *static_cast<int*>(params.errors) = 1;
    const int thread = static_cast<int>(threadIdx.x) % Config::kGroupThreads;
    for (int at = 16 * (consumer + Config::kConsumers * thread); at < Config::kStageBytes;
         at += 16 * Config::kConsumers * Config::kGroupThreads) {
      const uint4 word = *reinterpret_cast<const uint4*>(stage + at);
      if (at < num_bytes) *reinterpret_cast<uint4*>(target + begin + at) = word;
      else if (at >= Config::kBulkBytes && (word.x | word.y | word.z | word.w)) *static_cast<int*>(params.errors) = 1;
    }
    __syncwarp();
    if (ptx::elect_one()) memory.ring.release(cursor);
  };
  for_each_chunk<Config>(params, RingCursor<Config::kStages>::consumer(), 5 + consumer, drain);
}

template <class Config, int kGroupThreads>
struct RolesOf;
template <class Config>
struct RolesOf<Config, 32> { using Type = WarpRoles<1, Config::kConsumers>; };
template <class Config>
struct RolesOf<Config, 128> {
  using Type = WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters>;
};

template <class Config, class Params>
__device__ __forceinline__ void probe_ring(const Params& params) {
  using Block = typename RolesOf<Config, Config::kGroupThreads>::Type;
  static_assert(Block::kNumThreads == Config::kNumThreads);
  extern __shared__ __align__(128) unsigned char shared[];
  RingMemory<Config>& memory = *reinterpret_cast<RingMemory<Config>*>(shared);
  constexpr int kCopying = Config::kBulkBytes < Config::kStageBytes ? Config::kGroupThreads : 0;
  if (threadIdx.x == 0) {
    constexpr int kWarps = Config::kConsumers * Config::kGroupThreads / kWarpThreads;
    memory.ring.init(kCopying + (Config::kBulkBytes > 0 ? 1 : 0), kWarps);
  }
  __syncthreads();
  Block::run([&] { produce_chunks<Config>(params, memory); },
             [&](int consumer) { consume_chunks<Config>(params, memory, consumer); });
}

}  // namespace fi
