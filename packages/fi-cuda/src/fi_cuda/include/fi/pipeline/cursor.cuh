// Where a thread stands in a ring of kStages stages. Integers only, for the host too.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

// A stage, and the parity of the barrier phase to wait for there. A wait for parity 1 on a barrier of which no phase is
// complete returns at once, so the producer's first round finds every stage empty.
template <int kStages>
struct RingCursor {
  static_assert(kStages >= 1);
  int stage;
  unsigned parity;

  FI_HOST_DEVICE static RingCursor producer() { return {0, 1u}; }
  FI_HOST_DEVICE static RingCursor consumer() { return {0, 0u}; }

  FI_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1u;
    }
  }
};

}  // namespace fi
