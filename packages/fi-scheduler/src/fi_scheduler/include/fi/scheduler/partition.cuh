// The work partition: one source for the host (g++) and the device (NVRTC), in 64-bit integers, no headers, no STL.
//
// Tiles of all requests are laid on one line in tile order, each as long as its cost. Worker w owns the positions [w *
// T / W, (w + 1) * T / W) of a line of length T. A cut that falls inside a tile is rounded down to a whole KV step
// (balanced: "stream-K" decomposition, Osama et al., PPoPP 2023), or tiles are split on their own length alone and
// whole pieces go to the worker that owns their start (batch-invariant).
//
// Two ways to use it, with equal results:
//   host:   a Cursor starts at the first tile, emit_worker() is called for workers 0, 1, 2, ...; nothing is searched.
//   device: worker w calls seek(line, worker_begin(line, w)) and then emit_worker() alone; this needs Line's prefix
//           sums. Where its rows go follows from a scan over what a counting sink saw.
#pragma once

#if defined(__CUDACC__)
#define FI_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the cursor then lives in registers, which halves the time of a pass along the line.
#define FI_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fi {
namespace scheduler {

using i32 = int;
using i64 = long long;

constexpr int kMaxKinds = 8;
constexpr i64 kNoWindow = -1;
constexpr i64 kNoSlot = -1;

// One kind of q tile; the fields of fi_scheduler.partition.TileKind.
struct TileKind {
  i64 q_rows, kv_tokens, max_packed_rows, item_cost, step_cost;
};

// The fields of fi_scheduler.partition.PartitionParams; filled from an int64 array in this order
// (PartitionParams.packed).
struct Params {
  i64 num_workers, num_kv_heads, group_size, num_kinds, causal;
  i64 window;  // kNoWindow: full attention
  i64 heads_first;
  i64 max_splits;  // 0: balanced
  i64 min_split_steps;
  TileKind kinds[kMaxKinds];
};

struct Line {
  Params params;
  const i32* q_indptr;  // [num_requests + 1]
  const i32* kv_lens;   // [num_requests]
  i64 num_requests;
  i64 total_cost;       // over all heads
  // Exclusive prefix sums over requests for one KV head, [num_requests + 1] each; only seek() reads them.
  const i64* cost_prefix;
  const i64* tile_prefix;
};

struct Request {
  i64 q_len, kv_len;
  i64 packed_rows;  // q_len * group_size
  i64 num_q_tiles, kind;
};

// KV steps of one tile: steps [first_step, first_step + steps) of kv_tokens each, cut off at kv_stop.
struct TileRange {
  i64 first_step, steps, kv_stop, cost;
};

// What batch-invariant mode makes of a tile: `splits` pieces of `chunk` steps (the last may be shorter).
struct Split {
  i64 splits, chunk;
};

// A tile on the line.
struct Cursor {
  i64 request, q_tile, kv_head;
  i64 tile_idx;
  i64 start;  // position of the tile's start
  Request geometry;
  TileRange range;
};

FI_HOST_DEVICE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
FI_HOST_DEVICE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }

// floor(a / b) for a >= 0, b > 0. A 64-bit division costs several times a 32-bit one on the host and far more on a GPU.
FI_HOST_DEVICE i64 floor_div(i64 a, i64 b) {
  if (((a | b) >> 32) == 0) return static_cast<i64>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
  return a / b;
}

FI_HOST_DEVICE i64 ceil_div(i64 a, i64 b) { return a <= b ? (a > 0) : floor_div(a + b - 1, b); }

// sum of floor((a * i + b) / m) over i in [0, n), for n, a, b >= 0 and m > 0, in O(log m) steps: Euclid's algorithm on
// the lattice points below a line (Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5).
FI_HOST_DEVICE i64 floor_sum(i64 n, i64 m, i64 a, i64 b) {
  i64 sum = 0;
  while (n > 0) {
    if (a >= m) {
      i64 quotient = floor_div(a, m);
      sum += (n - 1) * n / 2 * quotient;
      a -= quotient * m;
    }
    if (b >= m) {
      i64 quotient = floor_div(b, m);
      sum += n * quotient;
      b -= quotient * m;
    }
    i64 top = a * n + b;
    if (top < m) break;
    n = floor_div(top, m);
    b = top - n * m;
    i64 swapped = m;
    m = a;
    a = swapped;
  }
  return sum;
}

