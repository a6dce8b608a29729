// CUDA's built-in variables and functions, for threads of machine.hpp. Included before everything else of a kernel's source.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>

#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "machine.hpp"

#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#undef __grid_constant__
#undef __constant__
#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __CUDA_ARCH__ 900
#define __CUDACC__

#define threadIdx (::emulated::self->thread)
#define blockIdx (::emulated::self->block->idx)
#define gridDim (::emulated::machine->grid)
#define blockDim (::emulated::Dim3{::emulated::self->block->num_threads, 1, 1})

using std::max;
using std::min;

template <class First, class Second>
inline auto min(First first, Second second) {
  using T = std::common_type_t<First, Second>;
  return static_cast<T>(second) < static_cast<T>(first) ? static_cast<T>(second) : static_cast<T>(first);
}
template <class First, class Second>
inline auto max(First first, Second second) {
  using T = std::common_type_t<First, Second>;
  return static_cast<T>(first) < static_cast<T>(second) ? static_cast<T>(second) : static_cast<T>(first);
}

// Bits
inline float __int_as_float(int bits) { return emulated::value_of<float>(static_cast<unsigned>(bits)); }
inline float __uint_as_float(unsigned bits) { return emulated::value_of<float>(bits); }
// The NaN that arithmetic makes has other bits on a GPU than on an x86 processor.
inline unsigned __float_as_uint(float value) {
  const unsigned bits = static_cast<unsigned>(emulated::bits_of(value));
  return bits == 0xffc00000u ? 0x7fffffffu : bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline double __longlong_as_double(long long bits) { return emulated::value_of<double>(static_cast<unsigned long long>(bits)); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 |
                                                     static_cast<unsigned>(low)));
}
inline long long __double_as_longlong(double value) { return static_cast<long long>(emulated::bits_of(value)); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __dp4a(unsigned first, unsigned second, unsigned sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += (first >> shift & 0xff) * (second >> shift & 0xff);
  return sum;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (value >> bit & 1u) << (31 - bit);
  return result;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned from = selector >> (4 * byte) & 0xfu;
    unsigned char chosen = static_cast<unsigned char>(both >> (8 * (from & 7u)));
    if (from & 8u) chosen = chosen & 0x80u ? 0xff : 0;
    result |= static_cast<unsigned>(chosen) << (8 * byte);
  }
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __umulhi(unsigned first, unsigned second) {
  return static_cast<unsigned>(static_cast<unsigned long long>(first) * second >> 32);
}
inline int __mulhi(int first, int second) { return static_cast<int>(static_cast<long long>(first) * second >> 32); }
inline unsigned long long __umul64hi(unsigned long long first, unsigned long long second) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(first) * second >> 64);
}
inline long long __mul64hi(long long first, long long second) {
  return static_cast<long long>(static_cast<__int128>(first) * second >> 64);
}

