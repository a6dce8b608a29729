// Python bindings of the work partition: int32 arrays in, rows written into arrays the caller owns, without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "fi/scheduler/partition.cuh"

namespace py = pybind11;
using namespace fi::scheduler;

namespace {

constexpr int kRecordWidth = 8;
constexpr double kMaxTotalCost = 4611686018427387904.0;  // 2^62, MAX_TOTAL_COST of the Python records
constexpr double kInt32Max = 2147483647.0;                // the largest index of an item or a slot

using Int32Array = py::array_t<i32, py::array::c_style>;
using Int64Array = py::array_t<i64, py::array::c_style>;

// Half a row. A row is stored as two halves, which takes a quarter of the stores of its columns one by one:
// much of a decode batch's time goes into items that differ in their KV head alone.
using Half = i32 __attribute__((vector_size(16)));

struct ArraySink {
  i32* item_rows;
  i32* merge_rows;
  i64 num_items = 0;
  i64 num_merges = 0;

  // Writes `count` rows, each of one KV head more than the row before it.
  static void write(i32* rows, const Cursor& cursor, i64 first, i64 second, i64 third, i64 count) {
    Half tile = {static_cast<i32>(cursor.request), static_cast<i32>(cursor.kv_head), static_cast<i32>(cursor.q_tile),
                 static_cast<i32>(cursor.geometry.kind)};
    const Half range = {static_cast<i32>(first), static_cast<i32>(second), static_cast<i32>(third), 0};
    const Half next_head = {0, 1, 0, 0};
    for (i32* row = rows; row != rows + kRecordWidth * count; row += kRecordWidth, tile += next_head) {
      std::memcpy(row, &tile, sizeof(Half));
      std::memcpy(row + kRecordWidth / 2, &range, sizeof(Half));
    }
  }
  void items(const Cursor& cursor, i64 kv_begin, i64 kv_end, i64 slot, i64 count) {
    write(item_rows + kRecordWidth * num_items, cursor, kv_begin, kv_end, slot, count);
    num_items += count;
  }
  void merge(const Cursor& cursor, i64 head_slot, i64 tail_begin, i64 tail_end) {
    write(merge_rows + kRecordWidth * num_merges++, cursor, head_slot, tail_begin, tail_end, 1);
  }
};

// Upper bounds of what a batch needs (exact for the items and merges of batch-invariant mode); valid == false: the
// batch is not legal, and the caller says why.
struct Measure {
  bool valid = true;
  i64 num_tiles = 0;
  i64 max_items = 0;
  i64 max_merges = 0;
};

Line make_line(const Int32Array& q_indptr, const Int32Array& kv_lens, const Int64Array& packed) {
  Line line = {};
  if (packed.size() * sizeof(i64) != sizeof(Params)) throw py::value_error("packed parameters of another size");
  std::memcpy(&line.params, packed.data(), sizeof(Params));
  line.q_indptr = q_indptr.data();
  line.kv_lens = kv_lens.data();
  line.num_requests = kv_lens.size();
  return line;
}

// Checks the lengths and sums what the requests cost and contain; fills line.total_cost.
FI_HOST_DEVICE Measure measure(Line& line) {
  const Params& params = line.params;
  const i64 max_rows = params.kinds[params.num_kinds - 1].max_packed_rows;
  Measure result;
  i64 cost = 0, tiles = 0, items = 0, merges = 0;
  double largest = 0.0, num_pieces = params.max_splits > 0 ? 0.0 : 2.0 * params.num_workers;
  result.valid = line.q_indptr[0] == 0;
  for (i64 index = 0; index < line.num_requests && result.valid; ++index) {
    if (line.q_indptr[index + 1] < line.q_indptr[index] || line.kv_lens[index] < 0) {
      result.valid = false;
      break;
    }
    const Request request = request_at(line, index);
    if (request.num_q_tiles == 0) continue;
    const TileKind& kind = params.kinds[request.kind];
    const i64 steps = ceil_div(request.kv_len, kind.kv_tokens);
    const double tile_cost = static_cast<double>(kind.item_cost + steps * kind.step_cost);
    largest += static_cast<double>(request.num_q_tiles) * tile_cost;
    num_pieces += static_cast<double>(request.num_q_tiles) * params.num_kv_heads * std::max<i64>(params.max_splits, 1);
    result.valid = request.packed_rows <= max_rows && largest * params.num_kv_heads <= kMaxTotalCost &&
        num_pieces <= kInt32Max;
    if (!result.valid) break;
    cost += request_cost(params, request);
    tiles += request.num_q_tiles;
    if (params.max_splits > 0) {
      i64 request_items, request_merges;
      count_pieces(params, request, request.num_q_tiles, &request_items, &request_merges);
      items += request_items;
      merges += request_merges;
    }
  }
  line.total_cost = cost * params.num_kv_heads;
  result.num_tiles = tiles * params.num_kv_heads;
  if (params.max_splits > 0) {
    result.max_items = items * params.num_kv_heads;
    result.max_merges = merges * params.num_kv_heads;
  } else {
    // Each of the W - 1 inner cuts adds at most one item: a tile's second piece, or an empty one.
    result.max_items = tiles == 0 ? 0 : result.num_tiles + params.num_workers - 1;
    result.max_merges = std::min(params.num_workers - 1, result.num_tiles);
  }
  return result;
}

py::tuple py_measure(const Int32Array& q_indptr, const Int32Array& kv_lens, const Int64Array& packed) {
  Line line = make_line(q_indptr, kv_lens, packed);
  Measure result;
  {
    py::gil_scoped_release release;
    result = measure(line);
  }
  return py::make_tuple(result.valid, result.num_tiles, result.max_items, result.max_merges);
}

struct Output {
  i32* worker_indptr;
  i32* items;
  i32* merges;
  i64 item_rows;
  i64 merge_rows;

