// SelKV's selection: window attention times the value's length, pooled; what any KV head wants is ranked by the heads'
// mean.
#include <numeric>

#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/rewrite/merge.hpp"

namespace kvreplay {
namespace {

class SelKvScore final : public Selector {
 public:
  struct Config {
    int obs_window = 32;
    int kernel = 5;
    Tokens window{16, false};
  };
  static constexpr std::string_view kName = "selkv_score";
  static constexpr std::string_view kSummary = "window attention times the value's length, pooled, shared by KV heads";
  static constexpr std::string_view kPaper = "arXiv:2607.16213";
  static constexpr std::string_view kDeviation =
      "after an independent port, there being no code; with decode=evict the current queries' attention ranks";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, 65536, "last prompt queries, whose attention counts", Scale::log),
      number<&Config::kernel>("kernel", 1, 1023,
                              "tokens averaged, an odd number, zeros beyond the ends; 1: no pooling"),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens, never evicted", Scale::log),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .decode = Decode::grow}; }
  static Needs needs(const Config& c) { return {.prompt_queries = c.obs_window}; }
  static void check(const Config& c, int) {
    if (c.kernel % 2 == 0) {
      throw ConfigError("selkv_score: kernel=" + std::to_string(c.kernel) +
                        " is even; pooling is centred, so kernel must be odd");
    }
  }

  SelKvScore(const Config& config, const SetShape& shape) : config_(config), window_(config.window.of(shape.budget)) {}

  void score(const View& view, std::span<float> out) override {
    const auto n = static_cast<Eigen::Index>(out.size());
    const int window = std::min(window_, view.budget);
    const Eigen::Index n_old = std::max<Eigen::Index>(0, n - window),
                       n_wanted = std::min<Eigen::Index>(n_old, view.budget - window);
    Eigen::RowVectorXd mean = Eigen::RowVectorXd::Zero(n);
    std::vector<char> wanted(out.size(), 0);  // by some head
    std::vector<Eigen::Index> order(static_cast<std::size_t>(n_old));
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      const Eigen::RowVectorXd c = contribution(view, lane);
      mean += c / view.n_lanes;
      std::iota(order.begin(), order.end(), 0);
      std::nth_element(order.begin(), order.begin() + n_wanted, order.end(),
                       [&](auto a, auto b) { return c[a] != c[b] ? c[a] > c[b] : a > b; });
      for (Eigen::Index i = 0; i < n_wanted; ++i) {
        wanted[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = 1;
      }
    }
    const double below = mean.maxCoeff() + 1;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double m = mean[static_cast<Eigen::Index>(i)];
      out[i] = static_cast<float>(wanted[i] ? m : m - below);
    }
    protect(view, 0, window_, out);
  }

 private:
  // Of each slot in one lane: (n_slots).
  Eigen::RowVectorXd contribution(const View& view, int lane) {
    const auto n = static_cast<Eigen::Index>(view.pos.size());
    Eigen::RowVectorXd a(n);
    if (view.at_prefill()) {
      a = reduce_heads(view.group, view.column_mass(lane, config_.obs_window));
    } else {
      lane_attention(view, lane, attn_);
      a = VecF(attn_.data(), n).cast<double>().transpose();
    }
    for (Eigen::Index i = 0; i < n; ++i) {
      a[i] *= static_cast<double>(view.value(lane, static_cast<int>(i)).norm());
    }
    Eigen::RowVectorXd pooled(n);
    const Eigen::Index half = config_.kernel / 2;
    for (Eigen::Index i = 0; i < n; ++i) {
      const Eigen::Index begin = std::max<Eigen::Index>(0, i - half), end = std::min(n, i + half + 1);
      pooled[i] = a.segment(begin, end - begin).sum() / config_.kernel;
    }
    return pooled;
  }

  Config config_;
  int window_;
  std::vector<float> attn_;  // (n_slots)
};

}  // namespace

extern const PartInfo selkv_score;
constinit const PartInfo selkv_score = describe<SelKvScore>();

}  // namespace kvreplay
