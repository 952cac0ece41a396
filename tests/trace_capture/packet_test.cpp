// The layout of packets, against the sentence that describes it, read literally.
#include "trace_capture/packet.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>

namespace kvreplay {
namespace {

// Distinct values that every element type holds exactly, so that a wrong place shows.
float value_of(int kind, Pos token, int head, int channel) {
  return static_cast<float>((token * 64 + head * 8 + channel) % 251 - 125) * static_cast<float>(1 << kind);
}

RecordPlan gqa_plan(ElementType element) {
  RecordPlan plan;
  plan.n_heads = 6;
  plan.n_kv_heads = 2;
  plan.head_dim = 5;  // odd: parts end where no multiple of 16 is
  plan.layers = {1, 4, 9};
  plan.element = element;
  plan.capacity = 20;
  plan.queries = {3, 4, 7, 8, 9, 15};
  plan.outputs = {4, 8, 19};
  return plan;
}

// Token-major rows of tokens [first, first + n), as a decoder has them.
std::vector<float> rows_of(int kind, Pos first, Pos n, int heads, int head_dim) {
  std::vector<float> rows;
  for (Pos token = first; token < first + n; ++token) {
    for (int head = 0; head < heads; ++head) {
      for (int channel = 0; channel < head_dim; ++channel) {
        rows.push_back(value_of(kind, token, head, channel));
      }
    }
  }
  return rows;
}

float element_at(ElementType type, const std::byte* at) {
  float value = 0;
  widen(type, at, {&value, 1});
  return value;
}

// Bytes [begin, end) hold (heads, tokens, head_dim) of these tokens and nothing else.
void check_part(const RecordPlan& plan, ElementType type, int kind, int heads, const std::vector<Pos>& tokens,
                std::span<const std::byte> packet, std::size_t begin, std::size_t end) {
  REQUIRE(begin % 16 == 0);
  std::size_t at = begin;
  for (int head = 0; head < heads; ++head) {
    for (const Pos token : tokens) {
      for (int channel = 0; channel < plan.head_dim; ++channel) {
        REQUIRE(at + size_of(type) <= end);
        REQUIRE(element_at(type, packet.data() + at) == value_of(kind, token, head, channel));
        at += size_of(type);
      }
    }
  }
  REQUIRE(end - at < 16);
}

std::vector<Pos> among(const std::vector<Pos>& tokens, Pos first, Pos n) {
  std::vector<Pos> found;
  for (const Pos token : tokens) {
    if (token >= first && token < first + n) {
      found.push_back(token);
    }
  }
  return found;
}

}  // namespace

TEST_CASE("a packet is what its description says, for every element type and piece of the sequence") {
  const auto element = GENERATE(ElementType::f16, ElementType::bf16, ElementType::f32);
  const RecordPlan plan = gqa_plan(element);
  for (Pos first = 0; first < plan.capacity; ++first) {
    for (const Pos n : {Pos{1}, Pos{2}, Pos{5}, plan.capacity}) {
      if (first + n > plan.capacity) {
        continue;
      }
      const PacketLayout layout = packet_layout(plan, first, n, 1, 3);
      REQUIRE(std::vector<int>(layout.layers.begin(), layout.layers.end()) == std::vector<int>{4, 9});
      const std::vector<Pos> queries = among(plan.queries, first, n), outputs = among(plan.outputs, first, n);
      REQUIRE(std::vector<Pos>(layout.queries.begin(), layout.queries.end()) == queries);
      REQUIRE(std::vector<Pos>(layout.outputs.begin(), layout.outputs.end()) == outputs);
      REQUIRE(layout.bytes <= largest_packet(plan, n, 2));

      const auto q = rows_of(0, first, n, plan.n_heads, plan.head_dim);
      const auto k = rows_of(1, first, n, plan.n_kv_heads, plan.head_dim);
      const auto v = rows_of(2, first, n, plan.n_kv_heads, plan.head_dim);
      const auto out = rows_of(3, first, n, plan.n_heads, plan.head_dim);
      std::vector<std::byte> packet(layout.bytes);
      LayerRows rows{.q = q, .k = k, .v = v, .out = out};
      if (queries.empty()) {
        rows.q = {};
      }
      if (outputs.empty()) {
        rows.out = {};
      }
      for (std::size_t i = 0; i < 2; ++i) {
        pack(plan, layout, i, rows, packet);
      }
      std::vector<Pos> tokens;
      for (Pos token = first; token < first + n; ++token) {
        tokens.push_back(token);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        const LayerLayout& at = layout.at[i];
        check_part(plan, element, 1, plan.n_kv_heads, tokens, packet, at.k, at.v);
        check_part(plan, element, 2, plan.n_kv_heads, tokens, packet, at.v, at.q);
        check_part(plan, element, 0, plan.n_heads, queries, packet, at.q, at.out);
        check_part(plan, ElementType::f32, 3, plan.n_heads, outputs, packet, at.out, at.end);
        REQUIRE(at.end == (i == 0 ? layout.at[1].k : layout.bytes));
      }
    }
  }
}

TEST_CASE("packing rounds to nearest even and leaves attention outputs as they are") {
  RecordPlan plan;
  plan.n_heads = plan.n_kv_heads = 1;
  plan.head_dim = 4;
  plan.layers = {0};
  plan.element = ElementType::bf16;
  plan.capacity = 1;
  plan.queries = plan.outputs = {0};
  const std::vector<float> x = {1.00390625F, 1.01171875F, 0.1F, -3.0F};  // two ties between neighbours of bfloat16
  const PacketLayout layout = packet_layout(plan, 0, 1, 0, 1);
  std::vector<std::byte> packet(layout.bytes);
  pack(plan, layout, 0, {.q = x, .k = x, .v = x, .out = x}, packet);
  std::vector<float> stored(4);
  widen(ElementType::bf16, packet.data() + layout.at[0].q, stored);
  REQUIRE(stored == std::vector<float>{1.0F, 1.015625F, 0.10009765625F, -3.0F});
  widen(ElementType::f32, packet.data() + layout.at[0].out, stored);
  REQUIRE(stored == x);
}

TEST_CASE("values rounded before attention are those that the file will hold") {
  const auto element = GENERATE(ElementType::f16, ElementType::bf16, ElementType::f32);
  std::vector<float> values;
  for (int i = 0; i < 3000; ++i) {
    values.push_back(std::sin(static_cast<float>(i)) * 100);
  }
  std::vector<float> rounded = values, stored(values.size());
  std::vector<std::byte> bytes(values.size() * size_of(element));
  narrow(element, values, bytes.data());
  widen(element, bytes.data(), stored);
  round_to(element, rounded);
  REQUIRE(rounded == stored);
  // What f16 cannot hold stays what it is, so that it is refused as itself and not as an infinity.
  values[1500] = 1e6F;
  rounded = values;
  round_to(element, rounded);
  stored[1500] = element == ElementType::bf16 ? 999424.0F : 1e6F;
  REQUIRE(rounded == stored);
}

}  // namespace kvreplay
