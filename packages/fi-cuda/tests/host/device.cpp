// The scheduler behind device.hpp, after the source of one kernel (KERNEL: its function).
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <vector>

namespace fi {
// Where kernels find a block's shared memory: whichever block runs has its own mapped here.
constexpr int kMostSharedBytes = 256 * 1024;
alignas(65536) unsigned char memory[kMostSharedBytes];
}  // namespace fi

namespace host {

constexpr int kStackBytes = 64 * 1024;

struct Warp {
  uint64_t values[2][32];
  unsigned arrived = 0, generation = 0;
};

// A fiber may go on when *counter differs from `value`.
struct Fiber {
  ucontext_t context;  // to begin with; then `place`, as jumps take no call of the system
  jmp_buf place;
  bool begun = false;
  const volatile unsigned* counter = nullptr;
  unsigned value = 0;
  bool done = false;
  unsigned char* stack = nullptr;
};

struct Barrier {
  int bytes;
  short pending;
  unsigned char count, phase;
};
static_assert(sizeof(Barrier) == 8);

struct Block {
  int file;
  unsigned char* bytes;  // the same memory at an address that stays
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned arrived = 0, generation = 0;
};

struct Store {
  unsigned address, barrier;
  int num_bytes;
  unsigned char value[16];
};

struct Grid {
  std::vector<Block> blocks;
  std::vector<Store> stores;
  std::mt19937 random;
  jmp_buf scheduler;
  const void* params;
  int block = 0, thread = 0, first_block = 0, num_threads = 0;
  unsigned arrived = 0, generation = 0;  // at the cluster's barrier
};

static Grid* grid;

static Block& block() { return grid->blocks[grid->block]; }
static Fiber& fiber() { return block().fibers[grid->thread]; }

static void wait_for_change(const volatile unsigned* counter, unsigned value) {
  Fiber& self = fiber();
  self.counter = counter;
  self.value = value;
  if (_setjmp(self.place) == 0) _longjmp(grid->scheduler, 1);
}

static void resume(Fiber& next) {
  if (_setjmp(grid->scheduler) != 0) return;
  if (next.begun) _longjmp(next.place, 1);
  next.begun = true;
  setcontext(&next.context);
}

Index thread_index() { return {static_cast<unsigned>(grid->thread)}; }
Index block_index() { return {static_cast<unsigned>(grid->first_block + grid->block)}; }
unsigned rank_in_cluster() { return static_cast<unsigned>(grid->block); }

void sync_block() {
  Block& own = block();
  const unsigned generation = own.generation;
  if (++own.arrived == static_cast<unsigned>(grid->num_threads)) {
    own.arrived = 0;
    ++own.generation;
  } else {
    wait_for_change(&own.generation, generation);
  }
}

const uint64_t* exchange(uint64_t value) {
  Warp& warp = block().warps[grid->thread / 32];
  const unsigned generation = warp.generation;
  uint64_t* values = warp.values[generation & 1];
  values[grid->thread % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for_change(&warp.generation, generation);
  }
  return values;
}

void cluster_arrive() {
  if (++grid->arrived == static_cast<unsigned>(grid->num_threads) * grid->blocks.size()) {
    grid->arrived = 0;
    ++grid->generation;
  }
}
// The only barrier of the cluster is the one at the start.
void cluster_wait() {
  if (grid->generation == 0) wait_for_change(&grid->generation, 0);
}

unsigned address_in_cluster(const void* pointer, unsigned rank) {
  const auto offset = static_cast<const unsigned char*>(pointer) - fi::memory;
  if (offset < 0 || offset >= fi::kMostSharedBytes || rank >= grid->blocks.size()) std::abort();
  return rank << 24 | static_cast<unsigned>(offset);
}

void store_async(unsigned address, const void* value, int num_bytes, unsigned barrier) {
  if (address >> 24 != barrier >> 24 || address % num_bytes != 0) std::abort();
  Store store = {address, barrier, num_bytes, {}};
  std::memcpy(store.value, value, num_bytes);
  grid->stores.push_back(store);
}

static Barrier read(const void* place) {
  Barrier barrier;
  std::memcpy(&barrier, place, sizeof(barrier));
  return barrier;
}

static void update(void* place, Barrier barrier) {
  if (barrier.pending < 0) std::abort();
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.count;
    ++barrier.phase;
  }
  std::memcpy(place, &barrier, sizeof(barrier));
}

void init_barrier(void* place, unsigned count) {
  const Barrier barrier = {0, static_cast<short>(count), static_cast<unsigned char>(count), 0};
  std::memcpy(place, &barrier, sizeof(barrier));
}

void arrive_and_expect(void* place, unsigned num_bytes) {
  Barrier barrier = read(place);
  barrier.bytes += static_cast<int>(num_bytes);
  --barrier.pending;
  update(place, barrier);
}

