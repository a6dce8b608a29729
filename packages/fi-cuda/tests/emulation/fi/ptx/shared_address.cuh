#pragma once

namespace fi::ptx {

inline unsigned shared_address(const void* pointer) { return emulated::shared_address(pointer); }

}  // namespace fi::ptx
