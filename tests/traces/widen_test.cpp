#include "traces/widen.hpp"

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace kvreplay {
namespace {

// The definition of the formats, in double and with no bit tricks.
double slow(ElementType type, std::uint16_t bits) {
  const int exponent_bits = type == ElementType::f16 ? 5 : 8, mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const double fraction = mantissa / std::ldexp(1.0, mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias) : sign * std::ldexp(1 + fraction, exponent - bias);
}

std::vector<std::uint16_t> all_bits() {
  std::vector<std::uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) {
    bits[i] = static_cast<std::uint16_t>(i);
  }
  return bits;
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

std::uint16_t narrow_one(ElementType type, float value) {
  std::uint16_t bits = 0;
  narrow(type, std::span(&value, 1), reinterpret_cast<std::byte*>(&bits));
  return bits;
}

}  // namespace

TEST_CASE("every 16-bit value widens exactly, in the wide and in the scalar path") {
  const std::vector<std::uint16_t> bits = all_bits();
  const auto* in = reinterpret_cast<const std::byte*>(bits.data());
  for (const ElementType type : {ElementType::f16, ElementType::bf16}) {
    std::vector<float> wide(bits.size());
    CHECK_FALSE(widen(type, in, wide));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const float expected = static_cast<float>(slow(type, bits[i]));
      float one = 0;
      const bool finite = widen(type, in + 2 * i, std::span(&one, 1));
      wrong += same(wide[i], expected) && same(one, expected) && finite == std::isfinite(expected) ? 0 : 1;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("one value that is not finite is noticed wherever it stands") {
  for (const ElementType type : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    const std::size_t n = 77;  // not a multiple of any register
    for (std::size_t at = 0; at < n; ++at) {
      for (const float bad : {INFINITY, -INFINITY, NAN}) {
        std::vector<float> values(n, 1.5F), out(n);
        std::vector<std::byte> stored(n * size_of(type));
        narrow(type, values, stored.data());
        CHECK(widen(type, stored.data(), out));
        values[at] = bad;
        narrow(type, values, stored.data());
        CHECK_FALSE(widen(type, stored.data(), out));
        CHECK(same(out[at], bad));
      }
    }
  }
}

TEST_CASE("every 16-bit value survives widening and rounding back") {
  const std::vector<std::uint16_t> bits = all_bits();
  for (const ElementType type : {ElementType::f16, ElementType::bf16}) {
    std::vector<float> wide(bits.size());
    widen(type, reinterpret_cast<const std::byte*>(bits.data()), wide);
    std::vector<std::uint16_t> back(bits.size());
    narrow(type, wide, reinterpret_cast<std::byte*>(back.data()));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const bool good = std::isnan(wide[i]) ? std::isnan(slow(type, back[i])) : back[i] == bits[i];
      const bool scalar = std::isnan(wide[i]) ? std::isnan(slow(type, narrow_one(type, wide[i])))
                                              : narrow_one(type, wide[i]) == bits[i];
      wrong += good && scalar ? 0 : 1;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("rounding goes to the nearest, and to even between two") {
  const std::vector<std::uint16_t> bits = all_bits();
  for (const ElementType type : {ElementType::f16, ElementType::bf16}) {
    std::size_t wrong = 0;
    for (std::size_t i = 0; i + 1 < 0x8000; ++i) {
      const double low = slow(type, bits[i]), high = slow(type, bits[i + 1]);
      if (!std::isfinite(low) || !std::isfinite(high)) {
        continue;
      }
      const float middle = static_cast<float>((low + high) / 2);  // exact: one more bit than the format has
      const auto even = static_cast<std::uint16_t>(i % 2 == 0 ? i : i + 1);
      const std::vector<float> values = {
          middle, std::nextafter(middle, -1.0F), std::nextafter(middle, INFINITY), -middle, middle, middle, middle,
          middle};  // eight: the wide path too
      std::vector<std::uint16_t> rounded(values.size());
      narrow(type, values, reinterpret_cast<std::byte*>(rounded.data()));
      for (std::size_t j = 0; j < 4; ++j) {
        const std::uint16_t expected[] = {even, bits[i], bits[i + 1], static_cast<std::uint16_t>(even | 0x8000U)};
        wrong += rounded[j] == expected[j] && narrow_one(type, values[j]) == expected[j] ? 0 : 1;
      }
    }
    CHECK(wrong == 0);
  }
  CHECK(narrow_one(ElementType::f16, 65519.0F) == 0x7bff);
  CHECK(narrow_one(ElementType::f16, 65520.0F) == 0x7c00);
}

TEST_CASE("an unknown element type is named with the allowed ones") {
  CHECK(element_type_of("bf16") == ElementType::bf16);
  CHECK_THROWS_WITH(element_type_of("fp8"), "dtype 'fp8' is unknown; allowed are f16, bf16 and f32");
}

}  // namespace kvreplay
