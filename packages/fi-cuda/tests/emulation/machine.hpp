// A processor of blocks for the host: every thread of a kernel is a fiber, and fibers take turns where they wait for one another.
//
// One operating-system thread runs them all, so memory accesses need no care; what is emulated is who waits for whom. A fiber
// runs until it waits; asynchronous copies happen some turns later, in an order drawn from a seed, so that a read that no barrier
// orders finds old bytes. If every fiber waits and nothing is under way, the kernel would hang: that is an error with the line of
// each wait. With a seed other than 0 fibers take their turns in a random order, pause at atomic operations and messages too, and
// find random bytes in shared memory and on their stacks, where seed 0 leaves what is no number.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulated {

struct Dim3 {
  unsigned x, y, z;
};

// A meeting of some threads: the last to come opens it for all.
struct Meeting {
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Exchange : Meeting {
  unsigned long long slots[2][32] = {};
};

struct Warp {
  std::map<unsigned, Exchange> exchanges;  // by mask: lanes that diverge meet among themselves
};

struct Block;

// A thread's asynchronous operations in groups, of which it waits for all but the latest few. What else waits for a group holds it
// too: whoever comes first has its operations done.
struct Groups {
  using Group = std::vector<std::function<void()>>;
  Group open;
  std::deque<std::shared_ptr<Group>> closed;

  void close() {
    while (!closed.empty() && closed.front()->empty()) closed.pop_front();
    closed.push_back(std::make_shared<Group>(std::move(open)));
    open.clear();
  }
  void complete(size_t left) {
    for (; closed.size() > left; closed.pop_front()) {
      for (auto& operation : *closed.front()) operation();
      closed.front()->clear();
    }
  }
};

struct Fiber {
  Block* block = nullptr;
  Groups copies, products;
  Dim3 thread = {0, 0, 0};
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false, ended = false;
  unsigned cluster_generation = 0;  // of its arrival that it has not waited for
  const char* waits_for = "";
};

struct Cluster {
  std::vector<Block*> blocks;
  Meeting barrier;
  unsigned arrivals = 0, live = 0;
};

struct Block {
  Cluster* cluster = nullptr;
  Dim3 idx = {0, 0, 0};
  unsigned rank = 0, num_threads = 0, live = 0;
  char* shared = nullptr;  // dynamic shared memory, then variables
  size_t shared_used = 0;
  std::map<const void*, char*> variables;
  Meeting sync;
  Meeting named[16];
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
};

constexpr size_t kSharedStride = 1 << 18;  // more than a block may have
constexpr size_t kSharedBase = 1 << 10;    // address 0 stays free
constexpr size_t kStackBytes = 160 << 10;
constexpr size_t kPoisonedBytes = 4 << 10;  // of a stack, where a kernel's own variables are

struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::function<void()>> under_way;  // asynchronous copies
  std::vector<Fiber*> order;
  char* arena = nullptr;
  Dim3 grid = {0, 0, 0};
  bool shuffled = false;
  std::vector<char> poison;
  unsigned long long events = 0;
  std::mt19937 random;
  std::function<void()> kernel;
  std::string error;
  jmp_buf scheduler;
};

inline Machine* machine = nullptr;
inline Fiber* self = nullptr;

inline void fail(const std::string& what) {
  if (machine->error.empty()) machine->error = what;
  _longjmp(machine->scheduler, 2);
}

inline void yield() {
  if (_setjmp(self->place) == 0) _longjmp(machine->scheduler, 1);
}

// Where another fiber may get ahead.
inline void pause() {
  if (machine->shuffled && machine->random() % 8 == 0) yield();
}

template <class Condition>
void wait_until(const char* what, Condition condition) {
  self->waits_for = what;
  while (!condition()) yield();
  self->waits_for = "";
  ++machine->events;
}

// The copy happens some turns later.
inline void later(std::function<void()> copy) {
  machine->under_way.push_back(std::move(copy));
  pause();
}

