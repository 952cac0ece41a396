// ResKV's residual entries: the evicted tokens as clusters of keys, each one token with the mass of all its own; a gate
// closes where attention is sharp, and queries of the prompt that were held out say how many entries help.
#include <cmath>
#include <limits>
#include <numeric>

#include "policies/atoms.hpp"
#include "policies/moments.hpp"
#include "policies/part.hpp"
#include "policies/weights.hpp"

namespace kvreplay {
namespace {

class Clusters final : public Compensator {
 public:
  struct Config {
    Tokens entries{20, true};
    bool validate = true;
    int fit = 96;
    int judge = 32;
    double margin = 0.01;
    bool gate = true;
    double threshold = 0.25;
    double sharpness = 12;
    double least_gate = 0;
    int iterations = 4;
    int every = 0;
  };
  static constexpr std::string_view kName = "clusters";
  static constexpr std::string_view kSummary =
      "clusters of evicted keys as entries of the softmax, gated and validated (ResKV)";
  static constexpr std::string_view kPaper = "arXiv:2607.29591";
  static constexpr std::string_view kDeviation =
      "The selector keeps its whole budget and entries come on top (their bytes are counted), where the paper takes "
      "them "
      "out of it; so only their number is chosen, per KV head. Scores and judgement use the last prompt queries as if "
      "they followed the prompt. The paper says nothing about decode: tokens that leave later join the nearest entry; "
      "every clusters all again, from keys that the state does not hold. With nothing to judge by, all entries are on.";
  static constexpr std::array kParams = {
      number<&Config::entries>("entries", 0, kUnbounded, "entries at most; with validate also 1/4, 1/2, 3/4 of them",
                               Scale::log),
      flag<&Config::validate>("validate", "the number of entries with the least error on held-out queries, or none"),
      number<&Config::fit>("fit", 0, 65536,
                           "prompt queries whose attention says where clusters start; 0: evenly spaced", Scale::log),
      number<&Config::judge>("judge", 1, 65536, "last prompt queries, held out to judge", Scale::log),
      number<&Config::margin>("margin", 0, 1, "entries must lower the squared error by this share"),
      flag<&Config::gate>("gate", "entries weigh sigmoid(sharpness (threshold - largest retained probability))"),
      number<&Config::threshold>("threshold", 0, 1, "largest probability at which the gate is half open"),
      number<&Config::sharpness>("sharpness", 0, 1e6, "of the gate, one over its temperature", Scale::log),
      number<&Config::least_gate>("least_gate", 0, 1, "the gate never closes further"),
      number<&Config::iterations>("iterations", 1, 100, "of Lloyd's algorithm"),
      number<&Config::every>("every", 0, kUnbounded, "cluster anew at every so many decode steps; 0: never",
                             Scale::log),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = c.fit + (c.validate ? c.judge : 0)}; }

  Clusters(const Config& config, const SetShape& shape)
      : config_(config),
        head_dim_(shape.head_dim),
        v_head_dim_(shape.v_head_dim),
        entries_(config.entries.of(shape.budget)),
        track_(track(entries_)) {}

  MomentNeeds needs() const override { return {}; }
  bool sees_retained() const override { return config_.gate; }

  void prompt(const PromptCut& cut) override {
    const Eigen::Index n = cut.evicted_k.rows(), heads = cut.n_heads;
    const auto tokens = static_cast<int>(cut.q.rows() / heads);
    if (n == 0 || tokens == 0) {
      return;
    }
    const int judges =
        config_.validate
            ? std::clamp(static_cast<int>(std::int64_t{tokens} * config_.judge / (config_.fit + config_.judge)), 1,
                         config_.judge)
            : 0;
    const MatD fit = cut.q.topRows((tokens - judges) * heads).cast<double>();
    const MatD judge = cut.q.bottomRows(judges * heads).cast<double>();
    std::vector<Pos> best;
    if (fit.rows() > 0 && config_.fit > 0) {
      best = by_attention(cut, fit);
    }
    if (judges > 0) {
      entries_ = most_useful(cut, judge, best);
    }
    track_ = track(entries_);
    track_.start_from(best);
  }

  void estimate(const EvictedBlock& block, Estimate& out) override {
    track_.estimate(block, out);
    if (config_.gate) {
      out.log_mass += log_gate(block.log_retained, block.top_retained);
    }
  }
  double state_bytes() const override { return 4.0 * entries_ * (head_dim_ + v_head_dim_ + 1); }

 private:
  AtomTrack track(int most) const {
    const AtomRule rule{
        .assign = AtomRule::Assign::nearest, .most = most, .iterations = config_.iterations, .every = config_.every};
    return {AtomForm{}, rule, head_dim_, v_head_dim_};
  }

