// Packs: a few consecutive elements moved by one load or store, and their conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fi/ptx/load.cuh"

namespace fi {

// kBytes (the size of an element up to 16) must divide the address.
template <class T, int kBytes>
struct alignas(kBytes) Pack {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  T data[kCount];
};

template <int kBytes, class T>
__device__ __forceinline__ Pack<T, kBytes> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, kBytes>*>(address);
}

// For what is read once, beside what many blocks read: leaves L1 to that.
template <int kBytes, class T>
__device__ __forceinline__ Pack<T, kBytes> load_pack_past_l1(const T* address) {
  if constexpr (kBytes == 16) {
    uint4 bits = ptx::load_past_l1(address);
    return *reinterpret_cast<Pack<T, kBytes>*>(&bits);
  } else {
    return load_pack<kBytes>(address);
  }
}

template <class T, int kBytes>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, kBytes>& pack) {
  *reinterpret_cast<Pack<T, kBytes>*>(address) = pack;
}

// To global memory. 16 bytes in one store, even if the compiler holds them in parts, as it does behind keep_whole.
template <class T, int kBytes>
__device__ __forceinline__ void store_whole(T* address, const Pack<T, kBytes>& pack) {
  if constexpr (kBytes == 16) {
    __stwb(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&pack));
  } else {
    store_pack(address, pack);
  }
}

// The pack is one until here. Otherwise the compiler takes it apart where it was loaded, if that is in another block of the
// program's flow, and so waits for memory before what stands between has been asked for.
template <class T, int kBytes>
__device__ __forceinline__ void keep_whole(Pack<T, kBytes>& pack) {
  if constexpr (kBytes >= 4) {
    unsigned(&words)[kBytes / 4] = reinterpret_cast<unsigned(&)[kBytes / 4]>(pack);
#pragma unroll
    for (int word = 0; word < kBytes / 4; ++word) asm volatile("" : "+r"(words[word]));
  }
}

// The line is among the first to leave L2, so that much that is written leaves it evenly.
template <class T>
__device__ __forceinline__ void stream_pack(T* address, const Pack<T, 16>& pack) {
  __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&pack));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two floats as T in one register, to nearest even, the first in the low half.
template <class T>
__device__ __forceinline__ unsigned pair_of(float low, float high);
template <>
__device__ __forceinline__ unsigned pair_of<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
template <>
__device__ __forceinline__ unsigned pair_of<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// To nearest even, at an address that 4 divides.
__device__ __forceinline__ void round_two(__half* address, float first, float second) {
  *reinterpret_cast<__half2*>(address) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void round_two(__nv_bfloat16* address, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(address) = __floats2bfloat162_rn(first, second);
}

// One instruction an element: taken one by one, of 16 bits the higher ones would be moved down first.
template <class T, int kBytes>
__device__ __forceinline__ void to_floats(float (&values)[Pack<T, kBytes>::kCount], const Pack<T, kBytes>& pack) {
#pragma unroll
  for (int e = 0; e < Pack<T, kBytes>::kCount; ++e) values[e] = to_float(pack.data[e]);
}
template <int kBytes>
__device__ __forceinline__ void to_floats(float (&values)[kBytes / 2], const Pack<__nv_bfloat16, kBytes>& pack) {
  if constexpr (kBytes < 4) {
    values[0] = to_float(pack.data[0]);
  } else {
    const unsigned(&words)[kBytes / 4] = reinterpret_cast<const unsigned(&)[kBytes / 4]>(pack);
#pragma unroll
    for (int word = 0; word < kBytes / 4; ++word) {
      values[2 * word] = __uint_as_float(words[word] << 16);
      values[2 * word + 1] = __uint_as_float(words[word] & 0xffff0000u);
    }
  }
}

// Rounded two at a time where an instruction does that: the compiler pairs what is used as a whole only.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount * static_cast<int>(sizeof(T))> rounded_pack(const float (&values)[kCount]) {
  Pack<T, kCount * static_cast<int>(sizeof(T))> result;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) round_two(&result.data[e], values[e], values[e + 1]);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) result.data[e] = from_float<T>(values[e]);
  }
  return result;
}

}  // namespace fi
