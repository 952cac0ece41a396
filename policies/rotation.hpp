// How a trace rotated its queries and keys (RoPE), so that a part can see them before, or move them elsewhere.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace kvreplay {

// Rotated x = attention_factor * R_p x on the first rotary_dim numbers, p the token's own position id; the rest is as
// it was. Pair i of a vector turns by p * inv_freq[i].
struct Rotation {
  bool interleaved = false;       // pairs (2i, 2i + 1); else (i, i + rotary_dim / 2)
  double attention_factor = 1;    // of both queries and keys
  std::vector<double> inv_freq;   // (rotary_dim / 2)
  std::vector<std::int32_t> ids;  // (n_tokens) position id of each token

  int rotary_dim() const { return 2 * static_cast<int>(inv_freq.size()); }
  // Indices of pair i within a head's vector.
  int first_of(int i) const { return interleaved ? 2 * i : i; }
  int second_of(int i) const { return interleaved ? 2 * i + 1 : i + static_cast<int>(inv_freq.size()); }

  // In place: (head_dim) numbers as `token` carries them, without the rotation and back. Softmax scales stay.
  void undo(int token, std::span<float> x) const;
  void apply(int token, std::span<float> x) const;
  // Turns as if the token lay `distance` position ids later; the factor stays.
  void turn(double distance, std::span<float> x) const;
};

}  // namespace kvreplay
