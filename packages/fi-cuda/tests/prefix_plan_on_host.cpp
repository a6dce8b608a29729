// fi/kernels/attention_prefix_plan.cuh for a block of one thread, in which every barrier and exchange is the thread's own affair.
// The test puts Config and Params in front of it.
#include <algorithm>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __shared__ static

using std::max;
using std::min;

struct Place3 {
  unsigned x = 0, y = 0, z = 0;
};
static const Place3 threadIdx, blockIdx;

struct int4 {
  int x, y, z, w;
};

inline void __syncthreads() {}
inline int __syncthreads_and(int value) { return value; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int, int = 32) {
  return value;
}
template <class T>
T __shfl_up_sync(unsigned, T value, int, int = 32) {
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int, int = 32) {
  return value;
}
inline float fmaxf(float first, float second) { return std::max(first, second); }
template <class T, class U>
T atomicAdd(T* place, U value) {
  const T before = *place;
  *place += value;
  return before;
}
template <class T, class U>
T atomicMax(T* place, U value) {
  const T before = *place;
  *place = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicMin(T* place, U value) {
  const T before = *place;
  *place = std::min(before, static_cast<T>(value));
  return before;
}

#include "fi/kernels/attention_prefix_plan.cuh"

#include "generated.h"

extern "C" void plan(const Params* params) { fi::attention_prefix_plan<Config>(*params); }
