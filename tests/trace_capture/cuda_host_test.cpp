// The arithmetic that kernels share with the host.
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "trace_capture/cuda/index.hpp"
#include "traces/widen.hpp"

namespace kvreplay::cuda {
namespace {

TEST_CASE("cuda: every float16 and bfloat16 widens as the trace reader widens it") {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const std::uint16_t half = static_cast<std::uint16_t>(bits);
    float expected = 0;
    widen(ElementType::f16, reinterpret_cast<const std::byte*>(&half), {&expected, 1});
    const float found = to_float(F16{half});
    REQUIRE((std::isnan(expected) ? std::isnan(found) : bits_of(found) == bits_of(expected)));
    widen(ElementType::bf16, reinterpret_cast<const std::byte*>(&half), {&expected, 1});
    REQUIRE(bits_of(to_float(Bf16{half})) == bits_of(expected));
  }
}

TEST_CASE("cuda: float32 narrows as the trace writer narrows it") {
  std::vector<std::uint32_t> all;
  for (std::uint32_t high = 0; high < 65536; ++high) {  // each upper half with lower halves around the ties
    for (const std::uint32_t low : {0x0000U, 0x0001U, 0x0FFFU, 0x1000U, 0x1001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      all.push_back(high << 16 | low);
    }
  }
  for (const std::uint32_t bits : all) {
    const float x = float_of(bits);
    if (std::isnan(x)) {
      REQUIRE(std::isnan(to_float(from_float<F16>(x))));
      REQUIRE(std::isnan(to_float(from_float<Bf16>(x))));
      continue;
    }
    std::uint16_t expected = 0;
    narrow(ElementType::f16, {&x, 1}, reinterpret_cast<std::byte*>(&expected));
    REQUIRE(from_float<F16>(x).bits == expected);
    narrow(ElementType::bf16, {&x, 1}, reinterpret_cast<std::byte*>(&expected));
    REQUIRE(from_float<Bf16>(x).bits == expected);
  }
}

TEST_CASE("cuda: a window counts the query's own token") {
  REQUIRE(first_visible(0, 0) == 0);
  REQUIRE(first_visible(100, 0) == 0);
  REQUIRE(first_visible(3, 4) == 0);
  REQUIRE(first_visible(4, 4) == 1);
  REQUIRE(first_visible(100, 1) == 100);
}

TEST_CASE("cuda: splits cover what is seen, each key once, and never more than there is room for") {
  for (int capacity = 1; capacity <= 1100; capacity += 7) {
    for (int pos = 0; pos < capacity; ++pos) {
      for (const int window : {0, 1, 100, 128, 129}) {
        const int begin = first_visible(pos, window), splits = n_splits(begin, pos + 1);
        REQUIRE(splits >= 1);
        REQUIRE(splits <= max_splits(capacity));
        REQUIRE(begin + (splits - 1) * kSplitTokens <= pos);
        REQUIRE(begin + splits * kSplitTokens > pos);
      }
    }
  }
}

TEST_CASE("cuda: the values' partial sums fit a block's threads and shared memory") {
  for (int head_dim = 8; head_dim <= kMaxHeadDim; head_dim += 8) {
    const int groups = value_groups(head_dim);
    REQUIRE(groups >= 1);
    REQUIRE(groups * head_dim / 2 <= 256);
    REQUIRE(groups * kSplitHeads * head_dim <= 8 * kMaxHeadDim);
  }
}

TEST_CASE("cuda: rows of a packet come kind by kind, head by head, token by token") {
  const PackCounts counts{3, 2, 4, 2, 1};
  int row = 0;
  for (int kind = 0; kind < 4; ++kind) {
    const int heads = kind < 2 ? 2 : 3, tokens = kind < 2 ? 4 : kind == 2 ? 2 : 1;
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < tokens; ++i, ++row) {
        const PackedRow found = packed_row(row, counts);
        REQUIRE(found.kind == kind);
        REQUIRE(found.head == head);
        REQUIRE(found.i == i);
        REQUIRE(found.place == head * tokens + i);
      }
    }
  }
  REQUIRE(row == n_packed_rows(counts));
}

}  // namespace
}  // namespace kvreplay::cuda
