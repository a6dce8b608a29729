// The work partition: one source for the host (g++) and the device (NVRTC), in integers alone, without STL or system headers.
//
// Tiles of all requests are laid on one line in tile order, each as long as its cost. Worker w owns the positions [w *
// T / W, (w + 1) * T / W) of a line of length T. A cut that falls inside a tile is rounded down to a whole KV step
// (balanced: "stream-K" decomposition, Osama et al., PPoPP 2023), or tiles are split on their own length alone and
// whole pieces go to the worker that owns their start (batch-invariant).
//
// Two ways to use it, with equal results:
//   host:   a Cursor starts at the first tile, emit_worker() is called for workers 0, 1, 2, ...; nothing is searched.
//   device: worker w calls seek(line, worker_begin(line, w)) and then emit_worker() alone; this needs Line's prefix
//           sums. Where its rows go follows from a scan over what a counting sink saw, or from the workers' cuts.
#pragma once

#include "fi/scheduler/integers.cuh"

namespace fi {
namespace scheduler {

constexpr int kMaxKinds = 8;
constexpr Int kNoWindow = -1;
constexpr Int kNoSlot = -1;

// One kind of q tile; the fields of fi_scheduler.partition.TileKind.
struct TileKind {
  Int q_rows, kv_tokens, max_packed_rows, item_cost, step_cost;
};

// The fields of fi_scheduler.partition.PartitionParams; filled from an int64 array in this order
// (PartitionParams.packed).
struct Params {
  Int num_workers, num_kv_heads, group_size, num_kinds, causal;
  Int window;  // kNoWindow: full attention
  Int heads_first;
  Int max_splits;  // 0: balanced
  Int min_split_steps;
  TileKind kinds[kMaxKinds];
};

struct Line {
  Params params;
  const i32* q_indptr;  // [num_requests + 1]
  const i32* kv_lens;   // [num_requests]
  Int num_requests;
  Int total_cost;       // over all heads
  // Exclusive prefix sums over requests for one KV head, [num_requests + 1] each; only seek() reads them.
  const Int* cost_prefix;
  const Int* tile_prefix;
};

struct Request {
  Int q_len, kv_len;
  Int packed_rows;  // q_len * group_size
  Int num_q_tiles, kind;
};

// What batch-invariant mode makes of a tile: `splits` pieces of `chunk` steps (the last may be shorter).
struct Split {
  Int splits, chunk;
};

// KV steps of one tile: steps [first_step, first_step + steps) of kv_tokens each, cut off at kv_stop. The split is known in
// batch-invariant mode only.
struct TileRange {
  Int first_step, steps, kv_stop, cost;
  Split split;
};

// A tile on the line.
struct Cursor {
  Int request, q_tile, kv_head;
  Int tile_idx;
  Int start;  // position of the tile's start
  Request geometry;
  TileRange range;
};

// Kind `kind_idx`. On the device by selection: an index known only at run time would keep Params in local memory.
#if defined(__CUDA_ARCH__)
FI_HOST_DEVICE TileKind kind_at(const Params& params, Int kind_idx) {
  TileKind found = params.kinds[0];
#pragma unroll
  for (int idx = 1; idx < kMaxKinds; ++idx) {
    if (idx < params.num_kinds && idx == kind_idx) found = params.kinds[idx];
  }
  return found;
}
#else
FI_HOST_DEVICE const TileKind& kind_at(const Params& params, Int kind_idx) { return params.kinds[kind_idx]; }
#endif

// Whether no request has a second q tile. Decode: where Params are constants, most of this file then compiles to nothing.
FI_HOST_DEVICE bool one_tile_each(const Params& params) {
  return params.num_kinds == 1 && params.kinds[0].max_packed_rows <= params.kinds[0].q_rows;
}

FI_HOST_DEVICE Request request_at(const Line& line, Int request) {
  const Params& params = line.params;
  Request result;
  result.q_len = static_cast<Int>(line.q_indptr[request + 1]) - line.q_indptr[request];
  result.kv_len = line.kv_lens[request];
  result.packed_rows = result.q_len * params.group_size;
  result.kind = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int idx = 0; idx < kMaxKinds - 1; ++idx) {
    if (idx >= params.num_kinds - 1 || result.packed_rows <= params.kinds[idx].max_packed_rows) break;
    result.kind = idx + 1;
  }
  result.num_q_tiles =
      one_tile_each(params) ? result.packed_rows > 0 : ceil_div(result.packed_rows, kind_at(params, result.kind).q_rows);
  return result;
}

FI_HOST_DEVICE Split split_of(const Params& params, Int steps) {
  Int splits = min_of(max_of(ceil_div(steps, params.min_split_steps), 1), params.max_splits);
  Int chunk = ceil_div(steps, splits);
  Split result;
  result.splits = chunk == 0 ? 1 : ceil_div(steps, chunk);
  result.chunk = chunk;
  return result;
}

// KV range, cost and split of q tile `q_tile` of a request.
FI_HOST_DEVICE TileRange tile_range(const Params& params, const Request& request, Int q_tile) {
  const TileKind& kind = kind_at(params, request.kind);
  Int offset = request.kv_len - request.q_len;
  Int row_end = (q_tile + 1) * kind.q_rows;
  bool is_last = one_tile_each(params) || row_end >= request.packed_rows;
  Int token_end = is_last ? request.q_len : ceil_div(row_end, params.group_size);
  TileRange result;
  result.kv_stop = params.causal ? max_of(offset + token_end, 0) : request.kv_len;
  result.first_step = 0;
  if (params.window != kNoWindow) {
    Int token_begin = floor_div(q_tile * kind.q_rows, params.group_size);
    Int kv_start = min_of(max_of(offset + token_begin - params.window + 1, 0), result.kv_stop);
    result.first_step = floor_div(kv_start, kind.kv_tokens);
  }
  // kv_start == kv_stop only when both are 0 (a window is at least 1), so the difference is never a spurious step.
  result.steps = ceil_div(result.kv_stop, kind.kv_tokens) - result.first_step;
  result.cost = kind.item_cost + result.steps * kind.step_cost;
  result.split = {};
  if (params.max_splits > 0) result.split = split_of(params, result.steps);
  return result;
}

// KV steps of the first `count` q tiles together; count < num_q_tiles, so every tile counted has all its rows.
//
// With R = q_rows, G = group_size, K = kv_tokens, tile j ends at step ceil(max(0, offset * G + (j + 1) * R) / (G * K))
// and begins at step floor(max(0, (offset - window + 1) * G + j * R) / (G * K)): nested divisions by G and K collapse
// into one. Both are sums of floors of a linear function once the tiles clamped to 0 are left out.
FI_HOST_DEVICE Int leading_steps(const Params& params, const Request& request, Int count) {
  if (one_tile_each(params) || count == 0) return 0;
  const TileKind& kind = kind_at(params, request.kind);
  Int rows = kind.q_rows;
  Int unit = params.group_size * kind.kv_tokens;
  Int offset_rows = (request.kv_len - request.q_len) * params.group_size;
  Int steps;
  if (params.causal) {
    Int skipped = offset_rows < 0 ? min_of(floor_div(-offset_rows, rows), count) : 0;
    steps = floor_sum(count - skipped, unit, rows, offset_rows + (skipped + 1) * rows + unit - 1);
  } else {
    steps = count * ceil_div(request.kv_len, kind.kv_tokens);
  }
  if (params.window != kNoWindow) {
    Int begin_rows = offset_rows - (params.window - 1) * params.group_size;
    Int skipped = begin_rows < 0 ? min_of(ceil_div(-begin_rows, rows), count) : 0;
    steps -= floor_sum(count - skipped, unit, rows, begin_rows + skipped * rows);
  }
  return steps;
}

// Cost of q tiles [0, q_tile) of a request, for one head; q_tile < num_q_tiles.
FI_HOST_DEVICE Int leading_cost(const Params& params, const Request& request, Int q_tile) {
  const TileKind& kind = kind_at(params, request.kind);
  return q_tile * kind.item_cost + leading_steps(params, request, q_tile) * kind.step_cost;
}

// Cost of all q tiles of a request, for one head.
FI_HOST_DEVICE Int request_cost(const Params& params, const Request& request) {
  if (request.num_q_tiles == 0) return 0;
  if (one_tile_each(params)) return tile_range(params, request, 0).cost;
  Int last = request.num_q_tiles - 1;
  return leading_cost(params, request, last) + tile_range(params, request, last).cost;
}

// The first piece of a tile that starts no earlier than a position `inside` behind the tile's start; split.splits when
// there is none.
FI_HOST_DEVICE Int first_piece(const TileKind& kind, const Split& split, Int inside) {
  if (inside <= 0) return 0;
  if (split.splits == 1) return 1;
  Int piece = ceil_div(max_of(inside - kind.item_cost, 0), split.chunk * kind.step_cost);
  return min_of(max_of(piece, 1), split.splits);
}

// Batch-invariant pieces (items) and split tiles (merges) of q tiles [0, num_tiles) of a request, for one head.
FI_HOST_DEVICE void count_pieces(const Params& params, const Request& request, Int num_tiles, Int* items, Int* merges) {
  *items = 0;
  *merges = 0;
  for (Int tile = 0; tile < num_tiles; ++tile) {
    Int splits = tile_range(params, request, tile).split.splits;
    *items += splits;
    *merges += splits > 1;
  }
}

// floor(worker * T / W) without the product that could leave 64 bits.
FI_HOST_DEVICE Int worker_begin(const Line& line, Int worker) {
  Int quotient = floor_div(line.total_cost, line.params.num_workers);
  Int remainder = line.total_cost - quotient * line.params.num_workers;
  return worker * quotient + floor_div(worker * remainder, line.params.num_workers);
}

// The cut a position makes in the cursor's tile: a step in [0, steps); 0 is the tile's start.
FI_HOST_DEVICE Int cut_step(const Line& line, const Cursor& cursor, Int position) {
  const TileKind& kind = kind_at(line.params, cursor.geometry.kind);
  Int inside = position - cursor.start - kind.item_cost;
  return inside <= 0 ? 0 : floor_div(inside, kind.step_cost);
}

FI_HOST_DEVICE bool at_end(const Line& line, const Cursor& cursor) { return cursor.request == line.num_requests; }

// Move on to the first tile of the first request from cursor.request on that has tiles; heads first: of the next head
// when the requests of this one are through. Leaves cursor.request == num_requests at the end of the line.
FI_HOST_DEVICE void enter_request(const Line& line, Cursor& cursor) {
  cursor.q_tile = 0;
  for (;;) {
    while (cursor.request < line.num_requests && line.q_indptr[cursor.request] == line.q_indptr[cursor.request + 1]) {
      ++cursor.request;
    }
    if (cursor.request < line.num_requests) break;
    if (!line.params.heads_first || cursor.tile_idx == 0 || ++cursor.kv_head == line.params.num_kv_heads) return;
    cursor.request = 0;
  }
  cursor.geometry = request_at(line, cursor.request);
  cursor.range = tile_range(line.params, cursor.geometry, 0);
}

FI_HOST_DEVICE Cursor first_tile(const Line& line) {
  Cursor cursor = {};
  enter_request(line, cursor);
  return cursor;
}

// Move on by `count` tiles; more than one only over heads that stand side by side.
FI_HOST_DEVICE void advance(const Line& line, Cursor& cursor, Int count) {
  cursor.start += count * cursor.range.cost;
  cursor.tile_idx += count;
  if (!line.params.heads_first) {
    cursor.kv_head += count;
    if (cursor.kv_head < line.params.num_kv_heads) return;
    cursor.kv_head = 0;
  }
  if (!one_tile_each(line.params) && ++cursor.q_tile < cursor.geometry.num_q_tiles) {
    cursor.range = tile_range(line.params, cursor.geometry, cursor.q_tile);
    return;
  }
  ++cursor.request;
  enter_request(line, cursor);
}

// The tile that contains `position` (0 <= position < total_cost), by binary search over the prefix sums and then over
// the closed form of a request's q tiles.
FI_HOST_DEVICE Cursor seek(const Line& line, Int position) {
  const Params& params = line.params;
  Int head_cost = line.cost_prefix[line.num_requests];
  // `lanes` tiles of equal cost stand side by side at each (request, q tile): all heads, or one when heads come first.
  Int lanes = params.heads_first ? 1 : params.num_kv_heads;
  Int base_head = params.heads_first ? floor_div(position, head_cost) : 0;
  Int rest = position - base_head * head_cost;

  Int low = 0, high = line.num_requests;  // the last request with prefix * lanes <= rest; empty requests have no length
  while (high - low > 1) {
    Int middle = (low + high) / 2;
    if (line.cost_prefix[middle] * lanes <= rest) low = middle; else high = middle;
  }
  Cursor cursor = {};
  cursor.request = low;
  cursor.geometry = request_at(line, low);
  rest -= line.cost_prefix[low] * lanes;

  low = 0;
  high = one_tile_each(params) ? 1 : cursor.geometry.num_q_tiles;
  while (high - low > 1) {
    Int middle = (low + high) / 2;
    if (leading_cost(params, cursor.geometry, middle) * lanes <= rest) low = middle; else high = middle;
  }
  cursor.q_tile = low;
  cursor.range = tile_range(params, cursor.geometry, low);
  rest -= leading_cost(params, cursor.geometry, low) * lanes;
  Int lane = floor_div(rest, cursor.range.cost);

  cursor.kv_head = base_head + lane;
  cursor.start = position - (rest - lane * cursor.range.cost);
  cursor.tile_idx = base_head * line.tile_prefix[line.num_requests]
      + (line.tile_prefix[cursor.request] + low) * lanes + lane;
  return cursor;
}

// The last worker whose range begins before `position`.
FI_HOST_DEVICE Int last_worker_before(const Line& line, Int worker, Int position) {
  Int low = worker, high = line.params.num_workers;
  if (low + 1 == high || worker_begin(line, low + 1) >= position) return low;
  while (high - low > 1) {
    Int middle = (low + high) / 2;
    if (worker_begin(line, middle) < position) low = middle; else high = middle;
  }
  return low;
}

// Sink: items(cursor, kv_begin, kv_end, slot, count) and merge(cursor, head_slot, tail_begin, tail_end), called in line
// order. `count` items differ only in their KV head, which ascends from cursor.kv_head.
template <class Sink>
FI_HOST_DEVICE void emit_steps(const Line& line, const Cursor& cursor, Int step_begin, Int step_end, Int slot,
                               Int count, Sink& sink) {
  Int kv_tokens = kind_at(line.params, cursor.geometry.kind).kv_tokens;
  Int kv_begin = (cursor.range.first_step + step_begin) * kv_tokens;
  Int kv_end = min_of((cursor.range.first_step + step_end) * kv_tokens, cursor.range.kv_stop);
  sink.items(cursor, kv_begin, kv_end, slot, count);
}

// Tiles from the cursor's on that differ from it only in the head and end at or before `position`; at least the
// cursor's.
FI_HOST_DEVICE Int whole_tiles(const Line& line, const Cursor& cursor, Int position) {
  if (line.params.heads_first) return 1;
  Int count = line.params.num_kv_heads - cursor.kv_head;
  if (cursor.start + count * cursor.range.cost <= position) return count;
  return floor_div(position - cursor.start, cursor.range.cost);
}

// Items of one worker under the balanced partition. The cursor's tile must contain worker_begin(worker); it is left on
// the tile that contains the next worker's begin. The worker in which a split tile starts also emits its merge record.
template <class Sink>
FI_HOST_DEVICE void emit_balanced(const Line& line, Cursor& cursor, Int worker, Sink& sink) {
  Int num_workers = line.params.num_workers;
  Int end = worker_begin(line, worker + 1);
  Int step = cut_step(line, cursor, worker_begin(line, worker));
  for (; !at_end(line, cursor); step = 0) {
    Int tile_end = cursor.start + cursor.range.cost;
    if (end < tile_end) {
      Int stop = cut_step(line, cursor, end);
      if (stop == 0) return;
      emit_steps(line, cursor, step, stop, step > 0 ? worker : num_workers + worker, 1, sink);
      if (step == 0) {
        Int last = last_worker_before(line, worker + 1, tile_end);
        sink.merge(cursor, num_workers + worker, worker + 1, last + 1);
      }
      return;
    }
    Int count = step > 0 ? 1 : whole_tiles(line, cursor, end);
    emit_steps(line, cursor, step, cursor.range.steps, step > 0 ? worker : kNoSlot, count, sink);
    advance(line, cursor, count);
  }
}

// Items of one worker under the batch-invariant partition: the pieces whose start lies in the worker's range. The
// cursor stands on the tile that contains worker_begin(worker), or on the tile after it when none of its pieces is
// left.
template <class Sink>
FI_HOST_DEVICE void emit_invariant(const Line& line, Cursor& cursor, Int worker, Sink& sink) {
  Int begin = worker_begin(line, worker), end = worker_begin(line, worker + 1);
  for (; !at_end(line, cursor); advance(line, cursor, 1)) {
    const TileKind& kind = kind_at(line.params, cursor.geometry.kind);
    const Split split = cursor.range.split;
    Int chunk_cost = split.chunk * kind.step_cost;
    Int slot = cursor.tile_idx * line.params.max_splits;
    for (Int piece = first_piece(kind, split, begin - cursor.start); piece < split.splits; ++piece) {
      Int position = cursor.start + (piece == 0 ? 0 : kind.item_cost + piece * chunk_cost);
      if (position >= end) return;
      Int step_end = min_of((piece + 1) * split.chunk, cursor.range.steps);
      emit_steps(line, cursor, piece * split.chunk, step_end, split.splits == 1 ? kNoSlot : slot + piece, 1, sink);
      if (piece == 0 && split.splits > 1) sink.merge(cursor, slot, slot + 1, slot + split.splits);
    }
  }
}

template <class Sink>
FI_HOST_DEVICE void emit_worker(const Line& line, Cursor& cursor, Int worker, Sink& sink) {
  if (line.params.max_splits > 0) emit_invariant(line, cursor, worker, sink);
  else emit_balanced(line, cursor, worker, sink);
}

}  // namespace scheduler
}  // namespace fi
