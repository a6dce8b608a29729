// One token a row from logits: penalties, temperature, filters and the draw that fi_core.sample defines, with one read of the
// logits.
//
// A cluster holds a row in its blocks' shared memory (fi/sampling/row.cuh). The row's largest logit, which the masses need, is
// exchanged first. Rows with a small top_k are then decided by the first block (short_list.cuh); others find the last token
// that their filters keep (find_prefix.cuh), sum up the kept masses, and draw in index order.
// Config: Dtype, kVectorBytes, kClusterBlocks, kNumThreads, kWarpTokens; kTopK, kTopP, kMinP, kTypicalP: which filters some row
// uses; kColumns: parameters lie in columns from which slots may pick; with it kPenalised: penalties change the rows on their way
// in (fi/sampling/penalties.cuh, which has their Params).
// Params: logits [rows, vocab_size]; rows (int32, or int64 if wide_rows; null: in order); temperature, top_p, min_p float32
// and top_k int32 [outputs], temperature or null; seed, sample, position [outputs]; tokens int64 [outputs]. With kColumns also
// typical_p float32 and slots (int64 [outputs]: an output's place in all columns but position, below 0: none; null: in order).
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/sampling/penalties.cuh"
#include "fi/sampling/short_list.cuh"
#include "fi/sampling/typical_set.cuh"

namespace fi {

// An output's parameters, loaded while its row is: by one thread, into the block's shared memory.
template <class Config, class Params>
struct SampleStage {
  static constexpr bool kChanges = false;

  const Params& params;
  ClusterShared<Config>& shared;
  int output;
  int64 slot;

  __device__ __forceinline__ SampleStage(const Params& params, ClusterShared<Config>& shared, int output)
      : params(params), shared(shared), output(output), slot(output) {
    if constexpr (Config::kColumns) {
      if (params.slots != nullptr) slot = static_cast<const int64*>(params.slots)[output];
    }
  }

  // While the row is under way. A slot, which decides addresses, has been.
  __device__ __forceinline__ void begun() {
    clear_early(shared);
    if (threadIdx.x == 0) load(slot > 0 ? slot : 0);
  }

  __device__ __forceinline__ void load(int64 place) {
    RowFilters filters = load_filters<Config>(params, place);
    const int64 seed = static_cast<const int64*>(params.seed)[place];
    const int64 position = static_cast<const int64*>(params.position)[output];
    const int sample = static_cast<const int*>(params.sample)[place];
    normalise(filters, params.vocab_size);
    if (slot < 0) filters.valid = false;
    shared.filters = filters;
    shared.random = random_bits(seed, position, sample, Purpose::kDraw);
  }
};

// The same of a row with penalties.
template <class Config, class Params>
struct PenalisedSampleStage : PenaltyStage<Config, Params> {
  SampleStage<Config, Params>& plain;

  __device__ __forceinline__ PenalisedSampleStage(SampleStage<Config, Params>& plain, PenaltyPatch<Config, Params>& patch)
      : PenaltyStage<Config, Params>{patch, plain.output}, plain(plain) {}

  __device__ __forceinline__ void begun() {
    this->patch.ask(this->output);
    plain.begun();  // waits for what it loads
  }
};

template <class Config, class Params>
struct SampleKernel {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr bool kFilters = Config::kTopK || Config::kTopP || Config::kMinP || Config::kTypicalP;

  const Params& params;
  Row& row;
  int output;

  __device__ __forceinline__ void write(int token) const { static_cast<int64*>(params.tokens)[output] = token; }