  Eigen::ArrayXd log_gate(const Eigen::ArrayXd& log_retained, const Eigen::ArrayXd& top_retained) const {
    Eigen::ArrayXd gate(log_retained.size());
    for (Eigen::Index r = 0; r < gate.size(); ++r) {
      const double largest = std::isfinite(log_retained[r]) ? std::exp(top_retained[r] - log_retained[r]) : 0;
      const double x = config_.sharpness * (config_.threshold - largest);
      const double open = std::min(0.0, x) - std::log1p(std::exp(-std::abs(x)));  // ln sigmoid(x)
      gate[r] = std::max(open, std::log(config_.least_gate));
    }
    return gate;
  }

  // The evicted in order of the attention that they get from `q`, most first.
  static std::vector<Pos> by_attention(const PromptCut& cut, const MatD& q) {
    MatD retained = q * cut.retained_k.cast<double>().transpose();
    MatD evicted = q * cut.evicted_k.cast<double>().transpose();
    Eigen::ArrayXd top = evicted.rowwise().maxCoeff();
    if (retained.cols() > 0) {
      top = top.max(retained.rowwise().maxCoeff().array());
    }
    exp_rows(retained, top);
    exp_rows(evicted, top);
    const Eigen::VectorXd all = retained.rowwise().sum() + evicted.rowwise().sum();
    const Eigen::VectorXd mass = evicted.transpose() * all.cwiseInverse();
    std::vector<std::size_t> order(cut.evicted.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return mass[static_cast<Eigen::Index>(a)] > mass[static_cast<Eigen::Index>(b)];
    });
    std::vector<Pos> best;
    for (const std::size_t i : order) {
      best.push_back(cut.evicted[i]);
    }
    return best;
  }

  // ln of the attended mass, the largest logit, and the attention output.
  struct Attended {
    Eigen::ArrayXd log_mass, top;  // (rows)
    MatD value;                    // (rows, v_head_dim)
  };
  static Attended attend(const MatD& q, const MatF& k, const MatF& v) {
    Attended a;
    if (k.rows() == 0) {
      a.log_mass = a.top = Eigen::ArrayXd::Constant(q.rows(), -std::numeric_limits<double>::infinity());
      a.value = MatD::Zero(q.rows(), v.cols());
      return a;
    }
    MatD weights = q * k.cast<double>().transpose();
    a.top = weights.rowwise().maxCoeff();
    exp_rows(weights, a.top);
    const Eigen::ArrayXd mass = weights.rowwise().sum();
    a.log_mass = a.top + mass.log();
    a.value = weights * v.cast<double>();
    a.value.array().colwise() /= mass;
    return a;
  }
  // `a` with another softmax over other tokens beside it.
  static MatD merged(const Attended& a, const Eigen::ArrayXd& log_mass, const MatD& value) {
    MatD out(a.value.rows(), a.value.cols());
    for (Eigen::Index r = 0; r < out.rows(); ++r) {
      const double share = std::isfinite(log_mass[r]) ? 1 / (1 + std::exp(a.log_mass[r] - log_mass[r])) : 0;
      out.row(r) = (1 - share) * a.value.row(r) + share * value.row(r);
    }
    return out;
  }

  // Squared output error over the judges decides, by the rule that decode steps use.
  int most_useful(const PromptCut& cut, const MatD& judge, const std::vector<Pos>& best) const {
    const Attended retained = attend(judge, cut.retained_k, cut.retained_v);
    const Attended evicted = attend(judge, cut.evicted_k, cut.evicted_v);
    const MatD full = merged(retained, evicted.log_mass, evicted.value);
    std::vector<Loss> losses;
    for (std::size_t i = 0; i < cut.evicted.size(); ++i) {
      const auto row = static_cast<Eigen::Index>(i);
      losses.push_back({0, cut.evicted_k.row(row).data(), cut.evicted_v.row(row).data(), cut.evicted[i]});
    }
    const MatF q = judge.cast<float>();
    const MomentRows nobody_asked{};
    const EvictedBlock block{q, static_cast<int>(q.rows()), losses, nobody_asked, retained.log_mass, retained.top};
    const double without = (full - retained.value).squaredNorm();
    double least = (1 - config_.margin) * without;
    int chosen = 0;
    for (int quarter = 1; quarter <= 4; ++quarter) {
      const int n = static_cast<int>(std::int64_t{entries_} * quarter / 4);
      if (n == 0) {
        continue;
      }
      AtomTrack candidate = track(n);
      candidate.start_from(best);
      Estimate estimate;
      candidate.estimate(block, estimate);
      if (config_.gate) {
        estimate.log_mass += log_gate(block.log_retained, block.top_retained);
      }
      const double error = (full - merged(retained, estimate.log_mass, estimate.value)).squaredNorm();
      if (error < least) {
        least = error;
        chosen = n;
      }
    }
    return chosen;
  }

  Config config_;
  int head_dim_, v_head_dim_, entries_;
  AtomTrack track_;
};

}  // namespace

extern const PartInfo clusters;
constinit const PartInfo clusters = describe<Clusters>();

}  // namespace kvreplay