FI_HOST_DEVICE Request request_at(const Line& line, i64 request) {
  const Params& params = line.params;
  Request result;
  result.q_len = static_cast<i64>(line.q_indptr[request + 1]) - line.q_indptr[request];
  result.kv_len = line.kv_lens[request];
  result.packed_rows = result.q_len * params.group_size;
  result.kind = 0;
  while (result.kind < params.num_kinds - 1 && result.packed_rows > params.kinds[result.kind].max_packed_rows) {
    ++result.kind;
  }
  result.num_q_tiles = ceil_div(result.packed_rows, params.kinds[result.kind].q_rows);
  return result;
}

// KV range and cost of q tile `q_tile` of a request.
FI_HOST_DEVICE TileRange tile_range(const Params& params, const Request& request, i64 q_tile) {
  const TileKind& kind = params.kinds[request.kind];
  i64 offset = request.kv_len - request.q_len;
  i64 row_end = (q_tile + 1) * kind.q_rows;
  i64 token_end = row_end >= request.packed_rows ? request.q_len : ceil_div(row_end, params.group_size);
  TileRange result;
  result.kv_stop = params.causal ? max_of(offset + token_end, 0) : request.kv_len;
  result.first_step = 0;
  if (params.window != kNoWindow) {
    i64 token_begin = floor_div(q_tile * kind.q_rows, params.group_size);
    i64 kv_start = min_of(max_of(offset + token_begin - params.window + 1, 0), result.kv_stop);
    result.first_step = floor_div(kv_start, kind.kv_tokens);
  }
  // kv_start == kv_stop only when both are 0 (a window is at least 1), so the difference is never a spurious step.
  result.steps = ceil_div(result.kv_stop, kind.kv_tokens) - result.first_step;
  result.cost = kind.item_cost + result.steps * kind.step_cost;
  return result;
}

// KV steps of the first `count` q tiles together; count < num_q_tiles, so every tile counted has all its rows.
//
// With R = q_rows, G = group_size, K = kv_tokens, tile j ends at step ceil(max(0, offset * G + (j + 1) * R) / (G * K))
// and begins at step floor(max(0, (offset - window + 1) * G + j * R) / (G * K)): nested divisions by G and K collapse
// into one. Both are sums of floors of a linear function once the tiles clamped to 0 are left out.
FI_HOST_DEVICE i64 leading_steps(const Params& params, const Request& request, i64 count) {
  if (count == 0) return 0;
  const TileKind& kind = params.kinds[request.kind];
  i64 rows = kind.q_rows;
  i64 unit = params.group_size * kind.kv_tokens;
  i64 offset_rows = (request.kv_len - request.q_len) * params.group_size;
  i64 steps;
  if (params.causal) {
    i64 skipped = offset_rows < 0 ? min_of(floor_div(-offset_rows, rows), count) : 0;
    steps = floor_sum(count - skipped, unit, rows, offset_rows + (skipped + 1) * rows + unit - 1);
  } else {
    steps = count * ceil_div(request.kv_len, kind.kv_tokens);
  }
  if (params.window != kNoWindow) {
    i64 begin_rows = offset_rows - (params.window - 1) * params.group_size;
    i64 skipped = begin_rows < 0 ? min_of(ceil_div(-begin_rows, rows), count) : 0;
    steps -= floor_sum(count - skipped, unit, rows, begin_rows + skipped * rows);
  }
  return steps;
}

// Cost of q tiles [0, q_tile) of a request, for one head; q_tile < num_q_tiles.
FI_HOST_DEVICE i64 leading_cost(const Params& params, const Request& request, i64 q_tile) {
  const TileKind& kind = params.kinds[request.kind];
  return q_tile * kind.item_cost + leading_steps(params, request, q_tile) * kind.step_cost;
}

// Cost of all q tiles of a request, for one head.
FI_HOST_DEVICE i64 request_cost(const Params& params, const Request& request) {
  if (request.num_q_tiles == 0) return 0;
  i64 last = request.num_q_tiles - 1;
  return leading_cost(params, request, last) + tile_range(params, request, last).cost;
}

FI_HOST_DEVICE Split split_of(const Params& params, i64 steps) {
  i64 splits = min_of(max_of(ceil_div(steps, params.min_split_steps), 1), params.max_splits);
  i64 chunk = ceil_div(steps, splits);
  Split result;
  result.splits = chunk == 0 ? 1 : ceil_div(steps, chunk);
  result.chunk = chunk;
  return result;
}

