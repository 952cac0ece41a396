#include "trace_capture/sampling.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "policies/counter_rng.hpp"
#include "policies/errors.hpp"

namespace kvreplay {
namespace {

struct Candidate {
  std::int32_t id = 0;
  double logit = 0, weight = 0;  // weight = exp((logit - largest) / temperature)
};

bool less_likely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit < b.logit : a.id > b.id;
}

void check_finite(std::span<const float> logits) {
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (!std::isfinite(logits[id])) {
      throw ConfigError(
          fmt::format("the logit of token id {} is {}, so no next token can be chosen: the weights are damaged, or the "
                      "model's activations overflow",
                      id, logits[id]));
    }
  }
}

std::int32_t most_likely(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());  // the first
}

// Leaves the tokens that survive top-k and then top-p, in no particular order.
void cut(std::vector<Candidate>& candidates, const Sampling& sampling) {
  const auto by_id = candidates.size();
  std::size_t keep = sampling.top_k > 0 ? std::min(by_id, static_cast<std::size_t>(sampling.top_k)) : by_id;
  if (keep < by_id) {
    std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(keep) - 1, candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return less_likely(b, a); });
    candidates.resize(keep);
  }
  if (sampling.top_p < 1) {
    double total = 0, held = 0;
    for (const Candidate& candidate : candidates) {
      total += candidate.weight;
    }
    std::make_heap(candidates.begin(), candidates.end(), less_likely);
    auto rest = candidates.end();  // the taken lie behind it
    while (rest != candidates.begin() && held < sampling.top_p * total) {
      std::pop_heap(candidates.begin(), rest, less_likely);
      held += (--rest)->weight;
    }
    candidates.erase(candidates.begin(), rest);
  }
}

std::int32_t draw(std::span<const float> logits, const Sampling& sampling, std::uint64_t step) {
  const double largest = static_cast<double>(logits[static_cast<std::size_t>(most_likely(logits))]);
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const double logit = static_cast<double>(logits[id]);
    candidates.push_back({static_cast<std::int32_t>(id), logit, std::exp((logit - largest) / sampling.temperature)});
  }
  cut(candidates, sampling);
  std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  double total = 0;
  for (const Candidate& candidate : candidates) {
    total += candidate.weight;
  }
  double left = uniform_at(sampling.seed, step) * total;
  const Candidate* chosen = nullptr;
  for (const Candidate& candidate : candidates) {
    if (candidate.weight > 0) {  // rounding may leave a little at the end: then it is the last that can be
      chosen = &candidate;
      if (left < candidate.weight) {
        break;
      }
      left -= candidate.weight;
    }
  }
  return chosen->id;
}

}  // namespace

void check(const Sampling& sampling) {
  if (!(sampling.temperature >= 0) || std::isinf(sampling.temperature)) {
    throw ConfigError(fmt::format("temperature {} is not a number from 0 (greedy) up", sampling.temperature));
  }
  if (!(sampling.top_p > 0) || sampling.top_p > 1) {
    throw ConfigError(fmt::format("top_p {} is outside (0, 1]", sampling.top_p));
  }
  if (sampling.top_k < 0) {
    throw ConfigError(fmt::format("top_k {} is not a count of tokens, 0 (all) or more", sampling.top_k));
  }
}

Choice choose(std::span<const float> logits, const Sampling& sampling, std::uint64_t step) {
  KVREPLAY_CHECK(!logits.empty());
  check(sampling);
  check_finite(logits);
  const std::int32_t id = sampling.temperature > 0 ? draw(logits, sampling, step) : most_likely(logits);
  return {id, log_probability(logits, id)};
}

float log_probability(std::span<const float> logits, std::int32_t id) {
  KVREPLAY_CHECK(id >= 0 && static_cast<std::size_t>(id) < logits.size());
  const double largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) {
    sum += std::exp(static_cast<double>(logit) - largest);
  }
  return static_cast<float>(static_cast<double>(logits[static_cast<std::size_t>(id)]) - largest - std::log(sum));
}

}  // namespace kvreplay
