// The truth about encoded caches: each encoder again in float64, vector by vector, as its paper or design says it.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// A full cache, every token as it is stored once encoded, and which of the first n tokens are by the end of the step
// in which the last of them arrived.
struct EncodedCache {
  std::vector<MatD> k, v;             // per KV head (n_tokens, head_dim), (n_tokens, v_head_dim)
  std::vector<Eigen::VectorXd> bias;  // per KV head (n_tokens), on the logit of an encoded key; empty for none
  std::function<Pos(Pos n)> keys_until, values_until;
};
// The attention output at a decode step over the tokens of `keep` (empty: all).
Eigen::VectorXd encoded_output(const ToyLayer& layer, const EncodedCache& cache, int q_head, int step,
                               const std::vector<bool>& keep = {});

// KIVI with the noise's share taken off the logits of encoded keys.
EncodedCache reference_kivi_debiased(const ToyLayer& layer, const Kivi& settings, int n_queries);

struct TurboQuant {
  int bits = 3;
  double outliers = 0.25;
  bool sketch = false, rescale = false;
  int residual = 0;
  unsigned seed = 0;
};
EncodedCache reference_turboquant(const ToyLayer& layer, const TurboQuant& settings);

struct PolarQuant {
  bool kmeans = false, rotate = true, generated = false;
  unsigned seed = 0;
  int levels = 4, first_bits = 4, bits = 2;
};
// Online codebooks are of each KV head's own prompt, or of all together.
EncodedCache reference_polarquant(const ToyLayer& layer, const PolarQuant& settings, bool together);

struct Tada {
  int bits = 4, group = 128, residual = 128;
  bool symmetric = false;
  bool over_heads = true;  // else each head's mean over the tokens that are encoded together
};
EncodedCache reference_tada(const ToyLayer& layer, const Tada& settings);

// SALS, keys turned as engine_layer() says.
struct Sals {
  double rank = 0.25, scoring_rank = 0.5;
  bool exact = false;  // score with positions, by frequency
  int sink = 16, window = 64;
  int bits = 4, group = 32, residual = 64;
  bool along_tokens = false;
};
EncodedCache reference_sals_store(const ToyLayer& layer, const Sals& settings);
// What every head of the layer reads of n tokens asked for.
std::vector<bool> reference_sals_choice(const ToyLayer& layer, const Sals& settings, Pos now, int n);

}  // namespace kvreplay::testing
