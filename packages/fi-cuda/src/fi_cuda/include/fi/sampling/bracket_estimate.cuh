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
  // Columns of counts are as many as lanes, and each warp begins with another one, so that those lanes that have a partial round
  // are spread over them. As many tokens are in one at most:
  static constexpr int kPartialLanes = (RowShape<Config>::kWarpTokens % 128 + 3) / 4;
  static constexpr int kSpread = 32 % kWarps == 0 ? 32 / kWarps : 0;
  static constexpr int kMostInColumn =
      4 * (kWarps * RowShape<Config>::kFullRounds + (kSpread > 0 ? (kPartialLanes * kWarps + 31) / 32 : kWarps));
  // A word of a column is the sum of what its tokens add: the lowest bit of a float's exponent, which counts them, and as its mantissa
  // their place, in parts of a bin, from 2 bins before the first one on. So a number's bits that do not fit follow from the places.
  static constexpr int kSteps = kMostInColumn <= 992 ? 128 : 64;
  static constexpr unsigned kOneToken = 1u << 23, kBefore = 2;
  static_assert(kMostInColumn * kSteps * (kRankBins + kBefore) < kOneToken && kMostInColumn < 512 * (kBefore + 1));

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
    // A word for each lane and bin, in a bank of its own, so that no two lanes collide whatever the distribution.
    unsigned char* column = reinterpret_cast<unsigned char*>(&search.counts[0][(lane + kSpread * warp) % 32]) - kBefore * sizeof(search.counts[0]);
    const float per_unit = __fdividef(1.0f, row.largest - bottom);
    const float offset = -bottom * per_unit;
    static_assert(sizeof(search.counts[0]) == 128);
    constexpr float kUnit = 1.40129846e-45f, kFirst = 1.17549435e-38f + kBefore * kSteps * kUnit;  // 2^-149; above 2^-126
    const auto count_four = [&](float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // From 0 at the bottom, also for NaN, to 1.
        const float share = __saturatef(fmaf(logits[e], per_unit, offset));
        const unsigned place = __float_as_uint(fmaf(share, (kRankBins * kSteps - 1) * kUnit, kFirst));
        const unsigned bin = place & (kRankBins * 2 - 1) * kSteps;
        atomicAdd(reinterpret_cast<unsigned*>(column + bin * (128 / kSteps)), place);
      }
    };
    const float* mine = row.shared.slice + place_of_full_round<Config>(0);
#pragma unroll 5
    for (int round = 0; round < RowShape<Config>::kFullRounds; ++round) {
      count_four(reinterpret_cast<const float4*>(mine)[round * 32]);
    }
    if (kPartialLanes > 0) {
      const int place = place_of_partial_round<Config>();
      if (place != kNoPlace) count_four(*reinterpret_cast<const float4*>(row.shared.slice + place));
    }
    __syncthreads();
    send_columns();
    row.mailbox.receive_in_first_warp(kParts, kBlocks * kRankBins * 4);
  }

  // Of the tokens that a column's word counts.
  __device__ __forceinline__ static unsigned number_of(unsigned word, unsigned bin) {
    unsigned number = word / kOneToken;
    const unsigned least = number * (kBefore + bin) * kSteps, places = word % kOneToken;
#pragma unroll
    for (int more = 512; more <= kMostInColumn; more += 512) number += places >= least + more * (kBefore + bin) * kSteps ? 512 : 0;
    return number;
  }

  // This block's part of count_parts to all blocks: a few threads share a bin's columns and send what they are in all, each to some blocks.
  __device__ __forceinline__ void send_columns() const {
    auto& search = row.shared.search;
    constexpr int kSharers = kThreads >= 512 ? 8 : 4, kFours = 8 / kSharers;  // of a bin; of 4 columns, for a thread
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins * kSharers; idx += kThreads) {
      const unsigned bin = idx / kSharers, part = idx % kSharers;
      unsigned number = 0, places = 0;
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        // Neighbouring bins begin at different banks.
        const int at = (four + bin) % kFours * kSharers + part;
        const uint4 columns = reinterpret_cast<const uint4*>(search.counts[bin])[at];
        number += number_of(columns.x, bin) + number_of(columns.y, bin) + number_of(columns.z, bin) + number_of(columns.w, bin);
        places += columns.x % kOneToken + columns.y % kOneToken + columns.z % kOneToken + columns.w % kOneToken;
      }
      places -= number * (kBefore + bin) * kSteps;
      number = sum_over_lanes<kSharers>(number);
      places = sum_over_lanes<kSharers>(places);
      const float mean = __fdividef(static_cast<float>(places) * (65536.0f / kSteps), fmaxf(static_cast<float>(number), 1.0f));
      unsigned* place = &search.count_parts[row.rank][kRankBins - 1 - bin];
#pragma unroll
      for (unsigned block = part; block < kBlocks; block += kSharers) {
        row.mailbox.send(kParts, block, place, number << 16 | static_cast<unsigned>(mean));
      }
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
    float places[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const uint2 two = *reinterpret_cast<const uint2*>(&search.count_parts[block][2 * lane]);
      numbers[0] += static_cast<int>(two.x >> 16);
      numbers[1] += static_cast<int>(two.y >> 16);
      places[0] = fmaf(static_cast<float>(two.x >> 16), static_cast<float>(two.x & 0xffff), places[0]);
      places[1] = fmaf(static_cast<float>(two.y >> 16), static_cast<float>(two.y & 0xffff), places[1]);
    }
    // Places of the slices without a token stand at the lower end of the last bin.
    if (lane == 31) numbers[1] -= kBlocks * RowShape<Config>::kBlockTokens - row.vocab_size;
    const float width = bins.width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float number = static_cast<float>(numbers[half]);
      const float place = __fdividef(places[half], fmaxf(number, 1.0f) * 65536.0f);
      bins.mean[half] = numbers[half] > 0 ? 1.0f - 0.5f / kSteps - place : 0.5f;
      // Spread tokens weigh a little more than as many at the mean.
      const float spread = numbers[half] >= 8 ? fmaf(width * width, 1.0f / 24, 1.0f) : 1.0f;
      bins.weight[half] = number * spread * weight_of((static_cast<float>(2 * lane + half) + bins.mean[half]) * width);
    }
    return bins;
  }

  // Numbers of a bin's tokens up to a part of it, both as shares, are related by a density that is linear in the bin, as the mean
  // place has it.
  __device__ __forceinline__ static float slope_of(float mean) { return fminf(fmaxf(6.0f * mean - 3.0f, -1.0f), 1.0f); }

  // By the first warp, after count, where the tokens of one logit make up the bin in which the kept weight reaches `fraction` of all: a
  // bracket around it, no wider than its place is known.
  __device__ __forceinline__ void choose_tied(float fraction) const {
    const int lane = static_cast<int>(threadIdx.x);
    const Bins bins = bins_of_lane();
    const Prefix<float> weights = prefix_over_lanes<32>(bins.weight[0] + bins.weight[1]);
    const float wanted = fraction * weights.total;
    const int holders = static_cast<int>(__ballot_sync(0xffffffffu, wanted <= weights.inclusive));
    if (lane != (holders != 0 ? __ffs(holders) - 1 : 31)) return;
    const int second = wanted > weights.exclusive + bins.weight[0] ? 1 : 0;
    const float place = static_cast<float>(2 * lane + second) + (second != 0 ? bins.mean[1] : bins.mean[0]);
    constexpr float kDoubt = 1.0f / 32;
    row.shared.search.bracket = make_float2(row.largest - (place + kDoubt) * bins.width, row.largest - (place - kDoubt) * bins.width);
  }

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
