// Small layers made in memory. Every number is rounded to the element type first and only then
// widened, so the double that the reference reads and the float32 that the engine reads are the
// same number.
#pragma once
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay::testing {

enum class Element { f32, f16, bf16 };

double round_to(double x, Element element);  // half to even, with subnormals
int element_bytes(Element element);

enum class ToyKind {
  structured,    // sinks with large mass and small values, local attention, some heads that look far
                 // back
  huge_logits,   // logits up to +-1e4, exact in float32
  equal_keys,    // every key the same: uniform attention
  sharp,         // nearly all attention on one token, rarely the latest
  small_evicted  // all tokens but the first two together hold about 4e-6 of the attention
};

struct ToyOptions {
  int n_kv_heads = 2, group_size = 1, head_dim = 16, v_head_dim = 16;
  Pos n_tokens = 96, prompt_len = 16;
  Element element = Element::f32;
  ToyKind kind = ToyKind::structured;
  unsigned seed = 1;
  double softcap = 0;  // 0 = none
  int hidden = 0;      // rows of w_o; 0 = none
  std::vector<TokenSpan> spans = {};
};

struct ToyLayer {
  ToyOptions options;
  double scale = 1;     // logit = scale * q . k
  std::vector<MatD> q;  // per query head: (n_tokens, head_dim)
  std::vector<MatD> k;  // per KV head: (n_tokens, head_dim)
  std::vector<MatD> v;  // per KV head: (n_tokens, v_head_dim)
  MatD w_o;             // (hidden, n_heads * v_head_dim) or empty

  int n_heads() const { return options.n_kv_heads * options.group_size; }
  int n_steps() const { return options.n_tokens - options.prompt_len; }
  int kv_head(int q_head) const { return q_head / options.group_size; }
};

ToyLayer make_toy_layer(const ToyOptions& options);

}  // namespace kvreplay::testing
