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

}  // namespace fi::ptx
