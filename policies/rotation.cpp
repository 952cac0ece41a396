#include "policies/rotation.hpp"

#include <cmath>

namespace kvreplay {

void Rotation::turn(double distance, std::span<float> x) const {
  for (int i = 0; i < static_cast<int>(inv_freq.size()); ++i) {
    const double angle = distance * inv_freq[static_cast<std::size_t>(i)], c = std::cos(angle), s = std::sin(angle);
    float& first = x[static_cast<std::size_t>(first_of(i))];
    float& second = x[static_cast<std::size_t>(second_of(i))];
    const double a = static_cast<double>(first), b = static_cast<double>(second);
    first = static_cast<float>(a * c - b * s);
    second = static_cast<float>(a * s + b * c);
  }
}

namespace {

void scale(std::span<float> x, double factor) {
  if (factor != 1) {
    for (float& a : x) {
      a = static_cast<float>(static_cast<double>(a) * factor);
    }
  }
}

}  // namespace

void Rotation::undo(int token, std::span<float> x) const {
  turn(-static_cast<double>(ids[static_cast<std::size_t>(token)]), x);
  scale(x.first(static_cast<std::size_t>(rotary_dim())), 1 / attention_factor);
}

void Rotation::apply(int token, std::span<float> x) const {
  turn(static_cast<double>(ids[static_cast<std::size_t>(token)]), x);
  scale(x.first(static_cast<std::size_t>(rotary_dim())), attention_factor);
}

}  // namespace kvreplay
