// Which request a row of the batch belongs to.
#pragma once

#include "fi/kv/place.cuh"

namespace fi {

// A request (the number of requests for a token past all of them), the end of its rows, its length in the cache, and its
// origin (fi/kv/place.cuh).
struct RequestOfToken {
  int request;
  int end;
  int kv_len;
  int origin;
};

// The first of a run of at most 32 requests that holds the request of `token`, or ends where that begins: 32-ary search, in
// which each lane asks of one segment whether it ends at or before the token.
__device__ __forceinline__ int narrowed(int64 token, const int* ends, int num_requests) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int first = 0;
  int size = num_requests;
  while (size > 32) {
    const int step = (size + 31) / 32;
    const int last = (lane + 1) * step - 1;
    const bool ended = last < size && ends[first + last] <= token;
    const int passed = __popc(__ballot_sync(0xffffffffu, ended)) * step;
    first += passed;
    size = min(step, size - passed);
  }
  return first;
}

// The request whose rows q_indptr[r] .. q_indptr[r + 1] hold `token`: the number of requests that end at or before it, so
// requests without rows are passed over.
//
// Each lane loads all about one of 32 requests at once. The first 32 are a guess: right for 32 requests or fewer, and where
// every request has one row; they are searched for otherwise, one more round for up to 1024 requests. All lanes of the warp
// call it with the same arguments.
template <int kAddressing>
__device__ __forceinline__ RequestOfToken request_of(
    int64 token, const int* q_indptr, const int* kv_lens, const PageTable& table, int num_requests) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int last_guess = max(num_requests - 32, 0);
  int first = token < last_guess ? max(static_cast<int>(token) - 1, 0) : last_guess;
  bool searched = false;
  while (true) {
    const int request = first + lane;
    RequestOfToken mine = {};
    if (request < num_requests) {
      mine = {request, q_indptr[request + 1], kv_lens[request], origin_of<kAddressing>(table, request)};
    }
    const int passed = __popc(__ballot_sync(0xffffffffu, request < num_requests && mine.end <= token));
    // A request that ended means that none before it holds the token, one that did not that none behind does.
    const bool is_after_first = passed > 0 || first == 0;
    const bool is_before_last = passed < 32 || first + 32 >= num_requests;
    if (searched || (is_after_first && is_before_last)) {
      return {first + passed, __shfl_sync(0xffffffffu, mine.end, passed), __shfl_sync(0xffffffffu, mine.kv_len, passed),
              __shfl_sync(0xffffffffu, mine.origin, passed)};
    }
    first = narrowed(token, q_indptr + 1, num_requests);
    searched = true;
  }
}

}  // namespace fi
