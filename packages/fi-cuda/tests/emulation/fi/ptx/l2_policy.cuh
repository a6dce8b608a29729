#pragma once

namespace fi::ptx {

inline unsigned long long evict_first_policy() { return 0; }
inline unsigned long long evict_last_policy() { return 0; }

}  // namespace fi::ptx
