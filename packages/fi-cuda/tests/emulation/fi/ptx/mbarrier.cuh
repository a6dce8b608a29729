// A barrier's word: bytes expected and not yet complete, arrivals left in the phase, arrivals of a phase, the phase.
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

struct BarrierWord {
  int bytes;
  short left;
  unsigned short count_and_phase;

  void settle() {
    if (left != 0 || bytes != 0) return;
    count_and_phase ^= 0x8000u;
    left = static_cast<short>(count_and_phase & 0x7fffu);
    ++emulated::machine->events;
  }
};
static_assert(sizeof(BarrierWord) == 8);

inline BarrierWord& barrier_word(void* barrier) { return *static_cast<BarrierWord*>(barrier); }
inline BarrierWord& barrier_word(unsigned address) { return barrier_word(emulated::shared_pointer(address)); }

inline void init_barrier(unsigned long long* barrier, unsigned count) {
  shared_address(barrier);
  barrier_word(barrier) = {0, static_cast<short>(count), static_cast<unsigned short>(count)};
}
inline void invalidate_barrier(unsigned long long* barrier) { std::memset(barrier, 0xff, 8); }
inline void fence_barrier_init() {}

inline void arrive_at(BarrierWord& word) {
  if (--word.left < 0) emulated::fail("an arrival beyond the barrier's count");
  word.settle();
}
inline void arrive(unsigned long long* barrier) { arrive_at(barrier_word(barrier)); }
inline void arrive_in_cluster(unsigned long long* barrier, unsigned rank) {
  arrive_at(barrier_word(emulated::address_in_block(shared_address(barrier), rank)));
}
inline void arrive_and_expect_bytes(unsigned long long* barrier, unsigned num_bytes) {
  barrier_word(barrier).bytes += static_cast<int>(num_bytes);
  arrive(barrier);
}
inline void complete_bytes(BarrierWord& word, unsigned num_bytes) {
  word.bytes -= static_cast<int>(num_bytes);
  word.settle();
}

inline bool test_barrier(unsigned long long* barrier, unsigned parity) {
  return (barrier_word(barrier).count_and_phase >> 15) != (parity & 1u);
}
inline bool try_wait_barrier(unsigned long long* barrier, unsigned parity) {
  if (!test_barrier(barrier, parity)) emulated::yield();
  return test_barrier(barrier, parity);
}
inline void wait_barrier(unsigned long long* barrier, unsigned parity) {
  emulated::wait_until("an mbarrier", [&] { return test_barrier(barrier, parity); });
}

}  // namespace fi::ptx
