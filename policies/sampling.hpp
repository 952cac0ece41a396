// Chances to be kept, which a sampling selector draws by and a rewriter makes up for. Both hold one Sampler with the
// same settings and come to the same chances.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "policies/column_mass.hpp"
#include "policies/params.hpp"
#include "policies/prompt_fit.hpp"

namespace kvreplay {

struct SamplingConfig {
  int sink = 4;
  int window = 32;
  int obs_window = 32;
};

class Sampler {
 public:
  Sampler(const SamplingConfig& config, Pos n_tokens)
      : config_(config), log_votes_(static_cast<std::size_t>(n_tokens), 0.0) {}

  // For each slot, its chance to be kept: 1 for the first and the latest tokens, min(1, m a_i / sum a) for the others,
  // with a their attention from the latest queries and m what the budget leaves to them. Sinks and windows never exceed
  // the budget.
  std::vector<double> chances(const View& view) const {
    constexpr double kLeast = 1e-6;
    const std::size_t n = view.pos.size();
    std::vector<double> chance(n, 1);
    if (static_cast<int>(n) <= view.budget) {
      return chance;
    }
    const int sink = std::min(config_.sink, view.budget), window = std::min(config_.window, view.budget - sink);
    std::vector<std::size_t> others;
    for (std::size_t i = 0; i < n; ++i) {
      if (view.pos[i] >= sink && view.pos[i] <= view.now - window) {
        others.push_back(i);
      }
    }
    const Eigen::ArrayXd attention = attention_of(view);
    double sum = 0;
    for (const std::size_t i : others) {
      sum += attention[static_cast<Eigen::Index>(i)];
    }
    const double m = std::max(0, view.budget - static_cast<int>(n - others.size()));
    for (const std::size_t i : others) {
      const double share =
          sum > 0 ? attention[static_cast<Eigen::Index>(i)] / sum : 1.0 / static_cast<double>(others.size());
      chance[i] = std::clamp(m * share, kLeast, 1.0);
    }
    return chance;
  }

  // ln of what a kept token now stands for, after it survived a draw with this chance.
  double survive(Pos pos, double chance) { return log_votes_[static_cast<std::size_t>(pos)] -= std::log(chance); }

 private:
  // Of the slots, from the latest queries, with the votes they have: (n_slots).
  Eigen::ArrayXd attention_of(const View& view) const {
    MatD mass(view.n_lanes * view.n_heads, static_cast<Eigen::Index>(view.pos.size()));
    mass.setZero();
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      MatD logits = fit_rows(view, lane, config_.obs_window).logits;
      for (Eigen::Index i = 0; i < logits.cols(); ++i) {
        logits.col(i).array() += log_votes_[static_cast<std::size_t>(view.pos[static_cast<std::size_t>(i)])];
      }
      if (logits.rows() == 0) {
        continue;
      }
      const MatD attn = softmax_rows(logits);
      const Eigen::Index heads = view.n_heads;
      for (Eigen::Index r = 0; r < attn.rows(); ++r) {
        mass.row(lane * heads + r % heads) += attn.row(r);
      }
    }
    return reduce_heads(view.group, mass).transpose().array();
  }

  SamplingConfig config_;
  std::vector<double> log_votes_;  // (n_tokens)
};

template <class Config>
constexpr std::array<ParamInfo, 3> sampling_params() {
  return {number<&Config::sink>("sink", 0, kUnbounded, "first tokens, kept for certain", Scale::log),
          number<&Config::window>("window", 0, kUnbounded, "latest tokens, kept for certain", Scale::log),
          number<&Config::obs_window>("obs_window", 1, kUnbounded,
                                      "last queries whose attention makes the chances; not in the paper", Scale::log)};
}

}  // namespace kvreplay
