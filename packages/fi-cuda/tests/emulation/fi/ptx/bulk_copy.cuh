#pragma once

#include "fi/ptx/mbarrier.cuh"

namespace fi::ptx {

inline unsigned long long global_address(const void* pointer) { return reinterpret_cast<unsigned long long>(pointer); }

inline void bulk_load(void* shared, const void* global, unsigned num_bytes, unsigned long long* barrier) {
  if (shared_address(shared) % 16 || global_address(global) % 16 || num_bytes % 16) emulated::fail("an unaligned bulk copy");
  emulated::later([=] {
    std::memcpy(shared, global, num_bytes);
    complete_bytes(barrier_word(barrier), num_bytes);
  });
}
inline void bulk_load(void* shared, const void* global, unsigned num_bytes, unsigned long long* barrier, unsigned long long) {
  bulk_load(shared, global, num_bytes, barrier);
}

inline void bulk_copy_to_neighbour(unsigned address, const void* shared, unsigned num_bytes, unsigned barrier) {
  if (address % 16 || shared_address(shared) % 16 || num_bytes % 16) emulated::fail("an unaligned bulk copy");
  emulated::later([=] {
    std::memcpy(emulated::shared_pointer(address), shared, num_bytes);
    complete_bytes(barrier_word(barrier), num_bytes);
  });
}

// Stores read at once: what waits for them needs no more.
inline void bulk_store(void* global, const void* shared, unsigned num_bytes) { std::memcpy(global, shared, num_bytes); }
inline void bulk_commit() {}
template <int kGroups>
inline void bulk_wait() {}
template <int kGroups>
inline void bulk_wait_read() {}

}  // namespace fi::ptx
