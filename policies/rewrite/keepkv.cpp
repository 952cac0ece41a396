// KeepKV: a token that leaves is merged into the survivor of most similar key, and votes on the logit and a rescaled
// key keep their common mass and output as the query that scored them saw it.
#include <limits>

#include "policies/part.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

enum class Variant { paper_zip, official_convex_votes, soft_votes, additive };
constexpr std::string_view kVariants[] = {"paper_zip", "official_convex_votes", "soft_votes", "additive"};
enum class Domain { exp_logit, attention_prob };
constexpr std::string_view kDomains[] = {"exp_logit", "attention_prob"};
enum class Correction { by_weight_sum, as_written };
constexpr std::string_view kCorrections[] = {"by_weight_sum", "as_written"};

constexpr double kNever = -std::numeric_limits<double>::infinity();

double log_add(double a, double b) {
  const double top = std::max(a, b);
  return top == kNever ? kNever : top + std::log1p(std::exp(std::min(a, b) - top));
}
double log_sum(const Eigen::ArrayXd& x) {
  const double top = x.maxCoeff();
  return top == kNever ? kNever : top + std::log((x - top).exp().sum());
}

class KeepKv final : public Rewriter {
 public:
  struct Config {
    Variant variant = Variant::paper_zip;
    double threshold = 0.8;
    double alpha = 0.9;
    int window = 32;
    Domain domain = Domain::exp_logit;
    Correction correction = Correction::by_weight_sum;
    double lambda_max = kUnbounded;
    double ridge = 1e-6;
  };
  static constexpr std::string_view kName = "keepkv";
  static constexpr std::string_view kSummary =
      "merges into the most similar survivor with votes on its logit, losing nothing for the query that scored them";
  static constexpr std::string_view kPaper = "arXiv:2504.09936";
  static constexpr std::string_view kDeviation =
      "paper_zip is the paper's operator, official_convex_votes what the released code stores, soft_votes and "
      "additive exact operators of ours; alpha and window are an independent port's, since no text reached gives "
      "them; with several query heads per KV head scores are the heads' mean, so that nothing is exact for each "
      "(additive: the mass is); the released code's windowed scores and the periodic rebuild from a full cache are "
      "not built; a logit soft-cap is not inverted";
  static constexpr std::array kParams{
      choice<&Config::variant>("variant", kVariants,
                               "paper_zip: convex key rescaled in log space; official_convex_votes: convex key, votes "
                               "added; soft_votes: key stays, bias ln of the mass gained; additive: convex key moved "
                               "along the current queries until their masses agree"),
      number<&Config::threshold>("threshold", -1, 1, "least cosine of the keys for a merge"),
      number<&Config::alpha>("alpha", 0, 0.9999, "decay of the scores' average; 0: the current query alone",
                             Scale::one_minus),
      number<&Config::window>("window", 0, 65536, "prompt queries before the last that the average begins with",
                              Scale::log),
      choice<&Config::domain>("ema_domain", kDomains,
                              "what is averaged: exp of the logit, as the paper, or the attention (soft_votes alone)"),
      choice<&Config::correction>("ema_correction", kCorrections,
                                  "divide the average by the weights that went into it, or by 1 - alpha^t as printed"),
      number<&Config::lambda_max>("lambda_max", 1, kUnbounded,
                                  "paper_zip: beyond this factor on the key, merge as soft_votes does (the paper has "
                                  "no limit)",
                                  Scale::log),
      number<&Config::ridge>("ridge", 0, 1,
                             "additive: share of the mean squared query length that bounds how far a key moves",
                             Scale::log),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = n_queries(c)}; }
  static void check(const Config& c, int) {
    if (c.domain == Domain::attention_prob && c.variant != Variant::soft_votes) {
      throw ConfigError(
          "keepkv: ema_domain=attention_prob has no unnormalised scores, which all variants but variant=soft_votes "
          "need");
    }
  }

  KeepKv(const Config& config, const SetShape& shape)
      : config_(config),
        element_bytes_(shape.element_bytes),
        remembers_(config.alpha > 0 || config.domain == Domain::attention_prob),
        lanes_(static_cast<std::size_t>(shape.n_lanes)) {
    for (Lane& lane : lanes_) {
      lane.log_score.assign(static_cast<std::size_t>(shape.n_tokens), kNever);
      lane.weight.assign(lane.log_score.size(), 0);
      lane.bias.assign(lane.log_score.size(), 0);
    }
  }

  void step(Cache& cache) override { meet(cache); }

  void evicted(Cache& cache, std::span<const int> leaving) override {
    meet(cache);
    const std::vector<int> staying = staying_slots(cache, leaving);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const std::vector<Nearest> near = nearest_slots(cache, lane, leaving, staying);
      std::map<int, std::vector<int>> merges;  // the target and those that go into it, by target
      for (std::size_t i = 0; i < leaving.size(); ++i) {
        if (near[i].slot >= 0 && near[i].cosine >= config_.threshold) {
          merges.try_emplace(near[i].slot, 1, near[i].slot).first->second.push_back(leaving[i]);
        }
      }
      for (const auto& [target, members] : merges) {
        merge(cache, lane, members);
      }
    }
  }

 private:
  struct Lane {                     // by position: (n_tokens)
    std::vector<double> log_score;  // ln of the decayed sum of scores
    std::vector<double> weight;     // of the queries in that sum
    std::vector<double> bias;       // of the slot as stored
  };
  static int n_queries(const Config& c) { return c.alpha > 0 ? c.window + 1 : 1; }
  static std::size_t at(const View& view, int slot) {
    return static_cast<std::size_t>(view.pos[static_cast<std::size_t>(slot)]);
  }

  // members[0] stays and takes in the others.
  void merge(Cache& cache, int lane, const std::vector<int>& members) {
    Lane& state = lanes_[static_cast<std::size_t>(lane)];
    const auto n = static_cast<Eigen::Index>(members.size());
    Eigen::ArrayXd logit(n), bias(n);
    MatD k(n, cache.head_dim), v(n, cache.v_head_dim);
    for (Eigen::Index i = 0; i < n; ++i) {
      const int slot = members[static_cast<std::size_t>(i)];
      logit[i] = remembers_ ? state.log_score[at(cache, slot)] - log_norm(state, cache, slot)
                            : current_score(cache, lane, slot);
      bias[i] = static_cast<double>(cache.bias(lane, slot));
      k.row(i) = cache.key(lane, slot).cast<double>();
      v.row(i) = cache.value(lane, slot).cast<double>();
    }
    if (logit.maxCoeff() == kNever) {  // nobody looked at any of them
      logit.setZero();
    }
    const double mass = log_sum(bias + logit), votes = log_sum(bias);
    const Eigen::VectorXd share = (bias + logit - mass).exp();
    const Eigen::VectorXd convex = k.transpose() * share;
    const double tau = mass - votes, mean = share.dot(logit.matrix());

    Variant variant = config_.variant;
    const double lambda = tau / mean;
    if (variant == Variant::paper_zip && (std::abs(mean) < kSmallMean || !(std::abs(lambda) <= config_.lambda_max))) {
      variant = Variant::soft_votes;
    }
    Eigen::VectorXd key = convex;
    double new_bias = votes;
    switch (variant) {
      case Variant::paper_zip:
        key *= lambda;
        break;
      case Variant::official_convex_votes:
        break;
      case Variant::soft_votes:
        key = k.row(0);
        new_bias = mass - logit[0];
        break;
      case Variant::additive:
        key += towards_masses(cache.queries(lane, 1).cast<double>(), k, bias, convex, votes);
        break;
    }
    const int target = members[0];
    const std::size_t pos = at(cache, target);
    state.bias[pos] = new_bias;
    if (remembers_ && variant != Variant::soft_votes) {  // a key that stays keeps its score
      state.log_score[pos] = tau + log_norm(state, cache, target);
    }
    store_merged(cache, lane, target, key.cast<float>(), (v.transpose() * share).cast<float>(),
                 static_cast<float>(new_bias), element_bytes_);
  }

  // The smallest move of the key after which every current query sees the members' mass, up to the ridge.
  Eigen::VectorXd towards_masses(const MatD& q, const MatD& k, const Eigen::ArrayXd& bias, const Eigen::VectorXd& base,
                                 double votes) const {
    Eigen::VectorXd lack(q.rows());
    for (Eigen::Index r = 0; r < q.rows(); ++r) {
      lack[r] = log_sum(bias + (k * q.row(r).transpose()).array()) - votes - q.row(r).dot(base);
    }
    MatD gram = q * q.transpose();
    gram.diagonal().array() += config_.ridge * gram.trace() / static_cast<double>(q.rows());
    return q.transpose() * gram.completeOrthogonalDecomposition().solve(lack);
  }

  double log_norm(const Lane& state, const View& view, int slot) const {
    return std::log(config_.correction == Correction::by_weight_sum ? state.weight[at(view, slot)]
                                                                    : 1 - std::pow(config_.alpha, view.now + 1));
  }
  // ln of the mean of exp(logit) over the current queries.
  static double current_score(const View& view, int lane, int slot) {
    const Eigen::VectorXd logits = view.queries(lane, 1).cast<double>() * view.key(lane, slot).cast<double>();
    return log_sum(logits.array()) - std::log(view.n_heads);
  }

  // Once per step, before a slot is rewritten.
  void meet(const View& view) {
    if (view.now == now_ || view.pos.empty() || !remembers_) {
      return;
    }
    now_ = view.now;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      if (view.at_prefill()) {
        begin(view, lane, lanes_[static_cast<std::size_t>(lane)]);
      } else {
        observe(view, lane, lanes_[static_cast<std::size_t>(lane)]);
      }
    }
  }

  // From the last prompt queries, each token by those that could see it.
  void begin(const View& view, int lane, Lane& state) const {
    const MatF q = view.queries(lane, n_queries(config_));
    const auto n = static_cast<Eigen::Index>(view.pos.size());
    const Eigen::Index n_past = q.rows() / view.n_heads;
    MatD k(n, view.head_dim);  // in double: the key's factor divides by what may be a small difference of logits
    for (Eigen::Index i = 0; i < n; ++i) {
      k.row(i) = view.key(lane, static_cast<int>(i)).cast<double>();
    }
    MatD logits = q.cast<double>() * k.transpose();
    for (Eigen::Index r = 0; r < logits.rows(); ++r) {
      const Eigen::Index back = n_past - 1 - r / view.n_heads;  // queries since this one
      auto seen = logits.row(r).head(n - back).array();
      const double weight = (1 - config_.alpha) * std::pow(config_.alpha, static_cast<double>(back));
      const double shift = config_.domain == Domain::attention_prob ? log_sum(seen.transpose()) : 0;
      seen += std::log(weight / view.n_heads) - shift;
      for (Eigen::Index i = 0; i < n - back; ++i) {
        double& score = state.log_score[at(view, static_cast<int>(i))];
        score = log_add(score, logits(r, i));
        state.weight[at(view, static_cast<int>(i))] += weight / view.n_heads;
      }
    }
  }

  // Scores of the current queries from their attention: a logit is ln attention + ln of the sum of all weights - bias,
  // and one dot product says what that sum is.
  void observe(const View& view, int lane, Lane& state) {
    const auto n = static_cast<Eigen::Index>(view.pos.size());
    const MatF q = view.queries(lane, 1);
    sums_.setZero(n);
    attn_.resize(view.pos.size());
    const Eigen::Map<const Eigen::ArrayXf> attn(attn_.data(), n);
    std::vector<double> log_z(static_cast<std::size_t>(view.n_heads)), log_weight(log_z.size(), 0);
    double top = 0;       // of the logarithms that rows are shifted by
    bool unseen = false;  // beside a pinned prompt some head's attention to all slots has underflowed
    const auto logit = [&](int head, int slot) {
      return q.row(head).cast<double>().dot(view.key(lane, slot).cast<double>());
    };
    MatF rows(view.n_heads, n);
    for (int head = 0; head < view.n_heads; ++head) {
      view.head_attention(lane, head, attn_);
      rows.row(head) = attn.matrix().transpose();
      int largest = 0;
      const double most = static_cast<double>(attn.maxCoeff(&largest));
      const auto h = static_cast<std::size_t>(head);
      log_z[h] = logit(head, largest) + state.bias[at(view, largest)] - std::log(most);
      unseen = unseen || most <= 0;
      log_weight[h] = config_.domain == Domain::exp_logit && most > 0 ? log_z[h] : 0;
      top = head == 0 ? log_weight[h] : std::max(top, log_weight[h]);
    }
    for (int head = 0; head < view.n_heads; ++head) {
      sums_ += std::exp(log_weight[static_cast<std::size_t>(head)] - top) *
               rows.row(head).transpose().array().cast<double>();
    }
    const double log_heads = std::log(view.n_heads), keep = std::log(config_.alpha), add = std::log1p(-config_.alpha);
    for (int i = 0; i < n; ++i) {
      const std::size_t pos = at(view, i);
      double score = std::log(sums_[i]) + top - state.bias[pos];
      if (sums_[i] < kUnderflow || (unseen && config_.domain == Domain::exp_logit)) {
        score = kNever;
        for (int head = 0; head < view.n_heads; ++head) {
          const auto h = static_cast<std::size_t>(head);
          const double shift = config_.domain == Domain::exp_logit ? 0 : log_z[h];
          score = log_add(score, logit(head, i) - shift);
        }
      }
      state.log_score[pos] = log_add(keep + state.log_score[pos], add + score - log_heads);
      state.weight[pos] = config_.alpha * state.weight[pos] + (1 - config_.alpha);
    }
  }

  static constexpr double kSmallMean = 1e-6, kUnderflow = 1e-30;
  Config config_;
  int element_bytes_;
  bool remembers_;  // else the current queries say all, as one dot product for each slot that merges
  Pos now_ = -1;
  std::vector<Lane> lanes_;
  std::vector<float> attn_;  // (n_slots)
  Eigen::ArrayXd sums_;      // (n_slots) weighted attention, summed over the heads
};

}  // namespace

extern const PartInfo keepkv;
constinit const PartInfo keepkv = describe<KeepKv>();

}  // namespace kvreplay
