#include "trace_capture/rope.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

// theta^(-2i / head_dim), rounded to float32 step by step as the models were trained and transformers computes it: at
// token 2000, what float32 rounds off turns a key by 1e-4.
std::vector<double> base_frequencies(double theta, int head_dim) {
  std::vector<double> out(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    out[i] = static_cast<double>(1 / static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
  return out;
}

int original_positions(const RopeConfig& config, int max_positions) {
  return config.original_max_positions > 0 ? config.original_max_positions : max_positions;
}

// NTK-aware scaling: beyond the context the base grows with the length.
double dynamic_theta(const RopeConfig& config, int head_dim, int max_positions, int n_tokens) {
  const double ratio = static_cast<double>(std::max(n_tokens, max_positions)) / max_positions;
  return config.theta * std::pow(config.factor * ratio - (config.factor - 1), head_dim / (head_dim - 2.0));
}

// Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended.
void scale_llama3(const RopeConfig& config, int max_positions, std::vector<double>& inv_freq) {
  const double context = original_positions(config, max_positions);
  for (double& f : inv_freq) {
    const double turns = context * f / kTwoPi;  // within the original context
    const double keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
    f *= std::lerp(1 / config.factor, 1.0, std::clamp(keep, 0.0, 1.0));
  }
}

// YaRN (arXiv:2309.00071, equations 17 to 19 and 22): frequencies that turn more than beta_fast times within the
// original context are kept, those that turn less than beta_slow times slowed by `factor`, a linear ramp between.
void scale_yarn(const RopeConfig& config, int head_dim, int max_positions, std::vector<double>& inv_freq) {
  const double context = original_positions(config, max_positions);
  const auto dimension_of = [&](double turns) {
    return head_dim * std::log(context / (turns * kTwoPi)) / (2 * std::log(config.theta));
  };
  double low = dimension_of(config.beta_fast), high = dimension_of(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) {
    high += 0.001;  // a step instead of a ramp
  }
  for (std::size_t i = 0; i < inv_freq.size(); ++i) {
    const double slowed = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inv_freq[i] *= std::lerp(1.0, 1 / config.factor, slowed);
  }
}

double yarn_attention_factor(const RopeConfig& config) {
  const auto temperature = [&](double mscale) {
    return config.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(config.factor) + 1;
  };
  if (config.attention_factor) {
    return *config.attention_factor;
  }
  const double mscale = config.mscale.value_or(0), all_dim = config.mscale_all_dim.value_or(0);
  return mscale != 0 && all_dim != 0 ? temperature(mscale) / temperature(all_dim) : temperature(1);
}

}  // namespace

RopeTable rope_table(const RopeConfig& config, int head_dim, int max_positions, int n_tokens) {
  const bool dynamic = config.type == "dynamic";
  RopeTable table;
  table.inv_freq =
      base_frequencies(dynamic ? dynamic_theta(config, head_dim, max_positions, n_tokens) : config.theta, head_dim);
  if (config.type == "linear") {
    for (double& f : table.inv_freq) {
      f /= config.factor;
    }
  } else if (config.type == "llama3") {
    scale_llama3(config, max_positions, table.inv_freq);
  } else if (config.type == "yarn") {
    scale_yarn(config, head_dim, max_positions, table.inv_freq);
    table.attention_factor = yarn_attention_factor(config);
  } else {
    KVREPLAY_CHECK(dynamic || config.type == "default");
  }
  for (double& f : table.inv_freq) {
    f = static_cast<double>(static_cast<float>(f));
  }
  return table;
}

bool rope_is_fixed(const RopeConfig& config, int max_positions, int n_tokens) {
  return config.type != "dynamic" || n_tokens <= max_positions || config.factor == 1;
}

}  // namespace kvreplay