inline void land_some(bool all) {
  auto& under_way = machine->under_way;
  for (size_t idx = 0; idx < under_way.size();) {
    if (!all && machine->random() % 3 != 0) {
      ++idx;
      continue;
    }
    auto copy = std::move(under_way[idx]);
    under_way[idx] = std::move(under_way.back());
    under_way.pop_back();
    copy();
    ++machine->events;
  }
}

inline unsigned lane() { return self->thread.x % 32; }
inline Warp& warp() { return self->block->warps[self->thread.x / 32]; }

// All lanes of `mask` give a value; then each may read the others'.
inline const unsigned long long* exchange(unsigned mask, unsigned long long value) {
  if (!(mask >> lane() & 1)) fail("a warp's collective by a lane that its mask leaves out");
  const unsigned first = self->thread.x / 32 * 32, threads = self->block->num_threads;
  if (threads < first + 32) mask &= (1u << (threads - first)) - 1;
  Exchange& meeting = warp().exchanges[mask];
  const unsigned generation = meeting.generation;
  meeting.slots[generation & 1][lane()] = value;
  meeting.arrived |= 1u << lane();
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++machine->events;
  } else {
    wait_until("the lanes of its warp", [&] { return meeting.generation != generation; });
  }
  return meeting.slots[generation & 1];
}

template <class T>
unsigned long long bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T value_of(unsigned long long bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine) {
  const unsigned long long* slots = exchange(mask, bits_of(value));
  bool any = false;
  T result = value;
  for (unsigned idx = 0; idx < 32; ++idx) {
    if (!(mask >> idx & 1)) continue;
    const T other = value_of<T>(slots[idx]);
    result = any ? combine(result, other) : other;
    any = true;
  }
  return result;
}

// Meets `count` threads; with `wait` only counted.
inline void meet(Meeting& meeting, unsigned count, bool wait, const char* what) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived >= count) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++machine->events;
  } else if (wait) {
    wait_until(what, [&] { return meeting.generation != generation; });
  }
}

inline void sync_block() {
  Block& block = *self->block;
  const unsigned generation = block.sync.generation;
  ++block.sync.arrived;
  // Threads that have ended are not waited for.
  wait_until("__syncthreads", [&] {
    if (block.sync.generation == generation && block.sync.arrived >= block.live) {
      block.sync.arrived = 0;
      ++block.sync.generation;
    }
    return block.sync.generation != generation;
  });
}

// Shared memory: addresses of 32 bits over the whole cluster and grid.
inline unsigned shared_address(const void* pointer) {
  const char* place = static_cast<const char*>(pointer);
  const Block& block = *self->block;
  if (place < block.shared || place >= block.shared + kSharedStride) fail("an address outside the block's shared memory");
  return static_cast<unsigned>(kSharedBase + (place - machine->arena));
}

inline char* shared_pointer(unsigned address) { return machine->arena + (address - kSharedBase); }

inline unsigned address_in_block(unsigned address, unsigned rank) {
  const unsigned offset = static_cast<unsigned>((address - kSharedBase) % kSharedStride);
  return static_cast<unsigned>(kSharedBase + (self->block->cluster->blocks[rank]->shared - machine->arena) + offset);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(self->block->shared);
}

// A variable that the block's threads share; `tag` names it.
template <class T>
T& shared_variable(const void* tag) {
  Block& block = *self->block;
  char*& place = block.variables[tag];
  if (place == nullptr) {
    block.shared_used = (block.shared_used + 127) / 128 * 128;
    place = block.shared + block.shared_used;
    block.shared_used += sizeof(T);
    if (block.shared_used > kSharedStride) fail("too much shared memory");
  }
  return *reinterpret_cast<T*>(place);
}

inline void end_fiber() {
  Fiber& fiber = *self;
  fiber.ended = true;
  --fiber.block->live;
  --fiber.block->cluster->live;
  ++machine->events;
  _longjmp(machine->scheduler, 1);
}

