// Makes a trace out of numbers: rotated keys with a common direction, attention sinks, heads that
// look nearby and heads that look for matching tokens far away. For tests of scale and of code;
// never evidence about models.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "traces/skeleton.hpp"

namespace kvreplay {

struct SynthOptions {
  Pos n_tokens = 2048, prompt_len = 1024;
  int n_layers = 2;
  int n_heads = 8, n_kv_heads = 2, head_dim = 128;
  ElementType element = ElementType::bf16;
  double theta = 1e4;
  std::string style = "half";
  int sinks = 4;  // leading tokens that every query attends to
  std::uint64_t seed = 1;
  std::string queries = "all";  // all | decode | window:N
  int hidden = 0;               // rows of w_o; 0 = none
  std::string generator;
  Profile profile = Profile::working;
};

// The same options give the same content on every machine: only exactly rounded operations are
// used. Bad options are a std::invalid_argument.
void synthesize(const std::filesystem::path& out, const SynthOptions& options);

// "all", "decode" or "window:N" as the tokens whose queries are stored.
std::vector<Pos> parse_queries(const std::string& text, Pos prompt_len, Pos n_tokens);

}  // namespace kvreplay
