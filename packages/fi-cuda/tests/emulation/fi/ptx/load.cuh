#pragma once

namespace fi::ptx {

inline uint4 load_past_l1(const void* address) { return *static_cast<const uint4*>(address); }

}  // namespace fi::ptx
