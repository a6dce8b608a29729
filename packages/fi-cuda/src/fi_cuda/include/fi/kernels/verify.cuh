// Verification of speculative drafts, a cluster a request: fi_core.verify_chain and fi_core.verify_tree define the result. A chain
// without draft probabilities is a tree whose node i has parent i - 1.
//
// A step that draws holds the target's row (and the draft's) in the blocks' shared memory, shares whether it is usable, sums up
// masses and draws in index order; the block with the drawn token tells the others. With draft probabilities one step draws: a
// drafted token is accepted by its own two probabilities, each lane of a warp asking for a step's.
// Config: Dtype (float), kVectorBytes, kClusterBlocks, kNumThreads, kWarpTokens; kTree: parents and path; kProposals: draft_probs.
// Params: draft_tokens int64 [requests, num_draft], parents int32 likewise (kTree), target_probs float32 [requests, num_draft + 1,
// vocab_size], draft_probs float32 [requests, num_draft, vocab_size] (kProposals); seed, sample, position; tokens int64 and path
// int32 (kTree) [requests, num_draft + 1], contiguous; num_accepted int32.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/random/philox.cuh"
#include "fi/sampling/cluster_row.cuh"

namespace fi {

// int64(p * 2^32) of 0 <= p < 2, else 0; places past the vocabulary hold NaN.
__device__ __forceinline__ uint2 probability_limbs(float probability) {
  return mass_limbs(probability < 2.0f ? probability : 0.0f);
}
__device__ __forceinline__ uint64 mass_of_probability(float probability) { return join_limbs(probability_limbs(probability)); }

// The draft's row, loaded while the target's is under way, if `used`.
template <class Config>
struct ProposalStage {
  static constexpr bool kChanges = false;
  const float* from;
  int first_token, vocab_size;
  float* slice;
  bool used;
  Extremes extremes;

  __device__ __forceinline__ void begun() {
    if (used) extremes = load_slice<Config>(from, first_token, vocab_size, slice);
  }
};

template <class Config, class Params>
struct VerifyKernel {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads;

  const Params& params;
  Row& row;
  float* proposal;  // the block's part of the draft's row, like row.shared.slice
  int64 request;
  int64 seed, position;
  int sample;

  __device__ __forceinline__ static bool are_probabilities(float largest, float smallest) { return smallest >= 0.0f && largest < 2.0f; }

  // Whether all of a row, of which `mine` are this thread's extremes, are probabilities below 2.
  __device__ __forceinline__ bool usable(Extremes mine) {
    row.share_extremes(mine, false);
    return are_probabilities(row.largest, row.smallest);
  }
  // The target's row for `node`, -1 for the first.
  __device__ __forceinline__ const float* target_of(int node) const {
    return static_cast<const float*>(params.target_probs) + request * params.target_stride + (node + 1) * params.target_step;
  }
  __device__ __forceinline__ const float* proposal_of(int step) const {
    return static_cast<const float*>(params.draft_probs) + request * params.draft_probs_stride + step * params.draft_probs_step;
  }

  // The token at which the running sum of `mass`, in index order, exceeds the random target; -1 if there is no mass.
  template <class Mass>
  __device__ __forceinline__ int draw(Mass mass, int step, Purpose purpose) {
    row.sum_over_warps(mass);
    uint64 before;
    const uint64 total = row.sum_over_blocks(before);
    if (total == 0) {
      // Sums may follow at once: only when every block has read these.
      __syncthreads();
      if (threadIdx.x < 32) {
        row.mailbox.send_to_all(kShares, &row.shared.extremes[row.rank], make_uint2(0, 0));
      }
      row.mailbox.receive(kShares, kBlocks * 8);
      return -1;
    }
    const uint64 own = row.shared.block_amount[row.rank];
    const RandomBits bits = random_bits(seed, position + step, sample, purpose);
    const uint64 target = static_cast<uint64>(scale_bits(bits, static_cast<int64>(total)));
    if (before <= target && target < before + own) {
      row.locate(mass, target - before, [&](int place) {
#pragma unroll 1
        for (unsigned block = 0; block < kBlocks; ++block) {
          row.mailbox.send(kFound, block, &row.shared.token, static_cast<uint64>(row.first_token + place));
        }
      });
    }
    row.mailbox.receive(kFound, 8);
    const int token = static_cast<int>(row.shared.token);
    __syncthreads();
    return token;
  }

  __device__ __forceinline__ int drafted(int step) const {
    if (step >= params.num_draft) return -1;
    const int64 token = static_cast<const int64*>(params.draft_tokens)[request * params.draft_stride + step];
    return token >= 0 && token < params.vocab_size ? static_cast<int>(token) : -1;
  }

