// Packs: a few consecutive elements moved by one load or store, and their conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

template <class T, int kBytes>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, kBytes>& pack) {
  *reinterpret_cast<Pack<T, kBytes>*>(address) = pack;
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

}  // namespace fi
