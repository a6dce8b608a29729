// About where in a row's rank order the mass that top_p keeps ends.
//
// One pass over the slice counts tokens in 64 bins of equal width in the logit, and adds up their places in these. A bin's count
// times the weight at the mean place says, to within a hundred or two of tokens, after how many of them the running mass reaches its
// target.
#pragma once

#include "fi/sampling/cluster_row.cuh"

namespace fi {

template <class Config>
struct BracketEstimate {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kRounds = RowShape<Config>::kRounds;
  static constexpr unsigned kOneToken = 1u << 18;
  static_assert(RowShape<Config>::kBlockTokens <= 32 * 1024);

  Row& row;

  // Leaves in search.bracket the logits from which and up to which about `margin` tokens lie on each side of the place at which the
  // kept weight reaches `fraction` of all, and list_count 0. False, in all blocks, if no two logits with mass differ.
  __device__ __forceinline__ bool run(float fraction, int margin) {
    if (!(row.largest > bottom())) return false;
    count(kClearsEarly<Config>);
    if (threadIdx.x < 32) choose(fraction, margin);
    __syncthreads();
    return true;
  }

  // From which logit on tokens have mass, or are. Whole warps; read again, the smallest logit needs no register in between.
  __device__ __forceinline__ float bottom() const {
    const float smallest = smallest_of_warp(__uint_as_float(row.shared.extremes[threadIdx.x % kBlocks].y));
    return fmaxf(row.largest - kMasslessShortfall, smallest);
  }

  // Of each bin the number of the row's tokens and their mean place in it, of every block, in search.count_parts for the first warp: the upper and the
  // lower 16 bits. The bin of the largest logits is first; places are from 0 at a bin's lower end.
  __device__ __forceinline__ void count(bool cleared) {
    const float bottom = this->bottom();
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    if (!cleared) {
      clear_counts<Config>(search);
      __syncthreads();
    }
    // A word for each lane and bin, in the lane's bank, so that no two lanes collide whatever the distribution.
    unsigned char* column = reinterpret_cast<unsigned char*>(&search.counts[0][lane]);
    const float per_unit = __fdividef(1.0f, row.largest - bottom);
    const float offset = -bottom * per_unit;
    static_assert(sizeof(search.counts[0]) == 128);
    for_each_four<Config>(row.shared.slice, [&](int, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // From 0 at the bottom, also for NaN, to 1. In a float of 2^16 + 2^11, bins are multiples of 2^7, a bin's bytes; below is the
        // place in the bin, in 128ths, and above, of 2^11, the bit that counts. A column has no more than 2^10 tokens.
        const float place = __saturatef(fmaf(logits[e], per_unit, offset));
        const unsigned bin = __float_as_uint(fmaf(place, kRankBins - 0.0078125f, 65536.0f + 2048.0f));
        atomicAdd(reinterpret_cast<unsigned*>(column + (bin & ((kRankBins - 1) * 128))), bin & (kOneToken | 127));
      }
    });
    __syncthreads();
    add_columns();
    __syncthreads();
    const unsigned* own = reinterpret_cast<const unsigned*>(search.own_bins);
    uint4* parts = reinterpret_cast<uint4*>(search.count_parts[row.rank]);
#pragma unroll 1
    for (int block = warp; block < kBlocks; block += kWarps) {
      if (lane < kRankBins / 4) {
        row.mailbox.send(kParts, static_cast<unsigned>(block), parts + lane, reinterpret_cast<const uint4*>(own)[lane]);
      }
    }
    row.mailbox.receive_in_first_warp(kParts, kBlocks * kRankBins * 4);
  }

  // A bin's number of tokens and their mean place in 2^16ths, in search.own_bins: a few threads share its columns.
  __device__ __forceinline__ void add_columns() const {
    auto& search = row.shared.search;
    constexpr int kParts = kThreads >= 512 ? 8 : 4, kFours = 8 / kParts;  // of a bin; of 4 columns, for a thread
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins * kParts; idx += kThreads) {
      const int bin = idx / kParts, part = idx % kParts;
      unsigned number = 0, places = 0;
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        // Neighbouring bins begin at different banks.
        const int at = (four + bin) % kFours * kParts + part;
        const uint4 columns = reinterpret_cast<const uint4*>(search.counts[bin])[at];
        number += columns.x / kOneToken + columns.y / kOneToken + columns.z / kOneToken + columns.w / kOneToken;
        places += columns.x % kOneToken + columns.y % kOneToken + columns.z % kOneToken + columns.w % kOneToken;
      }
      number = sum_over_lanes<kParts>(number);
      places = sum_over_lanes<kParts>(places);
      const float mean = __fdividef(static_cast<float>(places) * 512.0f, fmaxf(static_cast<float>(number), 1.0f));
      unsigned* own = reinterpret_cast<unsigned*>(search.own_bins);
      if (part == 0) own[kRankBins - 1 - bin] = number << 16 | static_cast<unsigned>(mean);
    }
  }

  // Two bins of the row, number 2 * lane and the next.
  struct Bins {
    float width;
    int numbers[2];              // of tokens
    float mean[2], weight[2];    // of a bin's tokens: how far below its upper end, in its width, and what they weigh
  };

  // By the first warp, after count.
  __device__ __forceinline__ Bins bins_of_lane() const {
    const auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x);
    Bins bins = {(row.largest - bottom()) / kRankBins, {0, 0}, {}, {}};
    auto& numbers = bins.numbers;
    uint64 places[2] = {0, 0};
