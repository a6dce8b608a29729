// Planning of shared prefixes: the rows of the list and where partial results lie, once it is known which nodes are used and how
// long pieces are.
#pragma once

#include "fi/attention/prefix_plan.cuh"

namespace fi {

// Steps of a piece, of nodes and of requests' own keys.
struct PieceSteps {
  int node, own;
};

template <class Config, class Params>
class PrefixWriter {
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr int kQueryHeads = Config::kHeads * Config::kGroupSize;

 public:
  __device__ __forceinline__ PrefixWriter(const Params& params, const PrefixTables& tables, PieceSteps chunk, int longest_own)
      : params_(params), thread_(static_cast<int>(threadIdx.x)), longest_own_(longest_own), chunk_(chunk), nodes_(tables.nodes),
        places_(tables.places), first_rows_(tables.first_rows) {}

  // Called by all threads of the block.
  __device__ __forceinline__ PrefixHeader run() {
    int total[3];  // rows of the list, of parts, merged tokens
    place_rows(total);
    write_rows(total[0]);
    write_segments(total[2]);
    return {total[0], total[2], 0, 0};
  }

 private:
  // Of nodes, then of places: rows of the list, parts, merged tokens.
  __device__ __forceinline__ void rows_of(int entry, int (&own)[3]) const {
    if (entry < params_.num_nodes) {
      NodeWork& work = nodes_[entry];
      work.pieces = work.pieces == 0 ? 0 : quotient(work.steps + chunk_.node - 1, chunk_.node);
      own[0] = work.tiles * work.pieces;
      own[1] = work.num_tokens * work.pieces * kQueryHeads;
      return;
    }
    PlaceWork& work = places_[entry - params_.num_nodes];
    const int pieces = work.pieces = work.steps <= chunk_.own ? 1 : quotient(work.steps + chunk_.own - 1, chunk_.own);
    own[0] = tiles_of(work.q_len, Config::kQueryTokens) * pieces;
    if (pieces == 1 && work.node < 0) return;
    own[1] = work.q_len * pieces * kQueryHeads;
    own[2] = work.q_len;
  }

  // Places of rows, parts and merged tokens; requests' keys have longer pieces, up to whole ones, if those would not fit.
  __device__ __forceinline__ void place_rows(int (&total)[3]) {
    const int num_nodes = params_.num_nodes, count = num_nodes + params_.num_requests;
    while (true) {
      total[0] = total[1] = total[2] = 0;
      scan_over<kThreads>(
          count, total, [&](int entry, int(&own)[3]) { rows_of(entry, own); },
          [&](int entry, const int(&before)[3], const int(&own)[3]) {
            first_rows_[entry] = before[0];
            if (entry < num_nodes) {
              nodes_[entry].first_part = before[1];
              return;
            }
            PlaceWork& work = places_[entry - num_nodes];
            work.first_part = own[2] > 0 ? before[1] : -1;
            work.first_merged = before[2];
          });
      if ((total[0] <= params_.max_rows && total[1] <= params_.max_parts) || chunk_.own > longest_own_) return;
      chunk_.own *= 2;
    }
  }

  // Nodes' first, tiles of one piece side by side: they read the same keys.
  __device__ __forceinline__ void write_rows(int num_rows) const {
    const int num_nodes = params_.num_nodes, *of_requests = first_rows_ + num_nodes;
    const int num_node_rows = of_requests[0];
    for (int row = thread_; row < num_rows; row += kThreads) {
      int4* to = static_cast<int4*>(params_.rows) + static_cast<int64>(row) * 4;
      if (row < num_node_rows) {
        const int idx = last_at_most(num_nodes, row, 0, [&](int at) { return first_rows_[at]; });
        write_node_row(to, nodes_[idx], row - first_rows_[idx]);
      } else {
        const int place = last_at_most(params_.num_requests, row, row - num_node_rows, [&](int at) { return of_requests[at]; });
        write_request_row(to, places_[place], row - of_requests[place]);
      }
    }
  }

  __device__ __forceinline__ void write_node_row(int4* to, const NodeWork& work, int inside) const {
    const int piece = work.tiles == 1 ? inside : inside / work.tiles;
    const int begin = quotient(work.kv_first, Config::kAlign) * Config::kAlign + piece * chunk_.node * Config::kTokens;
    to[0] = {places_[work.member_begin].request, 0, inside - piece * work.tiles, kNodeItem};
    to[1] = {begin, min(begin + chunk_.node * Config::kTokens, work.kv_end), work.first_part + piece * work.num_tokens * kQueryHeads,
             work.kv_first};
    to[2] = {work.t_begin, work.num_tokens, work.kv_end + work.num_tokens, -1};
    to[3] = {};
  }

  __device__ __forceinline__ void write_request_row(int4* to, const PlaceWork& work, int inside) const {
    const int tiles = tiles_of(work.q_len, Config::kQueryTokens), piece = tiles == 1 ? inside : inside / tiles;
    const int q_tile = inside - piece * tiles;
    const int last = min((q_tile + 1) * Config::kQueryTokens, work.q_len);
    const int stop = Config::kCausal ? max(work.kv_len - work.q_len + last, 0) : work.kv_len;
    const int begin = quotient(work.own_first, Config::kAlign) * Config::kAlign, keys = chunk_.own * Config::kTokens;
    const bool whole = work.pieces == 1;
    const int piece_begin = min(begin + (whole ? 0 : piece * keys), max(stop, begin));
    const int piece_end = whole ? stop : min(piece_begin + keys, stop);
    const int slot = work.first_part < 0 ? -1 : work.first_part + piece * work.q_len * kQueryHeads;
    to[0] = {work.request, 0, q_tile, kRequestItem};
    to[1] = {piece_begin, max(piece_end, piece_begin), slot, work.own_first};
    to[2] = {work.q_begin, work.q_len, work.kv_len, -1};
    to[3] = {};
  }

  // The request's own parts, then those of the nodes around it, from the inside. By the last threads first: the others may still
  // have rows to write.
  __device__ __forceinline__ void write_segments(int num_merged) const {
    for (int idx = kThreads - 1 - thread_; idx < num_merged; idx += kThreads) {
      const PlaceWork& work =
          places_[last_at_most(params_.num_requests, idx, idx, [&](int at) { return places_[at].first_merged; })];
      const int inside = idx - work.first_merged;
      PartSegment* segment = static_cast<PartSegment*>(params_.segments) + static_cast<int64>(idx) * params_.max_segments;
      PartSegment* const end = segment + params_.max_segments;
      *segment++ = {work.first_part + inside * Config::kGroupSize, work.q_len * Config::kGroupSize, work.pieces, work.q_begin + inside};
      const int position = work.kv_len - work.q_len + inside;
      for (int at = work.node; at >= 0; at = nodes_[at].parent) {
        const NodeWork& node = nodes_[at];
        if (node.pieces == 0) continue;
        const int row = work.t_begin + inside - node.t_begin;
        *segment++ = {node.first_part + row * Config::kGroupSize, node.num_tokens * Config::kGroupSize,
                      node.pieces, node.kv_end + row - position};
      }
      if (segment < end) *segment = {};
    }
  }

  const Params& params_;
  const int thread_, longest_own_;
  PieceSteps chunk_;
  NodeWork* nodes_;
  PlaceWork* places_;
  int* first_rows_;
};

}  // namespace fi
