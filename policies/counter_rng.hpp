// Random numbers that depend on where they are drawn, never on when or by whom: the same for any thread count.
#pragma once
#include <cstdint>

namespace kvreplay {

// SplitMix64's finaliser: every input bit moves every output bit.
constexpr std::uint64_t mix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), 53 bits.
constexpr double counter_uniform(std::uint64_t seed, std::uint64_t layer, std::uint64_t head, std::uint64_t step) {
  const std::uint64_t bits = mix64(mix64(mix64(mix64(seed) ^ layer) ^ head) ^ step);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace kvreplay
