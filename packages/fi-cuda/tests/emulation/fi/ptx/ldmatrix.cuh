#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

// The lanes' rows, 16 bytes each.
struct MatrixRows {
  unsigned char* row[32];

  explicit MatrixRows(const void* own) {
    const unsigned long long* slots = emulated::exchange(0xffffffffu, reinterpret_cast<unsigned long long>(own));
    for (int lane = 0; lane < 32; ++lane) row[lane] = reinterpret_cast<unsigned char*>(slots[lane]);
  }
  unsigned short& element(int matrix, int idx, int column) const {
    unsigned char* place = row[matrix * 8 + idx];
    if (shared_address(place) % 16) emulated::fail("an unaligned row of a matrix");
    return reinterpret_cast<unsigned short*>(place)[column];
  }
};

template <int kCount, bool kTrans>
inline void load_matrices(unsigned (&fragment)[kCount], const void* own) {
  const MatrixRows rows(own);
  const int first = emulated::lane() / 4, second = emulated::lane() % 4 * 2;
  for (int matrix = 0; matrix < kCount; ++matrix) {
    unsigned bits = 0;
    for (int e = 0; e < 2; ++e) {
      bits |= static_cast<unsigned>(kTrans ? rows.element(matrix, second + e, first) : rows.element(matrix, first, second + e))
              << (16 * e);
    }
    fragment[matrix] = bits;
  }
  __syncwarp();  // no lane goes on, and overwrites a row, before all have read
}

template <int kCount, bool kTrans>
inline void store_matrices(void* own, const unsigned (&fragment)[kCount]) {
  const MatrixRows rows(own);
  const int first = emulated::lane() / 4, second = emulated::lane() % 4 * 2;
  for (int matrix = 0; matrix < kCount; ++matrix) {
    for (int e = 0; e < 2; ++e) {
      unsigned short& place = kTrans ? rows.element(matrix, second + e, first) : rows.element(matrix, first, second + e);
      place = static_cast<unsigned short>(fragment[matrix] >> (16 * e));
    }
  }
  __syncwarp();
}

#define FI_BOTH(COUNT)                                                                                                         \
  inline void ldmatrix_x##COUNT(unsigned (&f)[COUNT], const void* row) { load_matrices<COUNT, false>(f, row); }                \
  inline void ldmatrix_x##COUNT##_trans(unsigned (&f)[COUNT], const void* row) { load_matrices<COUNT, true>(f, row); }         \
  inline void stmatrix_x##COUNT(void* row, const unsigned (&f)[COUNT]) { store_matrices<COUNT, false>(row, f); }               \
  inline void stmatrix_x##COUNT##_trans(void* row, const unsigned (&f)[COUNT]) { store_matrices<COUNT, true>(row, f); }
FI_BOTH(1)
FI_BOTH(2)
FI_BOTH(4)
#undef FI_BOTH

inline unsigned movmatrix_trans(unsigned fragment) {
  const unsigned long long* slots = emulated::exchange(0xffffffffu, fragment);
  const unsigned row = emulated::lane() / 4, column = emulated::lane() % 4 * 2;
  unsigned result = 0;
  for (unsigned e = 0; e < 2; ++e) {
    const unsigned both = static_cast<unsigned>(slots[(column + e) * 4 + row / 2]);
    result |= (both >> (16 * (row % 2)) & 0xffffu) << (16 * e);
  }
  return result;
}

}  // namespace fi::ptx
