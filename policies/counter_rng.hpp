// Random numbers without a state: the same key gives the same number on any machine, whatever was
// drawn before.
#pragma once
#include <cstdint>

namespace kvreplay {

// The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of
// the result.
constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), for example by (seed, layer, set, step, pos).
template <class... Key>
constexpr double uniform_at(Key... key) {
  std::uint64_t h = 0;
  ((h = mix_bits(h ^ static_cast<std::uint64_t>(key))), ...);
  return static_cast<double>(h >> 11) * 0x1p-53;
}

}  // namespace kvreplay
