#pragma once

namespace fi::ptx {

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_approx(float x) { return std::log2(flushed(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float rcp_approx(float x) { return flushed(1.0f / flushed(x)); }
inline float max_or_nan(float first, float second) {
  return first != first || second != second ? __int_as_float(0x7fffffff) : std::fmax(first, second);
}

}  // namespace fi::ptx