  Output(Int32Array& indptr_array, Int32Array& items_array, Int32Array& merges_array, i64 num_workers)
      : worker_indptr(indptr_array.mutable_data()),
        items(items_array.mutable_data()),
        merges(merges_array.mutable_data()),
        item_rows(items_array.shape(0)),
        merge_rows(merges_array.shape(0)) {
    if (indptr_array.size() != num_workers + 1) throw py::value_error("worker_indptr of another size");
  }
  bool holds(const Measure& needed) const {
    return needed.valid && needed.max_items <= item_rows && needed.max_merges <= merge_rows;
  }
};

// Whether all requests have at most one q tile, of the first kind, and nothing but a balanced partition of it is asked.
bool is_plain_decode(const Line& line) {
  const Params& params = line.params;
  if (params.max_splits > 0 || params.heads_first || params.window != kNoWindow) return false;
  i64 max_q_len = 0;
  for (i64 index = 0; index < line.num_requests; ++index) {
    max_q_len = std::max(max_q_len, static_cast<i64>(line.q_indptr[index + 1]) - line.q_indptr[index]);
  }
  return max_q_len * params.group_size <= std::min(params.kinds[0].q_rows, params.kinds[0].max_packed_rows);
}

// One pass along the line; false, and nothing written, when the lengths are not legal or the arrays too small.
FI_HOST_DEVICE bool write_work_list(Line& line, const Output& output, ArraySink& sink) {
  if (!output.holds(measure(line))) return false;
  Cursor cursor = first_tile(line);
  for (i64 worker = 0; worker < line.params.num_workers; ++worker) {
    output.worker_indptr[worker] = static_cast<i32>(sink.num_items);
    emit_worker(line, cursor, worker, sink);
  }
  output.worker_indptr[line.params.num_workers] = static_cast<i32>(sink.num_items);
  return true;
}

// The same for is_plain_decode(line), where these parameters are constants: most of the pass then compiles to nothing.
bool write_plain_decode(Line line, const Output& output, ArraySink& sink) {
  Params& params = line.params;
  params.max_splits = params.heads_first = 0;
  params.window = kNoWindow;
  params.num_kinds = 1;
  params.kinds[0].max_packed_rows = params.kinds[0].q_rows;
  return write_work_list(line, output, sink);
}

// Writes the work list. Returns (written, num_items, num_merges); nothing is written when the lengths are not legal or
// the arrays are smaller than measure() asks.
py::tuple py_partition(const Int32Array& q_indptr, const Int32Array& kv_lens, const Int64Array& packed,
                       Int32Array worker_indptr, Int32Array items, Int32Array merges) {
  Line line = make_line(q_indptr, kv_lens, packed);
  const Output output(worker_indptr, items, merges, line.params.num_workers);
  ArraySink sink{output.items, output.merges};
  bool written;
  {
    py::gil_scoped_release release;
    written = is_plain_decode(line) ? write_plain_decode(line, output, sink) : write_work_list(line, output, sink);
  }
  return py::make_tuple(written, sink.num_items, sink.num_merges);
}

struct CountingSink {
  i64 num_items = 0;
  i64 num_merges = 0;

