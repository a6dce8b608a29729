// Products are computed at once or when they are waited for, as the seed has it: accumulators that are read too early and operands
// that are overwritten too early give wrong numbers.
#pragma once

#include "fi/ptx/mma.cuh"
#include "fi/ptx/shared_address.cuh"
#include "fi/ptx/wgmma_descriptor.cuh"

namespace fi::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulated::self->products.close(); }
template <int kGroups>
inline void wgmma_wait() {
  emulated::self->products.complete(kGroups);
  __syncwarp();  // .sync.aligned: one lane may speak for its warp afterwards
}
template <class Values>
inline void pin_registers(Values&) {}

// An operand in shared memory: element (outer, k), outer in M or N.
template <class T>
struct SharedOperand {
  unsigned long long descriptor;
  bool outer_is_contiguous;
  char* shared;

  SharedOperand(unsigned long long given, Major major)
      : descriptor(given), outer_is_contiguous(major == Major::kMN), shared(emulated::self->block->shared) {}

  float at(int outer, int k) const {
    const unsigned leading = (descriptor >> 16 & 0x3fffu) << 4, stride = (descriptor >> 32 & 0x3fffu) << 4;
    const unsigned mode = static_cast<unsigned>(descriptor >> 62), swizzle = mode == 1 ? 128 : mode == 2 ? 64 : 32;
    const unsigned row = static_cast<unsigned>(outer_is_contiguous ? k : outer);
    const unsigned column = static_cast<unsigned>((outer_is_contiguous ? outer : k) * sizeof(T));
    unsigned place = static_cast<unsigned>(descriptor & 0x3fffu) << 4;
    place += row / 8 * stride + row % 8 * swizzle;
    place += outer_is_contiguous ? column / swizzle * leading + column % swizzle : column;
    place ^= (place >> 7 & (swizzle / 16 - 1)) << 4;
    T value;
    std::memcpy(&value, shared + (place - emulated::kSharedBase), sizeof(T));
    return number(value);
  }
};

template <int kN, class Left, class Right>
inline void multiply(float* accumulator, bool accumulate, int depth, Left left, Right right) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const auto compute = [=] {
    for (int idx = 0; idx < kN / 2; ++idx) {
      const Element at = wgmma_accumulator_element(thread, idx);
      double sum = 0.0;
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(left(at.row, k)) * right(at.column, k);
      accumulator[idx] = static_cast<float>(accumulate ? accumulator[idx] + sum : sum);
    }
  };
  const auto& products = emulated::self->products;
  if (products.open.empty() && products.closed.empty() && emulated::machine->random() % 2) compute();
  else emulated::self->products.open.push_back(compute);
}

template <class T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
inline void wgmma_ss(float (&accumulator)[kN / 2], unsigned long long a, unsigned long long b, bool accumulate) {
  const SharedOperand<T> left(a, kMajorA), right(b, kMajorB);
  multiply<kN>(
      accumulator, accumulate, 32 / static_cast<int>(sizeof(T)), [=](int row, int k) { return left.at(row, k); },
      [=](int column, int k) { return right.at(column, k); });
}

// A thread has two rows of A but multiplies them with every column, so it needs the others' elements of its rows: those of the
// four lanes of its quad.
template <class T, int kN, Major kMajorB = Major::kK>
inline void wgmma_rs(float (&accumulator)[kN / 2], const unsigned (&a)[4], unsigned long long b, bool accumulate) {
  constexpr int kDepth = 32 / static_cast<int>(sizeof(T)), kEach = 4 / static_cast<int>(sizeof(T));
  struct Rows {
    float value[16][kDepth];
  } rows = {};
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  for (int idx = 0; idx < 4; ++idx) {
    const unsigned long long* slots = emulated::exchange(0xffffffffu, a[idx]);
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < kEach; ++e) {
        const Element at = wgmma_a_element<sizeof(T)>(warp * 32 + lane, kEach * idx + e);
        const unsigned long long bits = slots[lane] >> (8 * sizeof(T) * e) & ((1ull << (8 * sizeof(T))) - 1);
        rows.value[at.row - 16 * warp][at.column] = number(emulated::value_of<T>(bits));
      }
    }
  }
  const SharedOperand<T> right(b, kMajorB);
  multiply<kN>(
      accumulator, accumulate, kDepth, [=](int row, int k) { return rows.value[row - 16 * warp][k]; },
      [=](int column, int k) { return right.at(column, k); });
}

}  // namespace fi::ptx
