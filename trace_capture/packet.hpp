// What is recorded of a sequence, and how the rows of one pass lie in memory on their way to the file: a packet holds,
// layer after layer, k (n_kv_heads, n, head_dim), v (n_kv_heads, n, head_dim), q (n_heads, m, head_dim) and out
// (n_heads, c, head_dim, always float32), head-major like the file, where m and c are how many of the n tokens have
// their query and their attention output stored. Both backends fill packets in this layout.
#pragma once
#include <cstddef>
#include <span>
#include <vector>

#include "traces/reader.hpp"
#include "traces/widen.hpp"

namespace kvreplay {

struct RecordPlan {
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  std::vector<int> layers;  // recorded, ascending
  ElementType element = ElementType::f16;
  Pos capacity = 0;          // tokens of the sequence
  std::vector<Pos> queries;  // tokens whose queries are stored, ascending
  std::vector<Pos> outputs;  // tokens whose attention outputs are stored, ascending
};

// Byte offsets of one layer's parts from the packet's begin; each is a multiple of 16.
struct LayerLayout {
  std::size_t k = 0, v = 0, q = 0, out = 0, end = 0;
};

struct PacketLayout {
  Pos first = 0, n = 0;          // tokens
  std::span<const int> layers;   // of the plan
  std::span<const Pos> queries;  // the m of these tokens
  std::span<const Pos> outputs;  // the c of these tokens
  std::vector<LayerLayout> at;   // (layers)
  std::size_t bytes = 0;
};

// The packet of tokens [first, first + n) in the layers plan.layers[begin, end).
PacketLayout packet_layout(const RecordPlan& plan, Pos first, Pos n, std::size_t begin, std::size_t end);

// Bytes that a packet of any n tokens and n_layers layers may need at most.
std::size_t largest_packet(const RecordPlan& plan, Pos n, std::size_t n_layers);

// Rounds values to what the file will hold of them. A backend does so before attention, which then sees just that: its
// outputs can be recomputed from the trace. What the element type cannot hold is left as it is, and refused later.
void round_to(ElementType element, std::span<float> values);

// One layer's rows of a pass, float32, token-major: q, out (n, n_heads, head_dim), k, v (n, n_kv_heads, head_dim). q
// may be empty where none of the tokens has its query stored, and out likewise.
struct LayerRows {
  std::span<const float> q, k, v, out;
};

// Fills the part of layer layout.layers[index], rounding to nearest even.
void pack(const RecordPlan& plan, const PacketLayout& layout, std::size_t index, const LayerRows& rows,
          std::span<std::byte> packet);

}  // namespace kvreplay
