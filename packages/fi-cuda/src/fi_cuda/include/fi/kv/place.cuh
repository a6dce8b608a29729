// Where a token lies in a KV cache: page tables, ragged rows, slots (Kwon et al., 2023, section 4).
#pragma once

#include "fi/tile/rows.cuh"

namespace fi {

enum Addressing { kDense = 0, kIndptr = 1, kRagged = 2, kSlots = 3 };

// How a request's positions map to the cache. Dense: `entries` is [rows, stride] and request r uses row rows[r], or r if
// `rows` is null; indptr: its entries begin at indptr[r]; ragged: its cache rows begin there.
struct PageTable {
  const int* entries;
  const int* rows;
  const int* indptr;
  int64 stride;
};

// A page and a token in it; a ragged cache is one page.
struct Place {
  int page;
  int64 token;
};

// What place_of_position needs to know of a request: its row of the table, its first entry, or its first cache row. With slots
// nothing.
template <int kAddressing>
__device__ __forceinline__ int origin_of(const PageTable& table, int request) {
  if constexpr (kAddressing == kSlots) {
    return 0;
  } else if constexpr (kAddressing == kDense) {
    return table.rows == nullptr ? request : table.rows[request];
  } else {
    return table.indptr[request];
  }
}

// kAddressing: dense, indptr or ragged; `origin` is the request's, `position` 0 or more and within the request.
template <int kAddressing, int kPageSize>
__device__ __forceinline__ Place place_of_position(const PageTable& table, int origin, int position) {
  if constexpr (kAddressing == kRagged) {
    return {0, static_cast<int64>(origin) + position};
  } else {
    const int64 first = kAddressing == kDense ? table.stride * origin : origin;
    return {table.entries[first + position / kPageSize], position % kPageSize};
  }
}

// `slot` (0 or more) is page * page_size + token, or the row of a ragged cache (kPageSize 0).
template <int kPageSize>
__device__ __forceinline__ Place place_of_slot(int64 slot) {
  if constexpr (kPageSize == 0) {
    return {0, slot};
  } else {
    return {static_cast<int>(slot / kPageSize), slot % kPageSize};
  }
}

// Elements before head 0 of a place; strides.outer is a page's, strides.inner a token's.
__device__ __forceinline__ int64 place_offset(const Place& place, RowStrides strides) {
  return place.page * strides.outer + place.token * strides.inner;
}

}  // namespace fi
