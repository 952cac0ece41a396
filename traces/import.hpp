// Makes a trace from the arrays of an .npz file, as people save them from their own model code.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "traces/skeleton.hpp"

namespace kvreplay {

struct ImportOptions {
  Pos prompt_len = 0;          // required
  double attention_scale = 0;  // required; what q k^T is multiplied with before the softmax
  double rope_theta = 0;       // 0 = keys carry no rotation, or an unknown one
  std::string rope_style = "half";
  int rotary_dim = 0;                // 0 = head_dim
  int n_layers = 0;                  // of the model; 0 = the last layer in the file + 1
  std::optional<ElementType> dtype;  // default: as the keys are
  Pos n_tokens = 0;                  // only the first so many; 0 = all
  std::vector<int> layers;           // only these; empty = all
  double logit_softcap = 0;
  int sliding_window = 0;  // of every layer
  bool qk_norm = false;
  std::vector<Span> spans;  // named ranges of tokens
  std::string model_name, architecture, provenance, generator;
  Profile profile = Profile::working;
  ArchiveLayout archive;
};

// Arrays: token_ids; per layer number l q{l} [n_heads, n_queries, head_dim], k{l} and v{l}
// [n_kv_heads, n_tokens, .]; optional q_index, position, out{l} with out_index, w_o{l}. Bad arrays
// are a TraceError, bad options a std::invalid_argument.
void import_npz(const std::filesystem::path& in, const std::filesystem::path& out, const ImportOptions& options);

// theta^(-2 i / rotary_dim)
std::vector<double> rope_frequencies(double theta, int rotary_dim);

}  // namespace kvreplay
