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
  const int lane = static_cast<int>(threadIdx.x % 32);
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

// What the lanes of a warp know of a run of 32 requests from `first` on, a lane each; lanes past the last request, of that one.
struct RequestRun {
  int first;
  int end;
  int kv_len;
  int origin;
};

// The first request of a run that is right for 32 requests or fewer, and where every request has one row.
__device__ __forceinline__ int guessed_run(int64 token, int num_requests) {
  const int last = max(num_requests - 32, 0);
  return token < last ? max(static_cast<int>(token) - 1, 0) : last;
}

// num_requests is 1 or more, so that no lane's loads are behind a branch.
template <int kAddressing>
__device__ __forceinline__ RequestRun load_run(
    int first, const int* q_indptr, const int* kv_lens, const PageTable& table, int num_requests) {
  const int request = min(first + static_cast<int>(threadIdx.x % 32), num_requests - 1);
  return {first, q_indptr[request + 1], kv_lens[request], origin_of<kAddressing>(table, request)};
}

// The request whose rows q_indptr[r] .. q_indptr[r + 1] hold `token`: the number of requests that end at or before it, so
// requests without rows are passed over. `run` is a guess, in whose place another run is searched for and loaded if it does not
// hold the token: one more round of loads for up to 1024 requests. All lanes of the warp call it with the same arguments.
template <int kAddressing>
__device__ __forceinline__ RequestOfToken request_of(
    int64 token, RequestRun run, const int* q_indptr, const int* kv_lens, const PageTable& table, int num_requests) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto num_passed = [&] { return __popc(__ballot_sync(0xffffffffu, run.first + lane < num_requests && run.end <= token)); };
  int passed = num_passed();
  // A request that ended means that none before it holds the token, one that did not that none behind does.
  const bool is_after_first = passed > 0 || run.first == 0;
  const bool is_before_last = passed < 32 || run.first + 32 >= num_requests;
  if (!is_after_first || !is_before_last) {
    run = load_run<kAddressing>(narrowed(token, q_indptr + 1, num_requests), q_indptr, kv_lens, table, num_requests);
    passed = num_passed();
  }
  return {run.first + passed, __shfl_sync(0xffffffffu, run.end, passed), __shfl_sync(0xffffffffu, run.kv_len, passed),
          __shfl_sync(0xffffffffu, run.origin, passed)};
}

}  // namespace fi
