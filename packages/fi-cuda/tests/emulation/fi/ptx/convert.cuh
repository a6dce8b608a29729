#pragma once

namespace fi::ptx {

inline void halves_of(unsigned& low, unsigned& high, unsigned bytes, __nv_fp8_interpretation_t format) {
  unsigned halves[4];
  for (int idx = 0; idx < 4; ++idx) {
    halves[idx] = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bytes >> (8 * idx)), format).x;
  }
  low = halves[0] | halves[1] << 16;
  high = halves[2] | halves[3] << 16;
}
inline void halves_of_e4m3(unsigned& low, unsigned& high, unsigned bytes) { halves_of(low, high, bytes, __NV_E4M3); }
inline void halves_of_e5m2(unsigned& low, unsigned& high, unsigned bytes) { halves_of(low, high, bytes, __NV_E5M2); }

inline unsigned e4m3x4_of(float first, float second, float third, float fourth) {
  const float values[4] = {first, second, third, fourth};
  unsigned result = 0;
  for (int idx = 0; idx < 4; ++idx) {
    result |= static_cast<unsigned>(__nv_cvt_float_to_fp8(values[idx], __NV_SATFINITE, __NV_E4M3)) << (8 * idx);
  }
  return result;
}

}  // namespace fi::ptx
