// The work list's rows as one worker computes them on its own: where its range is cut, and its rows' places in the list.
// Pure arithmetic, for the host too; fi/kernels/attention_plan.cuh has a warp for each worker and a thread for each cut.
//
// Items before a worker's: one for each tile that begins before its cut, and one for each worker up to it whose cut lies
// inside a tile, which goes on with that tile. Merge records before a worker's: one for each tile that has a cut inside it,
// of which the first counts. So the cuts alone, each found by one search, place every row.
#pragma once

#include "fi/scheduler/partition.cuh"

namespace fi {

namespace plan {

using namespace fi::scheduler;

constexpr int kItemQuads = 4;   // an item's row is 16 int32, fi/attention/item.cuh
constexpr int kMergeQuads = 2;  // a merge record is 8
constexpr int kStartQuads = 8;  // a worker's start is 32, the last half a copy of its first item's row

// Four int32 columns, stored at once.
struct alignas(16) Quad {
  int x, y, z, w;
};

FI_HOST_DEVICE Quad quad(Int x, Int y, Int z, Int w) {
  return {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z), static_cast<int>(w)};
}

// How many workers share a line, the first ones: in the balanced partition no more than get a step each and a third of what an
// item costs. With less than a step, most of the pieces of a short batch would be empty and yet waited for.
FI_HOST_DEVICE Int num_sharing(const Line& line) {
  const Params& params = line.params;
  if (params.max_splits > 0) return params.num_workers;
  const Int least = max_of(params.kinds[0].item_cost / 3, params.kinds[0].step_cost);
  return min_of(max_of(floor_div(line.total_cost, least), 1), params.num_workers);
}

// What stands before some place on the line; items and merges in batch-invariant mode only.
struct Totals {
  Int cost, tiles, items, merges;
};

FI_HOST_DEVICE Totals totals_of(const Line& line, Int request) {
  const Request geometry = request_at(line, request);
  Totals totals = {request_cost(line.params, geometry), geometry.num_q_tiles, 0, 0};
  if (line.params.max_splits > 0) {
    count_pieces(line.params, geometry, geometry.num_q_tiles, &totals.items, &totals.merges);
  }
  return totals;
}

// Exclusive prefix sums over requests, for one KV head, [num_requests + 1] each; the first two are the line's.
struct Prefixes {
  Int *cost, *tiles, *items, *merges;
};

// Where a worker begins: tiles before the cut's, and the step (balanced) or piece (batch-invariant) in that tile; in
// batch-invariant mode also the items and merge records before.
struct Cut {
  Int tile_idx, inner, num_items, num_merges;
};

FI_HOST_DEVICE Cut cut_at(const Line& line, const Prefixes& before, const Cursor& cursor, Int position) {
  const Params& params = line.params;
  Cut cut = {cursor.tile_idx, 0, 0, 0};
  if (params.max_splits == 0) {
    cut.inner = cut_step(line, cursor, position);
    return cut;
  }
  const Split split = cursor.range.split;
  const Int is_split = split.splits > 1;
  cut.inner = first_piece(kind_at(params, cursor.geometry.kind), split, position - cursor.start);
  Int items, merges;
  count_pieces(params, cursor.geometry, cursor.q_tile, &items, &merges);
  items += before.items[cursor.request];
  merges += before.merges[cursor.request];
  if (params.heads_first) {
    items += cursor.kv_head * before.items[line.num_requests];
    merges += cursor.kv_head * before.merges[line.num_requests];
  } else {
    items = items * params.num_kv_heads + cursor.kv_head * split.splits;
    merges = merges * params.num_kv_heads + cursor.kv_head * is_split;
  }
  cut.num_items = items + cut.inner;
  cut.num_merges = merges + (cut.inner > 0 ? is_split : 0);
  return cut;
}

// The end of the line.
FI_HOST_DEVICE Cut last_cut(const Line& line, const Prefixes& before) {
  const Int heads = line.params.num_kv_heads;
  Cut cut = {before.tiles[line.num_requests] * heads, 0, 0, 0};
  if (line.params.max_splits > 0) {
    cut.num_items = before.items[line.num_requests] * heads;
    cut.num_merges = before.merges[line.num_requests] * heads;
  }
  return cut;
}

// Whether a worker's cut is the first inside its tile; `before` is the cut before it.
FI_HOST_DEVICE bool is_first_inside(const Cut& cut, const Cut& before) {
  return cut.inner > 0 && (before.tile_idx != cut.tile_idx || before.inner == 0);
}

// What the cuts up to a worker's, its own included, say of its rows; `continuing`, `split_tiles` and `last_first` count only
// in the balanced partition.
struct Place {
  Int continuing;   // cuts inside a tile
  Int split_tiles;  // cuts that are the first inside a tile
  Int last_first;   // the worker of the last of those

  FI_HOST_DEVICE Int first_item(const Line& line, const Cut& cut) const {
    return line.params.max_splits > 0 ? cut.num_items : cut.tile_idx + continuing;
  }
  FI_HOST_DEVICE Int first_merge(const Line& line, const Cut& cut) const {
    return line.params.max_splits > 0 ? cut.num_merges : split_tiles;
  }
};

// Writes one worker's rows, each in quads of columns shared among `num_lanes` lanes: a sink of emit_worker.
struct RowWriter {
  const Line& line;
  Quad* item_rows;   // of the list
  Quad* merge_rows;  // of the list
  Quad* start_row;   // of the worker
  int worker;
  int lane, num_lanes;
  Int tail_of_first;  // the worker that first goes on with the tile in which this worker's range begins
  Int item_idx, merge_idx;
  bool any;