  // The lowest node below `node` that holds `token`; -1: none.
  __device__ __forceinline__ int child(int node, int token) {
    const int* parents = static_cast<const int*>(params.parents) + request * params.parents_stride;
    const int64* held = static_cast<const int64*>(params.draft_tokens) + request * params.draft_stride;
    unsigned found = 0xffffffffu;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x) % 32; idx < params.num_draft; idx += 32) {
      if (parents[idx] == node && held[idx] == token) found = min(found, static_cast<unsigned>(idx));
    }
    return static_cast<int>(__reduce_min_sync(0xffffffffu, found));
  }

  // Rejection sampling (Leviathan et al., 2023): whether the token drafted at `step` is accepted.
  __device__ __forceinline__ bool accepted(int step) const {
    const int token = drafted(step);
    if (token < 0) return false;
    const uint64 offered = mass_of_probability(proposal_of(step)[token]), wanted = mass_of_probability(target_of(step - 1)[token]);
    const RandomBits bits = random_bits(seed, position + step, sample, Purpose::kAccept);
    return static_cast<uint64>(scale_bits(bits, static_cast<int64>(offered))) < wanted;
  }

  // The first step whose token is not accepted, num_draft if all are, in all threads.
  __device__ __forceinline__ int first_rejected() const {
    int step = static_cast<int>(threadIdx.x % 32);
    unsigned rejected;
#pragma unroll 1
    while ((rejected = __ballot_sync(0xffffffffu, !accepted(step))) == 0) step += 32;
    return step - static_cast<int>(threadIdx.x % 32) + __ffs(static_cast<int>(rejected)) - 1;
  }

  // The token after the accepted ones, from what the target has more of than the draft, which has none behind the last.
  __device__ __forceinline__ int redrawn(int step) {
    const bool beside = drafted(step) >= 0;
    ProposalStage<Config> stage{proposal_of(beside ? step : 0), row.first_token, params.vocab_size, proposal, beside, {}};
    Extremes mine = load_slice<Config>(target_of(step - 1), row.first_token, params.vocab_size, row.shared.slice, stage);
    // Both rows' faults in one message: the target's makes its largest infinite, the draft's adds to it what no probability has.
    constexpr float kNoProposal = 4.0f;
    if (!are_probabilities(mine.largest, mine.smallest)) {
      mine.largest = -minus_infinity();
    } else if (beside && !are_probabilities(stage.extremes.largest, stage.extremes.smallest)) {
      mine.largest += kNoProposal;
    }
    row.mailbox.opened();
    row.share_extremes(mine, false);
    if (row.largest >= 2.0f * kNoProposal) return -1;
    if (beside && row.largest < kNoProposal) {
      const int token = draw(
          [&](int place, float probability) {
            const uint64 mass = mass_of_probability(probability);
            const uint64 theirs = place >= kNoPlace ? 0 : mass_of_probability(proposal[place]);
            const uint64 left = mass > theirs ? mass - theirs : 0;
            return make_uint2(static_cast<unsigned>(left) & 0xffffu, static_cast<unsigned>(left >> 16));
          },
          step, Purpose::kResidual);
      if (token >= 0) return token;
    }
    return draw([](int, float probability) { return probability_limbs(probability); }, step, Purpose::kResidual);
  }

  __device__ __forceinline__ void run_rejection() {
    const int last = first_rejected();
    const int token = redrawn(last);
    if (row.rank != 0) return;
    int64* tokens = static_cast<int64*>(params.tokens) + request * (params.num_draft + 1);
#pragma unroll 1
    for (int step = static_cast<int>(threadIdx.x); step <= params.num_draft; step += kThreads) {
      tokens[step] = step < last ? drafted(step) : step == last ? token : -1;
    }
    if (threadIdx.x == 0) static_cast<int*>(params.num_accepted)[request] = last;
  }

  // A row after the other, along the path that the draws take.
  __device__ __forceinline__ void run_path() {
    const bool writes = row.rank == 0 && threadIdx.x == 0;
    int64* tokens = static_cast<int64*>(params.tokens) + request * (params.num_draft + 1);
    int* path = Config::kTree ? static_cast<int*>(params.path) + request * (params.num_draft + 1) : nullptr;
    int node = -1, num_accepted = 0;
    bool going = true;
    row.mailbox.opened();
#pragma unroll 1
    for (int step = 0; step <= params.num_draft; ++step) {
      int token = -1, next = -1;
      if (going) {
        const Extremes mine = load_slice<Config>(target_of(node), row.first_token, params.vocab_size, row.shared.slice);
        if (usable(mine)) {
          token = draw([](int, float probability) { return probability_limbs(probability); }, step, Purpose::kDraw);
        }
        if constexpr (Config::kTree) {
          next = token >= 0 ? child(node, token) : -1;
        } else {
          next = token >= 0 && token == drafted(step) ? step : -1;
        }
        going = next >= 0;
        node = next;
        num_accepted += going;
      }
      if (writes) {
        tokens[step] = token;
        if (Config::kTree) path[step] = next;
      }
      __syncthreads();
    }
    if (writes) static_cast<int*>(params.num_accepted)[request] = num_accepted;
  }

  __device__ __forceinline__ void run() {
    if constexpr (Config::kProposals) {
      run_rejection();
    } else {
      run_path();
    }
  }
};

template <class Config, class Params>
__device__ __forceinline__ void verify(const Params& params) {
  constexpr int kRowBytes = (sizeof(ClusterShared<Config>) + 15) / 16 * 16;
  static_assert(kRowBytes + (Config::kProposals ? 4 * RowShape<Config>::kBlockTokens : 0) <= Config::kSharedBytes);
  extern __shared__ __align__(16) unsigned char memory[];
  ClusterRow<Config> row(*reinterpret_cast<ClusterShared<Config>*>(memory));
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int request = static_cast<int>(blockIdx.x) / Config::kClusterBlocks;
  VerifyKernel<Config, Params>{params,
                               row,
                               reinterpret_cast<float*>(memory + kRowBytes),
                               request,
                               static_cast<const int64*>(params.seed)[request],
                               static_cast<const int64*>(params.position)[request],
                               static_cast<const int*>(params.sample)[request]}
      .run();
}

}  // namespace fi
