#pragma once

namespace fi::ptx {

template <class T>
inline T load_relaxed(const T* from) {
  emulated::yield();
  return *from;
}
template <class T>
inline void store_relaxed(T* to, T values) { *to = values; }
inline void prefetch_to_l2(const void*) {}

}  // namespace fi::ptx
