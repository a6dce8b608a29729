// Which keys (columns) a query (row) attends to: causality, sliding window and a packed mask. Integers only, for the
// host too; the rules are those of fi_core's reference attention.
//
// Positions of a request's queries and keys are aligned at the end: query q_idx of q_len stands at kv_len - q_len +
// q_idx, which is negative for queries that no key precedes.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

constexpr int kNoWindow = -1;

// Keys [low, high).
struct ColumnLimits {
  int low, high;

  FI_HOST_DEVICE bool empty() const { return low >= high; }
  // One comparison: columns below low wrap round to the top.
  FI_HOST_DEVICE bool contains(int column) const {
    return static_cast<unsigned>(column) - static_cast<unsigned>(low) <
           static_cast<unsigned>(high) - static_cast<unsigned>(low);
  }
};

FI_HOST_DEVICE int query_position(int q_idx, int q_len, int kv_len) { return kv_len - q_len + q_idx; }

// A causal query at p sees no key after p; a window w (at least 1, or kNoWindow) hides the keys up to p - w.
struct ColumnRule {
  bool causal;
  int window;

  // What a query at `position` (below kv_len) sees of kv_len keys; low <= high.
  FI_HOST_DEVICE ColumnLimits limits(int position, int kv_len) const {
    ColumnLimits result;
    result.high = !causal ? kv_len : position < 0 ? 0 : position + 1;
    // Subtracted only where it cannot leave 32 bits.
    result.low = window == kNoWindow || position < window ? 0 : position - window + 1;
    return result;
  }

  // Keys that some query of the positions [first, last] sees: what a tile of queries has to visit.
  FI_HOST_DEVICE ColumnLimits seen_by_any(int first, int last, int kv_len) const {
    return {limits(first, kv_len).low, limits(last, kv_len).high};
  }

  // Keys that every query of the positions [first, last] sees: no mask is needed there. May be empty, with low > high.
  FI_HOST_DEVICE ColumnLimits seen_by_all(int first, int last, int kv_len) const {
    return {limits(last, kv_len).low, limits(first, kv_len).high};
  }
};

// One query's row of fi_core's PackedMask: bit k of byte b is column 8 * b + k, 1 = visible; keys before `first_column`
// are not in it and visible.
struct PackedMaskRow {
  const unsigned char* bits;
  int first_column;

  FI_HOST_DEVICE bool visible(int column) const {
    const int bit = column - first_column;
    return bit < 0 || (bits[bit >> 3] >> (bit & 7) & 1) != 0;
  }
};

// Row q_idx of a request whose rows begin at `request_bits`, each padded to whole bytes; with `only_new` the columns
// are the last q_len keys, otherwise all kv_len.
FI_HOST_DEVICE PackedMaskRow packed_mask_row(
    const unsigned char* request_bits, bool only_new, int q_idx, int q_len, int kv_len) {
  const int num_columns = only_new ? q_len : kv_len;
  return {request_bits + static_cast<int64>(q_idx) * ((num_columns + 7) >> 3), only_new ? kv_len - q_len : 0};
}

}  // namespace fi
