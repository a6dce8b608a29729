// A device's language for a host compiler: a grid runs cluster by cluster, each thread as a fiber that the scheduler resumes
// until it waits. Stores to a neighbour's shared memory and their barriers complete late and in random order, and warps run in
// random order, so that a protocol that counts on more than it waited for fails here. What is not modelled: memory weaker than
// sequential consistency, and the rounding of approximate instructions (results here are those of the host's library).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace host {

struct Index { unsigned x; };
Index thread_index();
Index block_index();
void sync_block();
// Hands `value` to the warp; the values of its 32 lanes, valid until the lane's next exchange.
const uint64_t* exchange(uint64_t value);
unsigned rank_in_cluster();
void cluster_arrive();
void cluster_wait();
unsigned address_in_cluster(const void* pointer, unsigned rank);
void store_async(unsigned address, const void* value, int num_bytes, unsigned barrier);
void init_barrier(void* barrier, unsigned count);
void arrive_and_expect(void* barrier, unsigned num_bytes);
void wait_barrier(void* barrier, unsigned parity);

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) <= 8 && sizeof(From) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(From));
  To result;
  std::memcpy(&result, &bits, sizeof(To));
  return result;
}

template <class T>
T from_lane(T value, int lane) {
  return bits_as<T>(exchange(bits_as<uint64_t>(value))[lane]);
}

inline int lane() { return static_cast<int>(thread_index().x) % 32; }

// first + second as a double and what the rounding lost (Knuth, "The Art of Computer Programming", volume 2, 4.2.2).
inline double lost(double first, double second, double sum) {
  const double part = sum - first;
  return (first - (sum - part)) + (second - part);
}
inline double add_down(double first, double second) {
  const double sum = first + second;
  return std::isfinite(sum) && lost(first, second, sum) < 0 ? std::nextafter(sum, -INFINITY) : sum;
}
inline float float_down(double sum, double rest) {
  const float rounded = static_cast<float>(sum);
  const bool above = static_cast<double>(rounded) > sum || (static_cast<double>(rounded) == sum && rest < 0);
  return std::isfinite(rounded) && above ? std::nextafterf(rounded, -INFINITY) : rounded;
}

}  // namespace host

#define threadIdx (::host::thread_index())
#define blockIdx (::host::block_index())

inline void __syncthreads() { host::sync_block(); }
inline void __syncwarp() { host::exchange(0); }
inline long long clock64() {
  static long long cycles = 0;
  return cycles += 1000;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return host::from_lane(value, host::lane() / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return host::from_lane(value, host::lane() ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance, int width = 32) {
  const int lane = host::lane();
  return host::from_lane(value, lane % width >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = host::exchange(vote);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
template <class T>
T __reduce_add_sync(unsigned, T value) {
  const uint64_t* values = host::exchange(static_cast<uint32_t>(value));
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<uint32_t>(values[lane]);
  return static_cast<T>(sum);
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  const uint64_t* values = host::exchange(host::bits_as<uint64_t>(value));
  T result = value;
  for (int lane = 0; lane < 32; ++lane) {
    const T other = host::bits_as<T>(values[lane]);
    result = other > result ? other : result;
  }
  return result;
}
template <class T>
T __reduce_min_sync(unsigned, T value) {
  const uint64_t* values = host::exchange(host::bits_as<uint64_t>(value));
  T result = value;
  for (int lane = 0; lane < 32; ++lane) {
    const T other = host::bits_as<T>(values[lane]);
    result = other < result ? other : result;
  }
  return result;
}

template <class T>
T atomicAdd(T* place, T amount) {
  const T previous = *place;
  *place = previous + amount;
  return previous;
}

template <class T>
T min(T first, T second) { return second < first ? second : first; }
template <class T>
T max(T first, T second) { return first < second ? second : first; }

inline float __int_as_float(int bits) { return host::bits_as<float>(bits); }
inline int __float_as_int(float value) { return host::bits_as<int>(value); }
inline float __uint_as_float(unsigned bits) { return host::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return host::bits_as<unsigned>(value); }
inline long long __double_as_longlong(double value) { return host::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return host::bits_as<double>(bits); }
inline double __hiloint2double(int high, int low) {
  return host::bits_as<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}

inline double __dadd_rd(double first, double second) { return host::add_down(first, second); }
inline float __fadd_rd(float first, float second) {
  const double sum = static_cast<double>(first) + second;
  return host::float_down(sum, host::lost(first, second, sum));
}
inline float __fmaf_rd(float first, float second, float third) {
  const double product = static_cast<double>(first) * second, sum = product + third;
  return host::float_down(sum, host::lost(product, third, sum));
}
inline float __fmaf_rn(float first, float second, float third) { return std::fmaf(first, second, third); }
inline float __fdiv_rn(float first, float second) { return first / second; }
inline float __fdividef(float first, float second) { return first / second; }
inline float __saturatef(float value) { return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f; }
inline int __float2int_rz(float value) {
  if (value != value) return 0;
  return value >= 2147483648.0f ? 0x7fffffff : value <= -2147483648.0f ? -0x7fffffff - 1 : static_cast<int>(value);
}
inline unsigned __float2uint_rn(float value) { return static_cast<unsigned>(std::nearbyint(static_cast<double>(value))); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __dp4a(unsigned first, unsigned second, unsigned sum) {
  for (int byte = 0; byte < 32; byte += 8) sum += (first >> byte & 0xff) * (second >> byte & 0xff);
  return sum;
}

template <class T>
T __ldcs(const T* address) { return *address; }
template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
void __stcs(T* address, T value) { *address = value; }

namespace fi::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float max_or_nan(float first, float second) {
  if (first != first || second != second) return std::numeric_limits<float>::quiet_NaN();
  return first > second ? first : second;
}

inline unsigned rank_in_cluster() { return host::rank_in_cluster(); }
inline unsigned address_in_cluster(const void* pointer, unsigned rank) { return host::address_in_cluster(pointer, rank); }
template <class T>
void store_async(unsigned address, T value, unsigned barrier) { host::store_async(address, &value, sizeof(T), barrier); }

inline void cluster_arrive_relaxed() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }

inline void init_barrier(unsigned long long* barrier, unsigned count) { host::init_barrier(barrier, count); }
inline void fence_barrier_init() {}
inline void arrive_and_expect_bytes(unsigned long long* barrier, unsigned num_bytes) { host::arrive_and_expect(barrier, num_bytes); }
inline void wait_barrier(unsigned long long* barrier, unsigned parity) { host::wait_barrier(barrier, parity); }

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace fi::ptx
