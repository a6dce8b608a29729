// What fi/kernels/attention_plan.cuh does, with loops in place of its threads and its scans: its arithmetic on the host.
#include <cstring>
#include <vector>

#include "fi/attention/work_rows.cuh"

using namespace fi::plan;

extern "C" void plan_on_host(const int* q_indptr, const int* kv_lens, int num_requests, const i64* packed, i64 max_tiles,
                             Quad* starts, Quad* items, int* worker_indptr, Quad* merges, int* num_merges) {
  Line line = {};
  static_assert(sizeof(Params) % sizeof(Int) == 0, "fields of one type");
  Int fields[sizeof(Params) / sizeof(Int)];
  for (Int& field : fields) field = static_cast<Int>(*packed++);
  std::memcpy(&line.params, fields, sizeof(Params));
  line.q_indptr = q_indptr;
  line.kv_lens = kv_lens;
  line.num_requests = num_requests;
  std::vector<Int> sums[4];
  for (auto& sum : sums) sum.assign(num_requests + 1, 0);
  const Prefixes before = {sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data()};
  bool fits = true;
  for (int request = 0; request < num_requests; ++request) {
    fits &= q_indptr[request + 1] >= q_indptr[request] && kv_lens[request] >= 0;
    const Totals own = totals_of(line, request);
    before.cost[request + 1] = before.cost[request] + own.cost;
    before.tiles[request + 1] = before.tiles[request] + own.tiles;
    before.items[request + 1] = before.items[request] + own.items;
    before.merges[request + 1] = before.merges[request] + own.merges;
  }
  fits &= before.tiles[num_requests] * line.params.num_kv_heads <= max_tiles;
  line.cost_prefix = before.cost;
  line.tile_prefix = before.tiles;
  line.total_cost = fits ? before.cost[num_requests] * line.params.num_kv_heads : 0;

  const int num_workers = static_cast<int>(line.params.num_workers);
  std::vector<Cut> cuts(num_workers + 1, Cut{0, 0, 0, 0});
  std::vector<Cursor> cursors(num_workers + 1, Cursor{});
  std::vector<Place> places(num_workers + 1, Place{0, 0, 0});
  line.params.num_workers = num_sharing(line);
  if (line.total_cost > 0) {
    for (int worker = 0; worker < line.params.num_workers; ++worker) {
      const Int position = worker_begin(line, worker);
      cursors[worker] = seek(line, position);
      cuts[worker] = cut_at(line, before, cursors[worker], position);
    }
    for (Int worker = line.params.num_workers; worker <= num_workers; ++worker) cuts[worker] = last_cut(line, before);
  }
  for (int worker = 1; worker <= num_workers; ++worker) {
    places[worker] = places[worker - 1];
    places[worker].continuing += cuts[worker].inner > 0;
    if (is_first_inside(cuts[worker], cuts[worker - 1])) {
      ++places[worker].split_tiles;
      places[worker].last_first = worker;
    }
  }
  // In reverse, so that no worker can lean on one before it; and each by several lanes, one after the other.
  *num_merges = static_cast<int>(places[num_workers].first_merge(line, cuts[num_workers]));
  worker_indptr[num_workers] = static_cast<int>(places[num_workers].first_item(line, cuts[num_workers]));
  for (int worker = num_workers - 1; worker >= 0; --worker) {
    const Int begin = places[worker].first_item(line, cuts[worker]);
    const Int end = places[worker + 1].first_item(line, cuts[worker + 1]);
    worker_indptr[worker] = static_cast<int>(begin);
    starts[worker * kStartQuads] = quad(begin, end, 0, 0);
    if (line.total_cost == 0 || worker >= line.params.num_workers) continue;
    const int num_lanes = 32;
    for (int lane = 0; lane < num_lanes; ++lane) {
      RowWriter rows = {line, items, merges, starts + worker * kStartQuads, worker, lane, num_lanes,
                        places[worker].last_first, begin, places[worker].first_merge(line, cuts[worker]), false};
      Cursor cursor = cursors[worker];
      if (items_follow_from_cuts(line.params)) {
        write_items(rows, cuts[worker], cuts[worker + 1], end - begin);
      } else {
        emit_worker(line, cursor, worker, rows);
      }
    }
  }
}
