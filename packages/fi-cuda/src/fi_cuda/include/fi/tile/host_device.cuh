// What headers of pure arithmetic need to compile for the host (any C++17 compiler) as for the device, with equal
// results.
#pragma once

// Token for token what fi/scheduler/partition.cuh defines, so that a source may include both.
#if defined(__CUDACC__)
#define FI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FI_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fi {

using int64 = long long;
using uint64 = unsigned long long;

}  // namespace fi
