#pragma once

#include "fi/ptx/mbarrier.cuh"

namespace fi::ptx {

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// What emulated_kernels.py writes there: innermost dim first.
struct BoxMap {
  char* pointer;
  unsigned rank, item_bytes, swizzle_bytes, nan_outside;
  unsigned long long sizes[5];
  unsigned long long strides[4];  // bytes, from the second dim on
  unsigned box[5];
};
static_assert(sizeof(BoxMap) <= sizeof(TensorMap));

inline void prefetch_tensor_map(const TensorMap*) {}

// Visits a box in units of 16 bytes: move(unit in shared memory, its place in the tensor), and of a unit outside nullptr. Units
// lie where the swizzle puts them, which the bits of their addresses decide.
template <class Move>
inline unsigned visit_box(const BoxMap& map, unsigned address, const int (&first)[5], Move move) {
  if (address % 128) emulated::fail("a box that does not begin at a multiple of 128 bytes");
  unsigned num_units = map.box[0] * map.item_bytes / 16, total = num_units;
  for (unsigned dim = 1; dim < map.rank; ++dim) total *= map.box[dim];
  for (unsigned unit = 0; unit < total; ++unit) {
    const long long column = first[0] + static_cast<long long>(unit % num_units) * 16 / map.item_bytes;
    bool inside = column >= 0 && column < static_cast<long long>(map.sizes[0]);
    long long offset = column * map.item_bytes;
    unsigned row = unit / num_units;
    for (unsigned dim = 1; dim < map.rank; ++dim) {
      const long long at = first[dim] + static_cast<long long>(row % map.box[dim]);
      row /= map.box[dim];
      inside = inside && at >= 0 && at < static_cast<long long>(map.sizes[dim]);
      offset += at * static_cast<long long>(map.strides[dim - 1]);
    }
    unsigned place = address + unit * 16;
    if (map.swizzle_bytes) place ^= (place >> 7 & (map.swizzle_bytes / 16 - 1)) << 4;
    move(emulated::shared_pointer(place), inside ? map.pointer + offset : nullptr);
  }
  return total * 16;
}

inline void load_box(void* shared, const TensorMap* map, unsigned long long* barrier, std::vector<int> coordinates) {
  const BoxMap box = *reinterpret_cast<const BoxMap*>(map);
  const unsigned address = shared_address(shared);
  if (coordinates.size() != box.rank) emulated::fail("coordinates of another rank than the tensor map's");
  emulated::later([=] {
    int first[5] = {};
    std::copy(coordinates.begin(), coordinates.end(), first);
    const unsigned bytes = visit_box(box, address, first, [&](char* to, const char* from) {
      if (from) std::memcpy(to, from, 16);
      else std::memset(to, box.nan_outside ? 0xff : 0, 16);
    });
    complete_bytes(barrier_word(barrier), bytes);
  });
}

inline void store_box(const TensorMap* map, const void* shared, std::vector<int> coordinates) {
  int first[5] = {};
  std::copy(coordinates.begin(), coordinates.end(), first);
  visit_box(*reinterpret_cast<const BoxMap*>(map), shared_address(shared), first, [&](const char* from, char* to) {
    if (to) std::memcpy(to, from, 16);
  });
}

#define FI_TMA(DIMS, PARAMETERS, ...)                                                                                      \
  inline void tma_load_##DIMS##d(void* shared, const TensorMap* map, unsigned long long* barrier, PARAMETERS) {            \
    load_box(shared, map, barrier, {__VA_ARGS__});                                                                         \
  }                                                                                                                        \
  inline void tma_load_##DIMS##d(void* shared, const TensorMap* map, unsigned long long* barrier, PARAMETERS,              \
                                 unsigned long long) {                                                                     \
    load_box(shared, map, barrier, {__VA_ARGS__});                                                                         \
  }                                                                                                                        \
  inline void tma_store_##DIMS##d(const TensorMap* map, const void* shared, PARAMETERS) {                                  \
    store_box(map, shared, {__VA_ARGS__});                                                                                 \
  }
#define FI_COMMA ,
FI_TMA(1, int c0, c0)
FI_TMA(2, int c0 FI_COMMA int c1, c0, c1)
FI_TMA(3, int c0 FI_COMMA int c1 FI_COMMA int c2, c0, c1, c2)
FI_TMA(4, int c0 FI_COMMA int c1 FI_COMMA int c2 FI_COMMA int c3, c0, c1, c2, c3)
FI_TMA(5, int c0 FI_COMMA int c1 FI_COMMA int c2 FI_COMMA int c3 FI_COMMA int c4, c0, c1, c2, c3, c4)
#undef FI_COMMA
#undef FI_TMA

}  // namespace fi::ptx
