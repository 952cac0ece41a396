// RPC: after every P decode tokens the latest queries compress the reasoning so far; what stays grows by P / ratio.
#include "policies/column_mass.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/votes.hpp"

namespace kvreplay {
namespace {

class Rpc final : public Selector {
 public:
  struct Config {
    Tokens obs_window{32, false};
    int ratio = 4;
    int kernel = 7;
    bool repeat_newest = true;
  };
  static constexpr std::string_view kName = "rpc";
  static constexpr std::string_view kSummary = "periodic compression of the decode tokens to a share that grows";
  static constexpr std::string_view kPaper = "arXiv:2505.13866";
  static constexpr std::string_view kDeviation =
      "the authors' code; it has no fixed budget: budget is its P (1024 or 4096 in the paper), and n compressions "
      "leave "
      "n * P / ratio + obs_window decode tokens, which then grow by P; scope=kv_head is its aggregation by group";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries, which vote and whose tokens stay",
                                  Scale::log),
      number<&Config::ratio>("ratio", 1, 1024, "of each P decode tokens, P / ratio stay; 1: all"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens whose votes are averaged, an odd number; 1: no pooling"),
      flag<&Config::repeat_newest>("repeat_newest",
                                   "the newest query votes twice and the window's oldest not at all, as the authors' "
                                   "list of queries has it; false: each query once"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .pool = Pool::decode}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) { check_odd_kernel(kName, c.kernel); }

  Rpc(const Config& config, const SetShape& shape)
      : config_(config), obs_window_(std::max(1, config.obs_window.of(shape.budget))) {}

  int surplus(const View& view) const override {
    const int kept = n_events_ * share(view) + window(view), n = static_cast<int>(view.pos.size());
    return n >= kept + view.budget ? n - kept - share(view) : 0;
  }

  void score(const View& view, std::span<float> out) override {
    const auto n = static_cast<Eigen::Index>(out.size()) - window(view);
    const bool repeat = config_.repeat_newest && window(view) > 1;
    MatD votes(view.n_lanes * view.n_heads, n);
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      const MatF q = view.queries(lane, window(view) - (repeat ? 1 : 0));
      MatF attn = q * first_keys(view, lane, n).transpose();  // (voters * n_heads, n)
      softmax_rows(attn);
      for (int h = 0; h < view.n_heads; ++h) {
        auto sum = votes.row(lane * view.n_heads + h);
        sum.setZero();
        for (Eigen::Index r = h; r < attn.rows(); r += view.n_heads) {
          const bool newest = r + view.n_heads >= attn.rows();
          sum += (newest && repeat ? 2 : 1) * attn.row(r).cast<double>();
        }
      }
    }
    const Eigen::RowVectorXd s = pooled_mean(reduce_heads(view.group, votes), config_.kernel);
    std::fill(out.begin(), out.end(), std::numeric_limits<float>::infinity());
    std::transform(s.begin(), s.end(), out.begin(), [](double x) { return static_cast<float>(x); });
  }

  void evicted(const View&, std::span<const int>) override { ++n_events_; }

 private:
  int share(const View& view) const { return view.budget / config_.ratio; }
  int window(const View& view) const { return std::min(obs_window_, view.budget); }

  Config config_;
  int obs_window_;
  int n_events_ = 0;
};

}  // namespace

extern const PartInfo rpc;
constinit const PartInfo rpc = describe<Rpc>();

}  // namespace kvreplay
