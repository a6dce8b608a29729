// Which request a row of the batch belongs to.
#pragma once

#include "fi/tile/rows.cuh"

namespace fi {

// The request whose rows q_indptr[r] .. q_indptr[r + 1] hold `token`: the number of requests that end at or before it, so
// requests without rows are passed over. `num_requests` for a token past all of them.
//
// A 32-ary search: each lane asks of one segment whether it ends at or before the token. One round for 32 requests, two for
// 1024. All lanes of the warp call it with the same arguments.
__device__ __forceinline__ int request_of(int64 token, const int* q_indptr, int num_requests) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int* ends = q_indptr + 1;
  int first = 0;
  int size = num_requests;
  while (size > 0) {
    const int step = (size + 31) / 32;
    const int last = (lane + 1) * step - 1;
    const bool ended = last < size && ends[first + last] <= token;
    const int passed = __popc(__ballot_sync(0xffffffffu, ended)) * step;
    first += passed;
    // The next segment's last element is known not to be passed, unless the segment is cut short by the end.
    size = min(step - 1, size - passed);
  }
  return first;
}

}  // namespace fi