  // The item's tile as its merge record has it: (merge record, head slot, first tail slot, end of the tail slots).
  FI_HOST_DEVICE Quad merged(const Cursor& cursor, Int slot) const {
    if (slot < 0) return quad(-1, 0, 0, 0);
    const Params& params = line.params;
    if (params.max_splits > 0) {
      const Int head = cursor.tile_idx * params.max_splits;
      return quad(slot == head ? merge_idx : merge_idx - 1, head, head + 1, head + cursor.range.split.splits);
    }
    const bool begins = slot >= params.num_workers;
    const Int tail = begins ? worker + 1 : tail_of_first;
    const Int last = last_worker_before(line, tail, cursor.start + cursor.range.cost);
    return quad(begins ? merge_idx : merge_idx - 1, params.num_workers + tail - 1, tail, last + 1);
  }

  FI_HOST_DEVICE void items(const Cursor& cursor, Int kv_begin, Int kv_end, Int slot, Int count) {
    const Quad tile = merged(cursor, slot);
    const int num_units = static_cast<int>(count) * kItemQuads;
    Quad* rows = item_rows + item_idx * kItemQuads;
#pragma unroll 1
    for (int unit = lane; unit < num_units; unit += num_lanes) {
      const int column = unit % kItemQuads;
      Quad value = quad(tile.y, tile.z, tile.w, 0);
      if (column == 0) value = quad(cursor.request, cursor.kv_head + unit / kItemQuads, cursor.q_tile, cursor.geometry.kind);
      if (column == 1) value = quad(kv_begin, kv_end, slot, 0);
      if (column == 2) value = quad(line.q_indptr[cursor.request], cursor.geometry.q_len, cursor.geometry.kv_len, tile.x);
      rows[unit] = value;
      if (!any && unit < kItemQuads) start_row[kStartQuads - kItemQuads + column] = value;
    }
    item_idx += count;
    any = true;
  }

  FI_HOST_DEVICE void merge(const Cursor& cursor, Int head_slot, Int tail_begin, Int tail_end) {
    if (lane == 0) {
      Quad* row = merge_rows + merge_idx * kMergeQuads;
      row[0] = quad(cursor.request, cursor.kv_head, cursor.q_tile, cursor.geometry.kind);
      row[1] = quad(head_slot, tail_begin, tail_end, 0);
    }
    ++merge_idx;
  }
};

// Whether a worker's items follow from its cut and the next one, each by itself.
FI_HOST_DEVICE bool items_follow_from_cuts(const Params& params) {
  return params.max_splits == 0 && !params.heads_first && one_tile_each(params);
}

// The request whose tiles, one a head, are number `tile` of one head: the last before which there are no more.
FI_HOST_DEVICE Int request_of_tile(const Line& line, Int tile) {
  Int low = 0, high = line.num_requests;
  while (high - low > 1) {
    const Int middle = (low + high) / 2;
    if (line.tile_prefix[middle] <= tile) low = middle; else high = middle;
  }
  return low;
}

// Writes the `count` items between a worker's cut and the next worker's, each lane every num_lanes-th: what emit_worker and
// RowWriter do one request after the other.
FI_HOST_DEVICE void write_items(const RowWriter& rows, const Cut& cut, const Cut& next, Int count) {
  const Line& line = rows.line;
  const Int heads = line.params.num_kv_heads, kv_tokens = line.params.kinds[0].kv_tokens;
#pragma unroll 1
  for (Int idx = rows.lane; idx < count; idx += rows.num_lanes) {
    const Int tile = cut.tile_idx + idx, tile_of_head = floor_div(tile, heads), head = tile - tile_of_head * heads;
    const Int request = request_of_tile(line, tile_of_head);
    const Request geometry = request_at(line, request);
    const TileRange range = tile_range(line.params, geometry, 0);
    const bool ends_inside = idx == count - 1 && next.inner > 0;
    const Int step_begin = idx == 0 ? cut.inner : 0, step_end = ends_inside ? next.inner : range.steps;
    const bool begins = step_begin == 0 && ends_inside;
    const Int slot = step_begin > 0 ? rows.worker : ends_inside ? line.params.num_workers + rows.worker : kNoSlot;
    Quad merged = quad(-1, 0, 0, 0);
    if (slot != kNoSlot) {
      const Int tail = begins ? rows.worker + 1 : rows.tail_of_first;
      const Int end = line.cost_prefix[request] * heads + (head + 1) * range.cost;
      const Int last = last_worker_before(line, tail, end);
      merged = quad(begins ? rows.merge_idx : rows.merge_idx - 1, line.params.num_workers + tail - 1, tail, last + 1);
    }
    const Quad row[kItemQuads] = {
        quad(request, head, 0, geometry.kind),
        quad((range.first_step + step_begin) * kv_tokens, min_of((range.first_step + step_end) * kv_tokens, range.kv_stop),
             slot, 0),
        quad(line.q_indptr[request], geometry.q_len, geometry.kv_len, merged.x),
        quad(merged.y, merged.z, merged.w, 0)};
#pragma unroll
    for (int column = 0; column < kItemQuads; ++column) {
      rows.item_rows[(rows.item_idx + idx) * kItemQuads + column] = row[column];
      if (idx == 0) rows.start_row[kStartQuads - kItemQuads + column] = row[column];
    }
    if (begins) {
      Quad* merge_row = rows.merge_rows + rows.merge_idx * kMergeQuads;
      merge_row[0] = row[0];
      merge_row[1] = quad(merged.y, merged.z, merged.w, 0);
    }
  }
}

}  // namespace plan

}  // namespace fi
