#pragma once

namespace fi::ptx {

inline bool elect_one() {
  __syncwarp();
  return emulated::lane() == 0;
}

}  // namespace fi::ptx
