#pragma once

#include "fi/tile/fragments.cuh"

namespace fi::ptx {

inline float number(__half x) { return __half2float(x); }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float number(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
inline float number(__nv_fp8_e5m2 x) { return static_cast<float>(x); }

template <class T>
inline float half_of(unsigned bits, int idx) {
  return number(emulated::value_of<T>(bits >> (16 * idx) & 0xffffu));
}

template <class T>
inline void mma_m16n8k16(float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  float left[16][16], right[16][8];
  for (int idx = 0; idx < 6; ++idx) {
    const unsigned long long* slots = emulated::exchange(0xffffffffu, idx < 4 ? a[idx] : b[idx - 4]);
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 2; ++e) {
        const float value = half_of<T>(static_cast<unsigned>(slots[lane]), e);
        const Element at = idx < 4 ? mma_a_element(lane, 2 * idx + e) : mma_b_element(lane, 2 * (idx - 4) + e);
        (idx < 4 ? left[at.row][at.column] : right[at.row][at.column]) = value;
      }
    }
  }
  for (int idx = 0; idx < 4; ++idx) {
    const Element at = mma_accumulator_element(static_cast<int>(emulated::lane()), idx);
    double sum = accumulator[idx];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[at.row][k]) * right[k][at.column];
    accumulator[idx] = static_cast<float>(sum);
  }
}

}  // namespace fi::ptx
