#pragma once

namespace fi::ptx {

inline void named_barrier_sync(int id, int num_threads) {
  emulated::meet(emulated::self->block->named[id], static_cast<unsigned>(num_threads), true, "a named barrier");
}
inline void named_barrier_arrive(int id, int num_threads) {
  emulated::meet(emulated::self->block->named[id], static_cast<unsigned>(num_threads), false, "a named barrier");
}

}  // namespace fi::ptx