  // The first token with the largest logit.
  __device__ __forceinline__ void write_first_of_largest() {
    auto& shared = row.shared;
#pragma unroll 1
    for (int block = 0; block < row.rank; ++block) {
      if (__uint_as_float(shared.extremes[block].x) == row.largest) return;
    }
    int first = 0x7fffffff;
    for_each_four<Config>(shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 3; e >= 0; --e) {
        if (logits[e] == row.largest) first = min(first, place + e);
      }
    });
    first = __reduce_min_sync(0xffffffffu, first);
    if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = static_cast<uint64>(first);
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64 least = shared.scratch[0];
#pragma unroll 1
      for (int warp = 1; warp < Row::kWarps; ++warp) least = shared.scratch[warp] < least ? shared.scratch[warp] : least;
      if (least != 0x7fffffff) write(row.first_token + static_cast<int>(least));
    }
  }

  // The first token in index order whose inclusive cumulative mass exceeds the random target; weight(place, logit) is 0 for
  // tokens that are not kept. Where it is known which block has it, the others have no work. False, in all blocks, if none is kept.
  template <class Weight>
  __device__ __forceinline__ bool draw(Weight weight, Answer end) {
    if (end.known() && static_cast<int>(end.block) != row.rank) return true;
    row.read_rank();
    row.sum_masses_over_warps(weight);
    uint64 target = end.amount;
    if (!end.known()) {
      uint64 before;
      const uint64 total = row.sum_over_blocks(before);
      if (Config::kTypicalP && total == 0) return false;  // joint filters may leave nothing
      target = static_cast<uint64>(scale_bits(row.shared.random, static_cast<int64>(total)));
      if (target < before || target >= before + row.shared.block_amount[row.rank]) return true;
      target -= before;
    }
    row.locate([&](int place, float logit) { return mass_limbs(weight(place, logit)); }, target,
               [&](int place) { write(row.first_token + place); });
    return true;
  }

  // The typical tokens; of those that the other filters keep, unless all filters look at the whole row. `end` answers a draw from
  // them if it is known.
  template <class Weight>
  __device__ __forceinline__ TypicalSet typical_set(const RowFilters& filters, Weight kept_weight, Answer& end) {
    TypicalSearch<Config> search{row};
    const bool alone = filters.top_k == 0 && !filters.has_top_p() && filters.min_p <= 0.0f;
    const TypicalSet found = search.find(
        filters.typical_p, alone,
        [&](int place, float logit) { return filters.joint ? row.weight(logit) : kept_weight(place, logit); },
        [&](uint64 total) { return RowFilters::share_of(filters.typical_p, total); });
    end = search.answer;
    return found;
  }

  __device__ __forceinline__ void run() {
    SampleStage<Config, Params> stage(params, row.shared, output);
    const auto* logits = static_cast<const typename Config::Dtype*>(params.logits) + source() * params.logits_stride;
    bool fits = true;
    const Extremes extremes = load(logits, stage, fits);
    ptx::allow_next_kernel();
    __syncthreads();
    const RowFilters& filters = row.shared.filters;
    const bool typical = Config::kTypicalP && filters.typical_p < 1.0f;
    const bool listed = Config::kTopK && ShortList<Config>::serves(filters) && !typical;
    // Penalties have divided the row. Without filters each logit's weight is needed once or twice, and the division then.
    const Divisor divisor(Config::kPenalised ? 1.0f : filters.temperature);
    const bool late = !kFilters && divisor.value != 1.0f && divisor.moderate;
    row.share(extremes, params.vocab_size, late ? 1.0f : divisor.value, listed);
    if (late) row.largest = __fdiv_rn(row.largest, divisor.value);
    if (!row.usable() || !filters.valid || !fits) {
      if (row.rank == 0 && threadIdx.x == 0) write(-1);
      return;
    }
    if (late) {
      // Quotients may be NaN where they overflow, and inexact where their size is below 1e-24: without mass, and all alike.
      draw([&](int, float logit) { return weight_or_none(row.largest - divisor.quotient(logit)); }, Answer{});
    } else if (filters.greedy || !drawn(filters, typical, listed)) {
      write_first_of_largest();
    }
  }

  // By the filters' rules. False, in all blocks, if they keep nothing.
  __device__ __forceinline__ bool drawn(const RowFilters& filters, bool typical, bool listed) {
    if constexpr (!kFilters) {
      return draw([&](int, float logit) { return row.weight(logit); }, Answer{});
    }
    if constexpr (Config::kTopK) {
      if (listed && drawn_from_list(filters)) return true;
    }
    RankPrefix prefix = every_token();
    Answer end;
    const Wish wish = typical ? Wish::kNothing : Wish::kDraw;
    bool known = false;
    if constexpr (Config::kBracket && Config::kTopP) {
      known = kept_by_bracket(row, filters, wish, prefix, end);
      if (known && !typical && filters.min_p <= 0.0f) {
        draw_kept(prefix, end);
        return true;
      }
    }
    if constexpr (Config::kTopK || Config::kTopP) {
      if (!known) prefix = kept_prefix(row, filters, wish, end);
    }
    const float min_p = filters.min_p;
    const auto kept_weight = [&](int place, float logit) {
      const float weight = row.weight(logit);
      return prefix.has(logit, row.first_token + place) && weight >= min_p ? weight : 0.0f;
    };
    if constexpr (Config::kTypicalP) {
      // One copy of the draw's code serves rows without the filter too.
      TypicalSet kept = {{row.largest, 0.0f}, every_token()};
      if (typical) kept = typical_set(filters, kept_weight, end);
      if (typical && end.known()) {
        draw_kept(kept, end);
        return true;
      }
      return draw(
          [&](int place, float logit) { return kept.has(logit, row.first_token + place) ? kept_weight(place, logit) : 0.0f; },
          end);
    }
    return draw(kept_weight, end);
  }

  // By all blocks, after a bracket's answer, of a RankPrefix or a TypicalSet; only the block that it names has work.
  template <class Kept>
  __device__ __forceinline__ void draw_kept(const Kept& kept, Answer end) {
    if (static_cast<int>(end.block) != row.rank) return;
    const auto mass = [&](int place, float logit) {
      return mass_limbs(kept.has(logit, row.first_token + place) ? row.weight(logit) : 0.0f);
    };
    row.locate(mass, end.amount, [&](int place) { write(row.first_token + place); });
  }

  // The row into the slice, with penalties divided by its temperature too; returns this thread's extremes. `fits`: its history has what it needs.
  __device__ __forceinline__ Extremes load(const typename Config::Dtype* logits, SampleStage<Config, Params>& stage, bool& fits) {
    float* slice = row.shared.slice;
    if constexpr (Config::kPenalised) {
      PenaltyPatch<Config, Params> patch(params, row.shared.penalties, slice, row.first_token);
      patch.locate(stage.output, stage.slot);
      PenalisedSampleStage<Config, Params> penalised(stage, patch);
      load_slice<Config>(logits, row.first_token, params.vocab_size, slice, penalised);
      fits = patch.apply();
      const Extremes found = patch.settle(row.shared.filters.temperature);
      if constexpr (kReadyLate<Config>) row.mailbox.ready();
      return found;
    } else {
      return load_slice<Config>(logits, row.first_token, params.vocab_size, slice, stage);
    }
  }

  // False, in all blocks, if the list cannot decide the row.
  __device__ __forceinline__ bool drawn_from_list(const RowFilters& filters) {
    ShortList<Config> list{row};
    const int count = list.collect(filters.top_k, false);
    if (count < 0) return false;
    if (Config::kTopP && filters.joint && filters.has_top_p()) {
      row.sum_masses_over_warps([&](int, float logit) { return row.weight(logit); });
      uint64 before;
      const uint64 row_mass = row.sum_over_blocks(before);
      if (threadIdx.x == 0) row.shared.search.boundary_wanted = row_mass;
    }
    if (row.rank == 0) {
      const int token = list.draw(count, filters, row.shared.random);
      if (token >= 0) write(token);
    }
    return true;
  }

  __device__ __forceinline__ int64 source() const {
    if (params.rows == nullptr) return output;
    return params.wide_rows ? static_cast<const int64*>(params.rows)[output] : static_cast<const int*>(params.rows)[output];
  }
};

template <class Config, class Params>
__device__ __forceinline__ void sample(const Params& params) {
  static_assert(sizeof(ClusterShared<Config>) <= Config::kSharedBytes);
  extern __shared__ __align__(16) unsigned char memory[];
  ClusterRow<Config> row(*reinterpret_cast<ClusterShared<Config>*>(memory));
  ptx::wait_for_previous_kernel();
  SampleKernel<Config, Params>{params, row, static_cast<int>(blockIdx.x) / Config::kClusterBlocks}.run();
}

}  // namespace fi
