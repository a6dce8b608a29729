// The work of a batch whose requests share prefixes, as fi/kernels/attention_prefix_plan.cuh leaves it on the GPU.
//
// A node of the forest is a virtual request: its query tokens are those of all its members, its keys those they share, all of
// which every token sees. What is left of a request's keys is its own. A tile of query rows whose keys are cut, by a node or
// into pieces, leaves rows of partial results; each row of the output then names its parts.
#pragma once

#include "fi/attention/item.cuh"

namespace fi {

// Rows of the list are AttentionItem without a head, each a tile of every KV head: nodes' first, then requests'. `slot` is the
// first row of partial results of the item's piece, or -1: the tile is whole.
// `q_begin` of a node counts in the list of tokens, and in that of their positions in their requests.
struct alignas(16) PrefixHeader {
  int num_rows;    // 0: there is no list; the decode kernel's code, if it is there, serves the batch
  int num_merged;  // tokens whose parts are merged
  int taken;       // tiles taken beyond the first of each block; 0 between launches
  int reserved;
};

enum PrefixItemKind { kRequestItem, kNodeItem };

// Where partial results of a token's rows lie: of piece p, KV head h and head g of its group in row
// first + (p * num_kv_heads + h) * head_rows + g. A token's segments end with one of no pieces, or with their capacity.
struct alignas(16) PartSegment {
  int first, head_rows, num_pieces;
  int token;  // of the first segment; of a node's: how much later the token stands among the node's than in its request
};

}  // namespace fi
