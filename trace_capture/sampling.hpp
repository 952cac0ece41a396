// How the next token is chosen from logits: greedy, or by temperature, top-k and top-p from a counter-based generator,
// so that a seed gives the same tokens on every machine and backend up to the rounding of the logits.
#pragma once
#include <cstdint>
#include <span>

namespace kvreplay {

struct Sampling {
  double temperature = 0;  // 0 = greedy
  double top_p = 1;        // (0, 1]: the smallest set of most likely tokens that holds this probability
  int top_k = 0;           // 0 = all
  std::uint64_t seed = 0;
};

struct Choice {
  std::int32_t id = 0;
  float logprob = 0;  // of the model: natural log of softmax(logits)[id], before temperature and cuts
};

// Throws ConfigError naming the value that is out of range.
void check(const Sampling& sampling);

// logits: (vocab). Greedy ties go to the lower id. Order of the cuts: temperature, top-k, top-p; among equal logits the
// lower id survives. Of the surviving tokens, in the order of their ids, the first is chosen whose cumulative
// probability exceeds uniform_at(seed, step); `step` counts the choices of a sequence. Throws ConfigError as check()
// does, and std::runtime_error for a logit that is not finite.
Choice choose(std::span<const float> logits, const Sampling& sampling, std::uint64_t step);

// log softmax(logits)[id], summed in double.
float log_probability(std::span<const float> logits, std::int32_t id);

}  // namespace kvreplay