#pragma unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const uint2 two = *reinterpret_cast<const uint2*>(&search.count_parts[block][2 * lane]);
      numbers[0] += static_cast<int>(two.x >> 16);
      numbers[1] += static_cast<int>(two.y >> 16);
      places[0] += static_cast<uint64>(two.x >> 16) * (two.x & 0xffff);
      places[1] += static_cast<uint64>(two.y >> 16) * (two.y & 0xffff);
    }
    // Places of the slices without a token stand at the lower end of the last bin.
    if (lane == 31) numbers[1] -= kBlocks * kWarps * kRounds * 128 - row.vocab_size;
    const float width = bins.width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float number = static_cast<float>(numbers[half]);
      const float place = __fdividef(static_cast<float>(places[half]), fmaxf(number, 1.0f) * 65536.0f);
      bins.mean[half] = numbers[half] > 0 ? 1.0f - 1.0f / 256 - place : 0.5f;
      // Spread tokens weigh a little more than as many at the mean.
      const float spread = numbers[half] >= 8 ? fmaf(width * width, 1.0f / 24, 1.0f) : 1.0f;
      bins.weight[half] = number * spread * weight_of((static_cast<float>(2 * lane + half) + bins.mean[half]) * width);
    }
    return bins;
  }

  // Numbers of a bin's tokens up to a part of it, both as shares, are related by a density that is linear in the bin, as the mean
  // place has it.
  __device__ __forceinline__ static float slope_of(float mean) { return fminf(fmaxf(6.0f * mean - 3.0f, -1.0f), 1.0f); }

  // By the first warp, after count: search.bracket around the place at which the estimated weight reaches `fraction` of all.
  __device__ __forceinline__ void choose(float fraction, int margin) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x);
    const Bins bins = bins_of_lane();
    const float width = bins.width;
    const auto& numbers = bins.numbers;
    const auto& weight = bins.weight;
    const Prefix<int> tokens = prefix_over_lanes<32>(numbers[0] + numbers[1]);
    const Prefix<float> weights = prefix_over_lanes<32>(weight[0] + weight[1]);
    const float wanted = fraction * weights.total;
    const auto portion = [](float part, float whole) {
      return fminf(fmaxf(__fdividef(part, fmaxf(whole, 1e-30f)), 0.0f), 1.0f);
    };
    const auto first_lane = [](bool reached) {
      const int lanes = static_cast<int>(__ballot_sync(0xffffffffu, reached));
      return lanes != 0 ? __ffs(lanes) - 1 : 31;
    };
    // After how many tokens the running weight reaches it. A bin's first tokens weigh more than its last ones.
    const bool later = wanted > weights.exclusive + weight[0];
    float part = portion(wanted - weights.exclusive - (later ? weight[0] : 0.0f), later ? weight[1] : weight[0]);
    part -= 0.5f * width * part * (1.0f - part);
    float middle = static_cast<float>(tokens.exclusive + (later ? numbers[0] : 0)) +
                   part * static_cast<float>(later ? numbers[1] : numbers[0]);
    middle = __shfl_sync(0xffffffffu, middle, first_lane(wanted <= weights.inclusive));
    // The logit after `place` tokens.
    const auto edge = [&](float place) {
      const bool in_second = place >= static_cast<float>(tokens.exclusive + numbers[0]);
      const float passed = static_cast<float>(tokens.exclusive + (in_second ? numbers[0] : 0));
      float part = portion(place - passed, static_cast<float>(in_second ? numbers[1] : numbers[0]));
      part += slope_of(in_second ? bins.mean[1] : bins.mean[0]) * part * (1.0f - part);
      const float logit = row.largest - (static_cast<float>(2 * lane + in_second) + part) * width;
      return __shfl_sync(0xffffffffu, logit, first_lane(place < static_cast<float>(tokens.inclusive)));
    };
    float low = edge(middle + static_cast<float>(margin)), high = edge(fmaxf(middle - static_cast<float>(margin), 0.0f));
    if (middle + static_cast<float>(margin) >= static_cast<float>(tokens.total)) low = bottom();
    if (middle <= static_cast<float>(margin)) high = -minus_infinity();
    if (lane == 0) {
      search.bracket = make_float2(low, high);
      search.list_count = 0;
    }
  }
};

}  // namespace fi
