// One layer of a trace, widened to float32 and laid out the way the engine multiplies it.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

using MapF = Eigen::Map<const MatF>;

struct Layer {
  int index = 0;           // the model's own layer number
  int n_model_layers = 0;  // of the model, not of the run
  int n_heads = 0, n_kv_heads = 0, group_size = 0, head_dim = 0, v_head_dim = 0;
  Pos n_tokens = 0, prompt_len = 0;
  Pos first_query = 0;      // queries are there for positions [first_query, n_tokens)
  float logit_softcap = 0;  // 0: none
  float scale = 1;          // softmax scale, already folded into q
  int element_bytes = 2;    // of one stored number of the trace
  // One entry per KV head. A query row is (pos - first_query) * group_size + head in group, so any block of steps is
  // one block of rows.
  std::vector<MatF> q;               // ((n_tokens - first_query) * group_size, head_dim)
  std::vector<MatF> k;               // (n_tokens, head_dim)
  std::vector<MatF> v;               // (n_tokens, v_head_dim)
  MatF w_o;                          // (hidden, n_heads * v_head_dim); empty if the trace has none or nobody asked
  std::vector<TokenSpan> spans;      // of the trace; may reach beyond n_tokens
  std::optional<Rotation> rotation;  // of q and k; none where the trace does not say, or it changed on the way
  std::vector<std::pair<std::string, std::vector<std::vector<float>>>> scores;  // name, per KV head (n_tokens)

  int n_steps() const { return n_tokens - prompt_len; }
  double slot_bytes() const { return double(element_bytes) * (head_dim + v_head_dim); }  // of one token as stored
  auto queries(int kv_head, Pos begin, int n) const {                                    // (n * group_size, head_dim)
    return q[kv_head].middleRows(Eigen::Index(begin - first_query) * group_size, Eigen::Index(n) * group_size);
  }
  SetShape shape() const;  // what all sets of the layer have in common; points into the layer
};

}  // namespace kvreplay