inline void run_fiber() {
  machine->kernel();
  end_fiber();
}

inline void resume(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(machine->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.stack.reset(new char[kStackBytes]);
  if (machine->shuffled) std::memcpy(fiber.stack.get() + kStackBytes - kPoisonedBytes, machine->poison.data(), kPoisonedBytes);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, reinterpret_cast<void (*)()>(run_fiber), 0);
  setcontext(&fiber.start);
}

struct Launch {
  unsigned grid_x, grid_y, num_threads, cluster, shared_bytes, seed;
};

inline std::string waits() {
  std::map<std::string, unsigned> found;
  for (const Fiber* fiber : machine->order) {
    if (!fiber->ended) {
      ++found["block " + std::to_string(fiber->block->idx.x) + "," + std::to_string(fiber->block->idx.y) + " warp " +
              std::to_string(fiber->thread.x / 32) + ": " + fiber->waits_for];
    }
  }
  std::string text = "threads wait for ever";
  unsigned shown = 0;
  for (const auto& [what, count] : found) {
    if (++shown > 24) break;
    text += "\n  " + what + " (" + std::to_string(count) + ")";
  }
  return text;
}

// Runs `kernel` in every thread of all blocks at once. Returns an error's text, empty if all threads ended.
inline std::string run(const Launch& launch, std::function<void()> kernel) {
  Machine made;
  machine = &made;
  made.kernel = std::move(kernel);
  made.random.seed(launch.seed);
  made.grid = {launch.grid_x, launch.grid_y, 1};
  const unsigned num_blocks = launch.grid_x * launch.grid_y;
  char* memory = static_cast<char*>(std::malloc(kSharedStride * num_blocks + 1024));
  made.shuffled = launch.seed != 0;
  if (made.shuffled) {
    made.poison.resize(kPoisonedBytes);
    for (char& byte : made.poison) byte = static_cast<char>(made.random());
    for (size_t at = 0; at < kSharedStride * num_blocks + 1024; at += 4) {
      const unsigned bits = static_cast<unsigned>(made.random());
      std::memcpy(memory + at, &bits, 4);
    }
  } else {
    std::memset(memory, 0xff, kSharedStride * num_blocks + 1024);
  }
  made.arena = memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024;
  for (unsigned idx = 0; idx < num_blocks; ++idx) {
    auto block = std::make_unique<Block>();
    block->idx = {idx % launch.grid_x, idx / launch.grid_x, 0};
    block->rank = block->idx.x % launch.cluster;
    if (block->rank == 0) made.clusters.push_back(std::make_unique<Cluster>());
    block->cluster = made.clusters.back().get();
    block->cluster->blocks.push_back(block.get());
    block->num_threads = block->live = launch.num_threads;
    block->cluster->live += launch.num_threads;
    block->shared = made.arena + idx * kSharedStride;
    block->shared_used = launch.shared_bytes;
    block->warps.resize((launch.num_threads + 31) / 32);
    for (unsigned thread = 0; thread < launch.num_threads; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = block.get();
      fiber->thread = {thread, 0, 0};
      made.order.push_back(fiber.get());
      block->fibers.push_back(std::move(fiber));
    }
    made.blocks.push_back(std::move(block));
  }
  unsigned idle = 0;
  while (made.error.empty()) {
    const unsigned long long before = made.events;
    if (made.shuffled) std::shuffle(made.order.begin(), made.order.end(), made.random);
    bool any = false;
    for (Fiber* fiber : made.order) {
      if (fiber->ended) continue;
      any = true;
      resume(*fiber);
      if (!made.error.empty()) break;
    }
    if (!any) break;
    land_some(idle > 2);
    idle = made.events == before ? idle + 1 : 0;
    if (idle > 200) made.error = waits();
  }
  if (made.error.empty()) land_some(true);
  std::free(memory);
  machine = nullptr;
  return made.error;
}

}  // namespace emulated
