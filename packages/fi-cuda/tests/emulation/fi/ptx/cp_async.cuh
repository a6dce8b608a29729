#pragma once

#include "fi/ptx/mbarrier.cuh"

namespace fi::ptx {

inline void cp_async_16(void* shared, const void* global, bool valid) {
  if (shared_address(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) emulated::fail("an unaligned cp.async");
  emulated::self->copies.open.push_back([=] {
    if (valid) std::memcpy(shared, global, 16);
    else std::memset(shared, 0, 16);
  });
}
template <int kBytes>
inline void cp_async_part(void* shared, const void* global, int num_bytes) {
  if (shared_address(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) emulated::fail("an unaligned cp.async");
  if (num_bytes < 0 || num_bytes > kBytes) emulated::fail("cp.async of more bytes than it copies");
  emulated::self->copies.open.push_back([=] {
    std::memset(shared, 0, kBytes);
    if (num_bytes > 0) std::memcpy(shared, global, num_bytes);
  });
}
inline void cp_async_commit() { emulated::self->copies.close(); }
template <int kGroups>
inline void cp_async_wait() {
  emulated::self->copies.complete(kGroups);
}
inline void cp_async_arrive_noinc(unsigned long long* barrier) {
  cp_async_commit();
  auto groups = emulated::self->copies;
  emulated::later([groups, barrier]() mutable {
    groups.complete(0);
    arrive_at(barrier_word(barrier));
  });
}

}  // namespace fi::ptx
