// A ring of kStages stages of shared memory between producers, who fill a stage, and consumers, who read it, with two
// barriers a stage: full and empty. It holds the barriers only; where a stage's bytes are is the kernel's affair.
//
// Producers go round with RingCursor::producer(), consumers with RingCursor::consumer(); each waits for its barrier's
// phase of the cursor's parity and moves on. Producers of one ring may mix:
//   copy engine: one thread calls acquire, expect(bytes), and issues copies that complete on the stage's full barrier;
//   cp.async:    each thread calls acquire, issues its copies, and calls arrive_when_copied.
#pragma once

#include "fi/pipeline/cursor.cuh"
#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/mbarrier.cuh"

namespace fi {

// Lies in shared memory.
template <int kStages>
struct Ring {
  using Cursor = RingCursor<kStages>;

  unsigned long long full[kStages];
  unsigned long long empty[kStages];

  // One thread calls it, and a barrier of the block follows before any other use. `num_arrivals`: a stage is full once
  // its producers arrived that often (1 for the copy engine, and 1 for each thread that copies itself) and the expected
  // bytes are there; `num_releases`: it is empty once released that often.
  __device__ __forceinline__ void init(unsigned num_arrivals, unsigned num_releases) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init_barrier(&full[stage], num_arrivals);
      ptx::init_barrier(&empty[stage], num_releases);
    }
    ptx::fence_barrier_init();
  }

  // Producer: returns once the cursor's stage may be overwritten.
  __device__ __forceinline__ void acquire(Cursor cursor) { ptx::wait_barrier(&empty[cursor.stage], cursor.parity); }

  // Producer: whether acquire would return at once.
  __device__ __forceinline__ bool is_free(Cursor cursor) { return ptx::test_barrier(&empty[cursor.stage], cursor.parity); }

  // Producer: arrives, and makes the stage wait for `num_bytes` of copies on the barrier returned.
  __device__ __forceinline__ unsigned long long* expect(Cursor cursor, unsigned num_bytes) {
    ptx::arrive_and_expect_bytes(&full[cursor.stage], num_bytes);
    return &full[cursor.stage];
  }

  // Producer: arrives once the thread's cp.async copies so far are complete.
  __device__ __forceinline__ void arrive_when_copied(Cursor cursor) { ptx::cp_async_arrive_noinc(&full[cursor.stage]); }

  // Consumer: returns once the cursor's stage is full. What cp.async brought was written as by ordinary stores: before
  // wgmma or the copy engine reads it, fence_proxy_async is needed.
  __device__ __forceinline__ void wait_full(Cursor cursor) { ptx::wait_barrier(&full[cursor.stage], cursor.parity); }

  // Consumer: whether wait_full would return at once.
  __device__ __forceinline__ bool is_full(Cursor cursor) {
    return ptx::test_barrier(&full[cursor.stage], cursor.parity);
  }

  // Consumer: the threads this one speaks for have read the stage (a warp synchronises before its one arrival).
  __device__ __forceinline__ void release(Cursor cursor) { ptx::arrive(&empty[cursor.stage]); }
};

}  // namespace fi
