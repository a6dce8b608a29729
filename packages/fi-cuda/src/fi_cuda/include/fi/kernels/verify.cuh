// Verification of speculative drafts, a cluster a request, one row of probabilities after the other: fi_core.verify_chain and
// fi_core.verify_tree define the result. A chain without draft probabilities is a tree whose node i has parent i - 1.
//
// Each step holds the target's row (and the draft's) in the blocks' shared memory, shares whether it is usable, sums up masses
// and draws in index order; the block with the drawn token tells the others.
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

  // Holds a row in `slice`; whether all of it are probabilities below 2.
  __device__ __forceinline__ bool hold(const void* probs, int64 offset, float* slice, Message kind) {
    const float* from = static_cast<const float*>(probs) + offset;
    row.share_extremes(load_slice<Config>(from, row.first_token, params.vocab_size, slice), false, kind);
    return row.smallest >= 0.0f && row.largest < 2.0f;
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

  // One step of rejection sampling (Leviathan et al., 2023): the token, and whether it is the drafted one accepted.
  __device__ __forceinline__ int accept_or_redraw(int step, bool target_usable, bool& accepted) {
    const int64 at = request * params.draft_probs_stride + step * params.draft_probs_step;
    const bool proposal_usable = hold(params.draft_probs, at, proposal, kExtremesAgain);
    const int token = drafted(step);
    accepted = false;
    if (token >= 0) {
      const float* target = static_cast<const float*>(params.target_probs) + request * params.target_stride;
      const uint64 wanted = target_usable ? mass_of_probability(target[step * params.target_step + token]) : 0;
      const float offered = static_cast<const float*>(params.draft_probs)[at + token];
      const RandomBits bits = random_bits(seed, position + step, sample, Purpose::kAccept);
      const int64 mass = proposal_usable ? static_cast<int64>(mass_of_probability(offered)) : 0;
      accepted = static_cast<uint64>(scale_bits(bits, mass)) < wanted;
      if (accepted) return token;
    }
    if (!target_usable) return -1;
    if (token >= 0 && proposal_usable) {
      const int redrawn = draw(
          [&](int place, float probability) {
            const uint64 mine = mass_of_probability(probability);
            const uint64 theirs = place >= kNoPlace ? 0 : mass_of_probability(proposal[place]);
            const uint64 left = mine > theirs ? mine - theirs : 0;
            return make_uint2(static_cast<unsigned>(left) & 0xffffu, static_cast<unsigned>(left >> 16));
          },
          step, Purpose::kResidual);
      if (redrawn >= 0) return redrawn;
    }
    return draw([](int, float probability) { return probability_limbs(probability); }, step, Purpose::kResidual);
  }

  __device__ __forceinline__ void run() {
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
        const int64 at = request * params.target_stride + (node + 1) * params.target_step;
        const bool usable = hold(params.target_probs, at, row.shared.slice, kExtremes);
        bool accepted = false;
        if (Config::kProposals && step < params.num_draft) {
          token = accept_or_redraw(step, usable, accepted);
        } else if (usable) {
          token = draw([](int, float probability) { return probability_limbs(probability); }, step,
                       Config::kProposals ? Purpose::kResidual : Purpose::kDraw);
        }
        if constexpr (Config::kTree) {
          next = token >= 0 ? child(node, token) : -1;
        } else {
          if (!Config::kProposals) accepted = token >= 0 && token == drafted(step);
          next = accepted ? step : -1;
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