// Arithmetic with a rounding
template <class Compute>
inline auto rounded(int mode, Compute compute) {
  const int before = std::fegetround();
  std::fesetround(mode);
  const volatile auto result = compute();
  std::fesetround(before);
  return +result;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rd(float a, float b, float c) {
  return rounded(FE_DOWNWARD, [&] { const volatile float x = a, y = b, z = c; return std::fmaf(x, y, z); });
}
inline float __fadd_rd(float a, float b) {
  return rounded(FE_DOWNWARD, [&] { const volatile float x = a, y = b; return x + y; });
}
inline float __fadd_ru(float a, float b) {
  return rounded(FE_UPWARD, [&] { const volatile float x = a, y = b; return x + y; });
}
inline float __fmul_rd(float a, float b) {
  return rounded(FE_DOWNWARD, [&] { const volatile float x = a, y = b; return x * y; });
}
inline float __fmul_ru(float a, float b) {
  return rounded(FE_UPWARD, [&] { const volatile float x = a, y = b; return x * y; });
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dadd_rd(double a, double b) {
  return rounded(FE_DOWNWARD, [&] { const volatile double x = a, y = b; return x + y; });
}
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __fma_rd(double a, double b, double c) {
  return rounded(FE_DOWNWARD, [&] { const volatile double x = a, y = b, z = c; return std::fma(x, y, z); });
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline void sincospif(float half_turns, float* sine, float* cosine) {
  const double angle = std::remainder(static_cast<double>(half_turns), 2.0) * 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(angle)), *cosine = static_cast<float>(std::cos(angle));
}
inline float __saturatef(float a) { return a != a ? 0.0f : std::min(std::max(a, 0.0f), 1.0f); }

template <class Integer>
inline Integer saturated(double value) {
  if (value != value) return 0;
  if (value <= static_cast<double>(std::numeric_limits<Integer>::min())) return std::numeric_limits<Integer>::min();
  if (value >= static_cast<double>(std::numeric_limits<Integer>::max())) return std::numeric_limits<Integer>::max();
  return static_cast<Integer>(value);
}
inline int __float2int_rz(float value) { return saturated<int>(std::trunc(value)); }
inline int __float2int_rn(float value) { return saturated<int>(std::nearbyint(value)); }
inline int __float2int_rd(float value) { return saturated<int>(std::floor(value)); }
inline int __float2int_ru(float value) { return saturated<int>(std::ceil(value)); }
inline unsigned __float2uint_rz(float value) { return saturated<unsigned>(std::trunc(value)); }
inline unsigned __float2uint_rn(float value) { return saturated<unsigned>(std::nearbyint(value)); }
inline unsigned long long __float2ull_rz(float value) { return saturated<unsigned long long>(std::trunc(value)); }
inline long long __float2ll_rz(float value) { return saturated<long long>(std::trunc(value)); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __ull2float_rn(unsigned long long value) { return static_cast<float>(value); }

// The products and sums of two narrow floats that CUDA's headers have for the device only
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half x, __half y, __half z) {
    return __double2half(static_cast<double>(__half2float(x)) * __half2float(y) + __half2float(z));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __double2bfloat16(static_cast<double>(__bfloat162float(x)) * __bfloat162float(y) + __bfloat162float(z));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}

// Memory
template <class T>
inline T __ldcs(const T* address) { return *address; }
template <class T>
inline T __ldcg(const T* address) { return *address; }
template <class T>
inline T __ldg(const T* address) { return *address; }
template <class T>
inline void __stcs(T* address, T value) { *address = value; }
template <class T>
inline void __stwb(T* address, T value) { *address = value; }
template <class T>
inline void __stcg(T* address, T value) { *address = value; }
inline unsigned __cvta_generic_to_shared(const void* pointer) { return emulated::shared_address(pointer); }
inline unsigned long long __cvta_generic_to_global(const void* pointer) { return reinterpret_cast<unsigned long long>(pointer); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulated::yield(); }
inline long long clock64() { return static_cast<long long>(++emulated::machine->events); }
inline void __trap() { emulated::fail("a trap"); }

template <class T, class Value>
inline T atomicAdd(T* address, Value value) {
  emulated::pause();
  const T before = *address;
  *address = static_cast<T>(before + static_cast<T>(value));
  return before;
}
template <class T, class Value>
inline T atomicMax(T* address, Value value) {
  emulated::pause();
  const T before = *address;
  *address = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class Value>
inline T atomicMin(T* address, Value value) {
  emulated::pause();
  const T before = *address;
  *address = std::min(before, static_cast<T>(value));
  return before;
}
template <class T, class Value>
inline T atomicOr(T* address, Value value) {
  emulated::pause();
  const T before = *address;
  *address = before | static_cast<T>(value);
  return before;
}
template <class T, class Value>
inline T atomicExch(T* address, Value value) {
  emulated::pause();
  const T before = *address;
  *address = static_cast<T>(value);
  return before;
}
template <class T, class Compare, class Value>
inline T atomicCAS(T* address, Compare compare, Value value) {
  emulated::pause();
  const T before = *address;
  if (before == static_cast<T>(compare)) *address = static_cast<T>(value);
  return before;
}

// Threads together
inline void __syncthreads() { emulated::sync_block(); }
inline int __syncthreads_or(int predicate) {
  int& any = emulated::shared_variable<int>("any of the block");
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (predicate) any = 1;
  __syncthreads();
  const int found = any;
  __syncthreads();
  return found;
}
inline int __syncthreads_and(int predicate) { return !__syncthreads_or(!predicate); }
inline int __syncthreads_count(int predicate) {
  int& count = emulated::shared_variable<int>("count of the block");
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (predicate) ++count;
  __syncthreads();
  const int found = count;
  __syncthreads();
  return found;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange(mask, 0); }
inline unsigned __activemask() {
  emulated::fail("__activemask has no meaning for fibers");
  return 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned long long* slots = emulated::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned idx = 0; idx < 32; ++idx) votes |= (mask >> idx & 1u) && slots[idx] ? 1u << idx : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
inline T shuffled(unsigned mask, T value, unsigned from) {
  const unsigned long long* slots = emulated::exchange(mask, emulated::bits_of(value));
  return emulated::value_of<T>(slots[from]);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const unsigned lane = emulated::lane(), base = lane / width * width;
  return shuffled(mask, value, base + static_cast<unsigned>(from) % width);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const unsigned lane = emulated::lane(), from = lane ^ static_cast<unsigned>(distance);
  return shuffled(mask, value, from / width == lane / width ? from : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulated::lane();
  return shuffled(mask, value, lane % width >= distance ? lane - distance : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulated::lane();
  return shuffled(mask, value, lane % width + distance < static_cast<unsigned>(width) ? lane + distance : lane);
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  const unsigned long long* slots = emulated::exchange(mask, emulated::bits_of(value));
  unsigned equal = 0;
  for (unsigned idx = 0; idx < 32; ++idx) equal |= (mask >> idx & 1u) && slots[idx] == emulated::bits_of(value) ? 1u << idx : 0u;
  return equal;
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T value) {
  return emulated::reduce(mask, value, [](T first, T second) { return static_cast<T>(first + second); });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return emulated::reduce(mask, value, [](T first, T second) { return std::min(first, second); });
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return emulated::reduce(mask, value, [](T first, T second) { return std::max(first, second); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulated::reduce(mask, value, [](unsigned first, unsigned second) { return first | second; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulated::reduce(mask, value, [](unsigned first, unsigned second) { return first & second; });
}
