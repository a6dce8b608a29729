// The head of a list of tiles, longest first, from which the blocks of a launch take one after the other.
#pragma once

namespace fi {

struct alignas(16) OrderHeader {
  int num_rows;  // of the list, each of which is a tile, or a piece of one, of every KV head
  int is_used;   // 0: every block has a share of its own
  int taken;     // tiles taken beyond the first of each block; 0 between launches
  int reserved;
};

}  // namespace fi
