#pragma once

namespace fi::ptx {

inline void fence_proxy_async() {}
inline void fence_proxy_async_shared() {}
inline void fence_acq_rel_gpu() {}
inline void fence_acq_rel_cluster() {}

// The wait is for the generation that the arrival belonged to.
inline void cluster_arrive() {
  emulated::Cluster& cluster = *emulated::self->block->cluster;
  const unsigned count = static_cast<unsigned>(cluster.blocks.size()) * emulated::self->block->num_threads;
  emulated::self->cluster_generation = cluster.barrier.generation;
  emulated::meet(cluster.barrier, count, false, "the cluster");
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulated::Cluster& cluster = *emulated::self->block->cluster;
  const unsigned generation = emulated::self->cluster_generation;
  emulated::wait_until("the cluster", [&] { return cluster.barrier.generation != generation; });
}

template <class T>
inline T load_acquire(const T* flag) {
  emulated::yield();
  return *flag;
}
inline void store_release(int* flag, int value) { *flag = value; }
inline void store_release(unsigned long long* flag, unsigned long long value) { *flag = value; }
inline void red_release(int* flag, int value) { *flag += value; }
inline int add_acq_rel(int* flag, int value) {
  const int before = *flag;
  *flag += value;
  return before;
}

}  // namespace fi::ptx
