// The arithmetic of positions and places that kernels share with the host: what a query sees, how decode attention is
// split and merged, where a row of a packet comes from.
#pragma once
#include <cstddef>
#include <cstdint>

#include "trace_capture/cuda/element.hpp"

namespace kvreplay::cuda {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kSplitTokens = 128;  // keys that one block of decode attention takes
inline constexpr int kSplitHeads = 4;     // query heads of one KV head that it serves
inline constexpr int kTile = 64;          // queries and keys of one tile of prefill attention

KVREPLAY_BOTH constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0 ? 1 : 0); }
KVREPLAY_BOTH constexpr int least(int a, int b) { return a < b ? a : b; }

// The first key that the query at pos sees: the window counts pos itself; 0 = no window.
KVREPLAY_BOTH constexpr int first_visible(int pos, int window) {
  return window > 0 && pos >= window ? pos - window + 1 : 0;
}

// Decode attention over keys [begin, end): split s takes kSplitTokens keys (the last one what is left). The number of
// splits follows from the length alone, so that sums always come in the same order.
KVREPLAY_BOTH constexpr int n_splits(int begin, int end) { return ceil_div(end - begin, kSplitTokens); }
KVREPLAY_BOTH constexpr int max_splits(int capacity) { return ceil_div(capacity, kSplitTokens); }

// In how many blocks the query heads of one KV head are served.
KVREPLAY_BOTH constexpr int head_blocks(int group_size) { return ceil_div(group_size, kSplitHeads); }

// How many keys a block multiplies by their values at a time: its 256 threads take two channels each.
KVREPLAY_BOTH constexpr int value_groups(int head_dim) { return least(8, 256 / (head_dim / 2)); }

// Row `row` of one layer of a packet: k (n_kv_heads, n), v (n_kv_heads, n), q (n_heads, m), out (n_heads, c).
struct PackedRow {
  int kind;   // 0 k, 1 v, 2 q, 3 out
  int head;   // of the kind's heads
  int i;      // of the kind's tokens
  int place;  // head * tokens + i: the row's place in its part
};

struct PackCounts {
  int n_heads, n_kv_heads, n, m, c;
};

KVREPLAY_BOTH constexpr int n_packed_rows(const PackCounts& counts) {
  return 2 * counts.n_kv_heads * counts.n + counts.n_heads * (counts.m + counts.c);
}

KVREPLAY_BOTH constexpr PackedRow packed_row(int row, const PackCounts& counts) {
  int place = row;
  for (int kind = 0; kind < 2; ++kind) {
    if (place < counts.n_kv_heads * counts.n) {
      return {kind, place / counts.n, place % counts.n, place};
    }
    place -= counts.n_kv_heads * counts.n;
  }
  if (place < counts.n_heads * counts.m) {
    return {2, place / counts.m, place % counts.m, place};
  }
  place -= counts.n_heads * counts.m;
  return {3, place / counts.c, place % counts.c, place};
}

// The rotation of a pair of channels (c, c + head_dim / 2).
struct Pair {
  float first, second;
};

KVREPLAY_BOTH inline Pair rotate(Pair x, float cos, float sin) {
  return {x.first * cos - x.second * sin, x.second * cos + x.first * sin};
}

}  // namespace kvreplay::cuda
