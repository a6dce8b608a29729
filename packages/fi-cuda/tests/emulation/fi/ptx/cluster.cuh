#pragma once

#include "fi/ptx/mbarrier.cuh"

namespace fi::ptx {

inline unsigned rank_in_cluster_again() { return emulated::self->block->rank; }
inline unsigned rank_in_cluster() { return emulated::self->block->rank; }
inline unsigned num_blocks_in_cluster() { return static_cast<unsigned>(emulated::self->block->cluster->blocks.size()); }
inline unsigned address_in_cluster(const void* pointer, unsigned rank) {
  return emulated::address_in_block(shared_address(pointer), rank);
}
inline float load_from_cluster(unsigned address) { return *reinterpret_cast<float*>(emulated::shared_pointer(address)); }

template <class T>
inline void store_async(unsigned address, T value, unsigned barrier) {
  if (address % sizeof(T) != 0) emulated::fail("an unaligned st.async");
  emulated::later([=] {
    std::memcpy(emulated::shared_pointer(address), &value, sizeof(T));
    complete_bytes(barrier_word(barrier), sizeof(T));
  });
}

}  // namespace fi::ptx
