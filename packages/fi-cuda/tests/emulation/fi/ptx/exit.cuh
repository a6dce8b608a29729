#pragma once

namespace fi::ptx {

inline void end_thread() { emulated::end_fiber(); }

}  // namespace fi::ptx
