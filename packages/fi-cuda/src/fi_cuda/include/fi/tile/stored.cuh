// Values as tensors and caches of another type store them.
#pragma once

#include "fi/tile/fp8.cuh"
#include "fi/tile/pack.cuh"

namespace fi {

template <class Stored, bool kExact, class T, int kBytes>
struct StoredAs {
  static constexpr int kCount = Pack<T, kBytes>::kCount;
  using Result = Pack<Stored, kCount * static_cast<int>(sizeof(Stored))>;

  static __device__ __forceinline__ Result from(const Pack<T, kBytes>& x, const Divisor& divisor) {
    if constexpr (kIsFp8<Stored>) {
      return quantise<Stored, kExact>(x, divisor);
    } else {
      Result result;
#pragma unroll
      for (int e = 0; e < kCount; ++e) result.data[e] = from_float<Stored>(to_float(x.data[e]));
      return result;
    }
  }
};

// What is stored as it is keeps its bits.
template <bool kExact, class T, int kBytes>
struct StoredAs<T, kExact, T, kBytes> {
  static __device__ __forceinline__ Pack<T, kBytes> from(const Pack<T, kBytes>& x, const Divisor&) { return x; }
};

// FP8: x / divisor, rounded and saturated (kExact: fi/tile/fp8.cuh); others: rounded to nearest even, `divisor` is not used.
template <class Stored, bool kExact = true, class T, int kBytes>
__device__ __forceinline__ auto stored_as(const Pack<T, kBytes>& x, const Divisor& divisor) {
  return StoredAs<Stored, kExact, T, kBytes>::from(x, divisor);
}

}  // namespace fi
