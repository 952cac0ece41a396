// MomentKV's correction: the evicted output to first order in the query, v_mean + C q, with the
// mass n exp(q . k_mean) (arXiv:2606.01563, eq. 9 and 11). Exact for one token, equal keys, and in
// direction for Gaussian keys and values.
#include "policies/moments.hpp"

#include <Eigen/Core>
#include <limits>
#include <optional>

#include "policies/part.hpp"

namespace kvreplay {
namespace {

// The paper's state as it says to keep it: count, sum of k, of v and of v k^T, rounded to 16 bit
// after every update; the centred scatter is recovered as a difference.
template <class Half>
class RawSums {
 public:
  RawSums(int head_dim, int v_head_dim, bool round_count)
      : round_count_(round_count),
        k_(Eigen::VectorXf::Zero(head_dim)),
        v_(Eigen::VectorXf::Zero(v_head_dim)),
        vk_(MatF::Zero(v_head_dim, head_dim)) {}

  void add(const Loss& x) {
    const VecF k(x.k, k_.size()), v(x.v, v_.size());
    n_ = round_count_ ? static_cast<float>(static_cast<Half>(n_ + 1)) : n_ + 1;
    k_ = (k_ + k).cast<Half>().template cast<float>();
    v_ = (v_ + v).cast<Half>().template cast<float>();
    for (Eigen::Index a = 0; a < v_.size(); ++a) {
      vk_.row(a) = (vk_.row(a) + v[a] * k.transpose()).template cast<Half>().template cast<float>();
    }
  }
  // q: (heads, head_dim) of one step.
  void estimate(const Eigen::Ref<const MatF>& q, Eigen::Ref<Eigen::ArrayXd> log_mass, Eigen::Ref<MatD> value) const {
    if (n_ == 0) {
      log_mass.setConstant(-std::numeric_limits<double>::infinity());
      value.setZero();
      return;
    }
    constexpr float kClamp = 1e-6F;  // the paper's tau
    MatF scatter = vk_;
    scatter.noalias() -= v_ / n_ * k_.transpose();
    scatter = (scatter.array().abs() < kClamp).select(0.0F, scatter);
    log_mass = std::log(n_) + (q * (k_ / n_)).array().cast<double>();
    value = (q * scatter.transpose() / n_).cast<double>();
    value.rowwise() += (v_ / n_).transpose().cast<double>();
  }

 private:
  bool round_count_;
  float n_ = 0;
  Eigen::VectorXf k_, v_;  // (head_dim), (v_head_dim)
  MatF vk_;                // (v_head_dim, head_dim)
};

class FirstOrder final : public Compensator {
 public:
  enum class State { float32, raw_fp16, raw_bf16 };
  struct Config {
    State state = State::float32;
    bool round_count = false;
  };
  static constexpr std::string_view kStates[] = {"float32", "raw_fp16", "raw_bf16"};
  static constexpr std::string_view kName = "moments";
  static constexpr std::string_view kSummary = "first-order evicted output v_mean + C q, mass n exp(q . mean key)";
  static constexpr std::string_view kPaper = "arXiv:2606.01563";
  static constexpr std::string_view kDeviation =
      "The state is centred and float32. The paper keeps raw sums in the cache's 16-bit type and "
      "recovers the scatter as a difference, which loses it when keys have a large mean; "
      "state=raw_fp16 and raw_bf16 do that, with the paper's clamp of 1e-6. Keys are taken as "
      "they enter attention; the paper does not say.";
  static constexpr std::array kParams = {
      choice<&Config::state>("state", kStates, "float32: centred; raw_fp16, raw_bf16: the paper's raw sums"),
      flag<&Config::round_count>("round_count", "with a raw state, count in 16 bit too (bf16 stops at 256)"),
  };
  static void check(const Config& config, int /*budget*/) {
    if (config.round_count && config.state == State::float32) {
      throw ConfigError("moments: round_count=1 needs state=raw_fp16 or raw_bf16, but state is float32");
    }
  }

  FirstOrder(const Config& config, const SetShape& shape) : config_(config) {
    const double numbers =
        static_cast<double>(shape.head_dim) * shape.v_head_dim + shape.head_dim + shape.v_head_dim + 1;
    state_bytes_ = numbers * (config.state == State::float32 ? 4 : 2);
    if (config.state == State::raw_fp16) {
      fp16_.emplace(shape.head_dim, shape.v_head_dim, config.round_count);
    } else if (config.state == State::raw_bf16) {
      bf16_.emplace(shape.head_dim, shape.v_head_dim, config.round_count);
    }
  }

  MomentNeeds needs() const override { return {.tilt = config_.state == State::float32}; }
  void estimate(const EvictedBlock& block, Estimate& out) override {
    if (fp16_) {
      walk(*fp16_, block, out);
    } else if (bf16_) {
      walk(*bf16_, block, out);
    } else {
      const MomentRows& m = block.moments;
      out.log_mass = (m.n > 0).select(m.n.max(1).log() + m.mean_logit, -std::numeric_limits<double>::infinity());
      out.value = m.v_mean + m.tilt;
    }
  }
  double state_bytes() const override { return state_bytes_; }

 private:
  template <class Half>
  static void walk(RawSums<Half>& sums, const EvictedBlock& block, Estimate& out) {
    const Eigen::Index rows = block.q.rows(), heads = block.n_heads;
    out.log_mass.resize(rows);
    out.value.resize(rows, block.moments.v_mean.cols());
    std::size_t joined = 0;
    for (Eigen::Index r = 0; r < rows; r += heads) {
      for (; joined < block.losses.size() && block.losses[joined].step <= r / heads; ++joined) {
        sums.add(block.losses[joined]);
      }
      sums.estimate(block.q.middleRows(r, heads), out.log_mass.segment(r, heads), out.value.middleRows(r, heads));
    }
    for (; joined < block.losses.size(); ++joined) {  // only the next block misses these
      sums.add(block.losses[joined]);
    }
  }

  Config config_;
  double state_bytes_ = 0;
  std::optional<RawSums<Eigen::half>> fp16_;
  std::optional<RawSums<Eigen::bfloat16>> bf16_;
};

}  // namespace

extern const PartInfo moments;
constinit const PartInfo moments = describe<FirstOrder>();

}  // namespace kvreplay
