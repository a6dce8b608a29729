#pragma once

namespace fi::ptx {

inline void end_thread() { emulated::end_fiber(); }
inline void end_thread_unseen() { emulated::end_fiber(); }

}  // namespace fi::ptx