  void items(const Cursor&, i64, i64, i64, i64 count) { num_items += count; }
  void merge(const Cursor&, i64, i64, i64) { ++num_merges; }
};

// The same work list as a device computes it: prefix sums over requests, then each worker on its own from seek(), once
// to count and once to write. Workers write in reverse, so that none can lean on one before it.
py::tuple py_partition_by_seek(const Int32Array& q_indptr, const Int32Array& kv_lens, const Int64Array& packed,
                               Int32Array worker_indptr, Int32Array items, Int32Array merges) {
  Line line = make_line(q_indptr, kv_lens, packed);
  const i64 num_workers = line.params.num_workers;
  const Output output(worker_indptr, items, merges, num_workers);
  if (!output.holds(measure(line))) return py::make_tuple(false, 0, 0);

  std::vector<i64> cost(line.num_requests + 1, 0), tiles(line.num_requests + 1, 0);
  for (i64 index = 0; index < line.num_requests; ++index) {
    const Request request = request_at(line, index);
    cost[index + 1] = cost[index] + request_cost(line.params, request);
    tiles[index + 1] = tiles[index] + request.num_q_tiles;
  }
  line.cost_prefix = cost.data();
  line.tile_prefix = tiles.data();

  std::vector<i64> merge_indptr(num_workers + 1, 0);
  output.worker_indptr[0] = 0;
  for (i64 worker = 0; worker < num_workers; ++worker) {
    CountingSink sink;
    if (line.total_cost > 0) {
      Cursor cursor = seek(line, worker_begin(line, worker));
      emit_worker(line, cursor, worker, sink);
    }
    output.worker_indptr[worker + 1] = output.worker_indptr[worker] + static_cast<i32>(sink.num_items);
    merge_indptr[worker + 1] = merge_indptr[worker] + sink.num_merges;
  }
  for (i64 worker = num_workers - 1; worker >= 0 && line.total_cost > 0; --worker) {
    Cursor cursor = seek(line, worker_begin(line, worker));
    ArraySink sink{output.items, output.merges, output.worker_indptr[worker], merge_indptr[worker]};
    emit_worker(line, cursor, worker, sink);
  }
  return py::make_tuple(true, output.worker_indptr[num_workers], merge_indptr[num_workers]);
}

}  // namespace

PYBIND11_MODULE(_partition, module) {
  module.attr("SOURCE_DIGEST") = FI_SOURCE_DIGEST;
  module.def("measure", &py_measure, py::arg("q_indptr").noconvert(), py::arg("kv_lens").noconvert(),
             py::arg("packed").noconvert());
  module.def("partition", &py_partition, py::arg("q_indptr").noconvert(), py::arg("kv_lens").noconvert(),
             py::arg("packed").noconvert(), py::arg("worker_indptr").noconvert(), py::arg("items").noconvert(),
             py::arg("merges").noconvert());
  module.def("partition_by_seek", &py_partition_by_seek, py::arg("q_indptr").noconvert(),
             py::arg("kv_lens").noconvert(), py::arg("packed").noconvert(), py::arg("worker_indptr").noconvert(),
             py::arg("items").noconvert(), py::arg("merges").noconvert());
}