// Batch-invariant pieces (items) and split tiles (merges) of q tiles [0, num_tiles) of a request, for one head.
FI_HOST_DEVICE void count_pieces(const Params& params, const Request& request, i64 num_tiles, i64* items, i64* merges) {
  *items = 0;
  *merges = 0;
  for (i64 tile = 0; tile < num_tiles; ++tile) {
    i64 splits = split_of(params, tile_range(params, request, tile).steps).splits;
    *items += splits;
    *merges += splits > 1;
  }
}

// floor(worker * T / W) without the product that could leave 64 bits.
FI_HOST_DEVICE i64 worker_begin(const Line& line, i64 worker) {
  i64 quotient = floor_div(line.total_cost, line.params.num_workers);
  i64 remainder = line.total_cost - quotient * line.params.num_workers;
  return worker * quotient + floor_div(worker * remainder, line.params.num_workers);
}

// The cut a position makes in the cursor's tile: a step in [0, steps); 0 is the tile's start.
FI_HOST_DEVICE i64 cut_step(const Line& line, const Cursor& cursor, i64 position) {
  const TileKind& kind = line.params.kinds[cursor.geometry.kind];
  i64 inside = position - cursor.start - kind.item_cost;
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
FI_HOST_DEVICE void advance(const Line& line, Cursor& cursor, i64 count) {
  cursor.start += count * cursor.range.cost;
  cursor.tile_idx += count;
  if (!line.params.heads_first) {
    cursor.kv_head += count;
    if (cursor.kv_head < line.params.num_kv_heads) return;
    cursor.kv_head = 0;
  }
  if (++cursor.q_tile < cursor.geometry.num_q_tiles) {
    cursor.range = tile_range(line.params, cursor.geometry, cursor.q_tile);
    return;
  }
  ++cursor.request;
  enter_request(line, cursor);
}

// The tile that contains `position` (0 <= position < total_cost), by binary search over the prefix sums and then over
// the closed form of a request's q tiles.
FI_HOST_DEVICE Cursor seek(const Line& line, i64 position) {
  const Params& params = line.params;
  i64 head_cost = line.cost_prefix[line.num_requests];
  // `lanes` tiles of equal cost stand side by side at each (request, q tile): all heads, or one when heads come first.
  i64 lanes = params.heads_first ? 1 : params.num_kv_heads;
  i64 base_head = params.heads_first ? floor_div(position, head_cost) : 0;
  i64 rest = position - base_head * head_cost;

  i64 low = 0, high = line.num_requests;  // the last request with prefix * lanes <= rest; empty requests have no length
  while (high - low > 1) {
    i64 middle = (low + high) / 2;
    if (line.cost_prefix[middle] * lanes <= rest) low = middle; else high = middle;
  }
  Cursor cursor = {};
  cursor.request = low;
  cursor.geometry = request_at(line, low);
  rest -= line.cost_prefix[low] * lanes;

  low = 0;
  high = cursor.geometry.num_q_tiles;
  while (high - low > 1) {
    i64 middle = (low + high) / 2;
    if (leading_cost(params, cursor.geometry, middle) * lanes <= rest) low = middle; else high = middle;
  }
  cursor.q_tile = low;
  cursor.range = tile_range(params, cursor.geometry, low);
  rest -= leading_cost(params, cursor.geometry, low) * lanes;
  i64 lane = floor_div(rest, cursor.range.cost);

  cursor.kv_head = base_head + lane;
  cursor.start = position - (rest - lane * cursor.range.cost);
  cursor.tile_idx = base_head * line.tile_prefix[line.num_requests]
      + (line.tile_prefix[cursor.request] + low) * lanes + lane;
  return cursor;
}

// The last worker whose range begins before `position`.
FI_HOST_DEVICE i64 last_worker_before(const Line& line, i64 worker, i64 position) {
  i64 low = worker, high = line.params.num_workers;
  if (low + 1 == high || worker_begin(line, low + 1) >= position) return low;
  while (high - low > 1) {
    i64 middle = (low + high) / 2;
    if (worker_begin(line, middle) < position) low = middle; else high = middle;
  }
  return low;
}

// Sink: items(cursor, kv_begin, kv_end, slot, count) and merge(cursor, head_slot, tail_begin, tail_end), called in line
// order. `count` items differ only in their KV head, which ascends from cursor.kv_head.
template <class Sink>
FI_HOST_DEVICE void emit_steps(const Line& line, const Cursor& cursor, i64 step_begin, i64 step_end, i64 slot,
                               i64 count, Sink& sink) {
  i64 kv_tokens = line.params.kinds[cursor.geometry.kind].kv_tokens;
  i64 kv_begin = (cursor.range.first_step + step_begin) * kv_tokens;
  i64 kv_end = min_of((cursor.range.first_step + step_end) * kv_tokens, cursor.range.kv_stop);
  sink.items(cursor, kv_begin, kv_end, slot, count);
}

// Tiles from the cursor's on that differ from it only in the head and end at or before `position`; at least the
// cursor's.
FI_HOST_DEVICE i64 whole_tiles(const Line& line, const Cursor& cursor, i64 position) {
  if (line.params.heads_first) return 1;
  i64 count = line.params.num_kv_heads - cursor.kv_head;
  if (cursor.start + count * cursor.range.cost <= position) return count;
  return floor_div(position - cursor.start, cursor.range.cost);
}

// Items of one worker under the balanced partition. The cursor's tile must contain worker_begin(worker); it is left on
// the tile that contains the next worker's begin. The worker in which a split tile starts also emits its merge record.
template <class Sink>
FI_HOST_DEVICE void emit_balanced(const Line& line, Cursor& cursor, i64 worker, Sink& sink) {
  i64 num_workers = line.params.num_workers;
  i64 end = worker_begin(line, worker + 1);
  i64 step = cut_step(line, cursor, worker_begin(line, worker));
  for (; !at_end(line, cursor); step = 0) {
    i64 tile_end = cursor.start + cursor.range.cost;
    if (end < tile_end) {
      i64 stop = cut_step(line, cursor, end);
      if (stop == 0) return;
      emit_steps(line, cursor, step, stop, step > 0 ? worker : num_workers + worker, 1, sink);
      if (step == 0) {
        i64 last = last_worker_before(line, worker + 1, tile_end);
        sink.merge(cursor, num_workers + worker, worker + 1, last + 1);
      }
      return;
    }
    i64 count = step > 0 ? 1 : whole_tiles(line, cursor, end);
    emit_steps(line, cursor, step, cursor.range.steps, step > 0 ? worker : kNoSlot, count, sink);
    advance(line, cursor, count);
  }
}

// Items of one worker under the batch-invariant partition: the pieces whose start lies in the worker's range. The
// cursor stands on the tile that contains worker_begin(worker), or on the tile after it when none of its pieces is
// left.
template <class Sink>
FI_HOST_DEVICE void emit_invariant(const Line& line, Cursor& cursor, i64 worker, Sink& sink) {
  i64 begin = worker_begin(line, worker), end = worker_begin(line, worker + 1);
  for (; !at_end(line, cursor); advance(line, cursor, 1)) {
    const TileKind& kind = line.params.kinds[cursor.geometry.kind];
    Split split = split_of(line.params, cursor.range.steps);
    i64 chunk_cost = split.chunk * kind.step_cost;
    i64 slot = cursor.tile_idx * line.params.max_splits;
    i64 piece = 0;
    if (begin > cursor.start) {
      piece = split.splits == 1 ? 1 : max_of(ceil_div(max_of(begin - cursor.start - kind.item_cost, 0), chunk_cost), 1);
    }
    for (; piece < split.splits; ++piece) {
      i64 position = cursor.start + (piece == 0 ? 0 : kind.item_cost + piece * chunk_cost);
      if (position >= end) return;
      i64 step_end = min_of((piece + 1) * split.chunk, cursor.range.steps);
      emit_steps(line, cursor, piece * split.chunk, step_end, split.splits == 1 ? kNoSlot : slot + piece, 1, sink);
      if (piece == 0 && split.splits > 1) sink.merge(cursor, slot, slot + 1, slot + split.splits);
    }
  }
}

template <class Sink>
FI_HOST_DEVICE void emit_worker(const Line& line, Cursor& cursor, i64 worker, Sink& sink) {
  if (line.params.max_splits > 0) emit_invariant(line, cursor, worker, sink);
  else emit_balanced(line, cursor, worker, sink);
}

}  // namespace scheduler
}  // namespace fi