void wait_barrier(void* place, unsigned parity) {
  const auto offset = static_cast<unsigned char*>(place) - fi::memory;
  // The upper word holds the count of phases; whoever changes it lets the fiber look again.
  const auto* word = reinterpret_cast<const volatile unsigned*>(block().bytes + offset + 4);
  for (;;) {
    const unsigned seen = *word;
    if ((read(place).phase & 1) != parity) return;
    wait_for_change(word, seen);
  }
}

static void deliver(const Store& store) {
  unsigned char* bytes = grid->blocks[store.address >> 24].bytes;
  std::memcpy(bytes + (store.address & 0xffffff), store.value, store.num_bytes);
  void* place = bytes + (store.barrier & 0xffffff);
  Barrier barrier = read(place);
  barrier.bytes -= store.num_bytes;
  update(place, barrier);
}

// Some of the stores that are under way arrive; whether any did.
static bool deliver_some() {
  auto& stores = grid->stores;
  std::shuffle(stores.begin(), stores.end(), grid->random);
  const size_t count = grid->random() % (stores.size() + 1);
  for (size_t idx = 0; idx < count; ++idx) deliver(stores[idx]);
  stores.erase(stores.begin(), stores.begin() + static_cast<long>(count));
  return count > 0;
}

static void start() {
  KERNEL(*static_cast<const Params*>(grid->params));
  fiber().done = true;
  _longjmp(grid->scheduler, 1);
}

static bool may_run(const Fiber& candidate) {
  return !candidate.done && (candidate.counter == nullptr || *candidate.counter != candidate.value);
}

// Runs a block's threads until all wait; whether any ran.
static bool run_block(int number) {
  grid->block = number;
  Block& own = block();
  bool any = false, mapped = false;
  for (bool again = true; again;) {
    again = false;
    std::vector<int> order(own.warps.size());
    for (size_t idx = 0; idx < order.size(); ++idx) order[idx] = static_cast<int>(idx);
    std::shuffle(order.begin(), order.end(), grid->random);
    for (const int warp : order) {
      for (bool more = true; more;) {
        more = false;
        for (int lane = 0; lane < 32; ++lane) {
          Fiber& next = own.fibers[warp * 32 + lane];
          if (!may_run(next)) continue;
          if (!mapped) {
            mmap(fi::memory, fi::kMostSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, own.file, 0);
            mapped = true;
          }
          grid->thread = warp * 32 + lane;
          next.counter = nullptr;
          resume(next);
          any = again = more = true;
        }
      }
    }
  }
  return any;
}

static bool all_done() {
  for (const Block& own : grid->blocks)
    for (const Fiber& each : own.fibers)
      if (!each.done) return false;
  return true;
}

// Whether the cluster's threads all came to their end.
static bool run_cluster() {
  while (!all_done()) {
    bool any = false;
    std::vector<int> order(grid->blocks.size());
    for (size_t idx = 0; idx < order.size(); ++idx) order[idx] = static_cast<int>(idx);
    std::shuffle(order.begin(), order.end(), grid->random);
    for (const int number : order) {
      any |= run_block(number);
      any |= deliver_some();
    }
    if (!any && grid->stores.empty()) return false;
  }
  return grid->stores.empty();
}

}  // namespace host

// 0: done; 1: some threads wait for ever, or stores are under way at the end.
extern "C" int run_grid(const void* params, int num_blocks, int num_threads, int cluster_size, unsigned seed) {
  using namespace host;
  Grid own;
  grid = &own;
  own.params = params;
  own.num_threads = num_threads;
  own.random.seed(seed);
  own.blocks.resize(cluster_size);
  for (Block& each : own.blocks) {
    each.file = memfd_create("shared", 0);
    if (ftruncate(each.file, fi::kMostSharedBytes) != 0) return 2;
    each.bytes = static_cast<unsigned char*>(
        mmap(nullptr, fi::kMostSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED, each.file, 0));
    each.fibers.resize(num_threads);
    for (Fiber& thread : each.fibers) {
      thread.stack = static_cast<unsigned char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
  }
  int failed = 0;
  for (own.first_block = 0; own.first_block < num_blocks && !failed; own.first_block += cluster_size) {
    own.arrived = own.generation = 0;
    own.stores.clear();
    for (Block& each : own.blocks) {
      std::memset(each.bytes, 0xa5, fi::kMostSharedBytes);  // whoever reads before it writes shall notice
      each.warps.assign(num_threads / 32, Warp());
      each.arrived = each.generation = 0;
      for (Fiber& thread : each.fibers) {
        thread.done = thread.begun = false;
        thread.counter = nullptr;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack;
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
      }
    }
    failed = run_cluster() ? 0 : 1;
  }
  for (Block& each : own.blocks) {
    for (Fiber& thread : each.fibers) munmap(thread.stack, kStackBytes);
    munmap(each.bytes, fi::kMostSharedBytes);
    close(each.file);
  }
  return failed;
}
