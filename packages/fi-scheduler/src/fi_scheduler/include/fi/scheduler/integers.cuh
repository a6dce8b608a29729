// Integer arithmetic of the work partition, for the host (g++) and the device (NVRTC).
#pragma once

#if defined(__CUDACC__)
#define FI_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the cursor then lives in registers, which halves the time of a pass along the line.
#define FI_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fi {
namespace scheduler {

using i32 = int;
using i64 = long long;

// Positions, costs and counts. 64 bits hold those of every capacity that PartitionBounds allows; a kernel for a capacity
// whose costs are known to be small may count in FI_PARTITION_INT.
#if defined(FI_PARTITION_INT)
using Int = FI_PARTITION_INT;
#else
using Int = i64;
#endif

FI_HOST_DEVICE Int min_of(Int a, Int b) { return a < b ? a : b; }
FI_HOST_DEVICE Int max_of(Int a, Int b) { return a > b ? a : b; }

// floor(a / b) for a >= 0, b > 0. A 64-bit division costs several times a 32-bit one on the host and far more on a GPU, where
// it is also a call, which takes registers from everything around it: few costs are that long, and bit by bit they are
// divided by little code.
FI_HOST_DEVICE Int floor_div(Int a, Int b) {
  if constexpr (sizeof(Int) == 4) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  if (((static_cast<i64>(a) | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
#if defined(__CUDA_ARCH__)
  Int quotient = 0, rest = 0;
#pragma unroll 1
  for (int bit = 8 * sizeof(Int) - 2; bit >= 0; --bit) {
    rest = 2 * rest + (a >> bit & 1);
    quotient *= 2;
    if (rest >= b) {
      rest -= b;
      ++quotient;
    }
  }
  return quotient;
#else
  return a / b;
#endif
}

FI_HOST_DEVICE Int ceil_div(Int a, Int b) { return a <= b ? (a > 0) : floor_div(a + b - 1, b); }

// sum of floor((a * i + b) / m) over i in [0, n), for n, a, b >= 0 and m > 0, in O(log m) steps: Euclid's algorithm on
// the lattice points below a line (Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5).
FI_HOST_DEVICE Int floor_sum(Int n, Int m, Int a, Int b) {
  Int sum = 0;
  while (n > 0) {
    if (a >= m) {
      Int quotient = floor_div(a, m);
      sum += (n - 1) * n / 2 * quotient;
      a -= quotient * m;
    }
    if (b >= m) {
      Int quotient = floor_div(b, m);
      sum += n * quotient;
      b -= quotient * m;
    }
    Int top = a * n + b;
    if (top < m) break;
    n = floor_div(top, m);
    b = top - n * m;
    Int swapped = m;
    m = a;
    a = swapped;
  }
  return sum;
}

}  // namespace scheduler
}  // namespace fi
