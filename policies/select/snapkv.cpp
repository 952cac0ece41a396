// SnapKV: the prompt's last queries vote on its tokens; votes are pooled so that neighbours stay
// together.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class SnapKv final : public Selector {
 public:
  struct Config {
    Tokens obs_window{64, false};
    Pooling pooling = Pooling::avg;
    int kernel = 5;
  };
  static constexpr std::string_view kName = "snapkv";
  static constexpr std::string_view kSummary = "pooled attention of the last prompt queries, whose own tokens stay";
  static constexpr std::string_view kPaper = "arXiv:2404.14469";
  static constexpr std::string_view kDeviation =
      "values of kvpress (the authors' code: preset snapkv-official); decode=grow keeps every decode token, so that "
      "the "
      "budget holds for the prompt alone; decode=evict scores resident keys again with the last queries: presets "
      "snapkv-kvpress, snapkv-rkv and snapkv-gkv are what codes for decoding call SnapKV, and VaSE's with a buffer of "
      "B "
      "is obs_window=B,interval=B,kernel=1,decode=evict";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries, which vote and whose tokens stay",
                                  Scale::log),
      choice<&Config::pooling>("pooling", kPoolings,
                               "avg: mean over the kernel, zeros beyond the ends; max: maximum over it; none"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens pooled, an odd number; 1: no pooling"),
  };
  static Traits traits(const Config&) { return {.decode = Decode::grow}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) { check_kernel(kName, c.kernel); }

  SnapKv(const Config& config, const SetShape& shape)
      : config_(config), obs_window_(std::max(1, config.obs_window.of(shape.budget))) {}

  void score(const View& view, std::span<float> out) override {
    const Eigen::Index n = slots_before(view, obs_window_);
    const MatD votes =
        view.at_prefill() ? column_mass_of_set(view, std::min(obs_window_, view.prompt_len)) : current_votes(view);
    const MatD means = votes.leftCols(n) / obs_window_;
    const Eigen::RowVectorXd s = reduce_heads(view.group, pool_neighbours(means, config_.pooling, config_.kernel));
    score_before_window(view, s, obs_window_, out);
  }

 private:
  // What column_mass gives at the prompt's end, from the keys that are resident now: (n_lanes * n_heads, n_slots).
  MatD current_votes(const View& view) const {
    MatD votes = MatD::Zero(view.n_lanes * view.n_heads, static_cast<Eigen::Index>(view.pos.size()));
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      const MatD attn = last_attention(view, lane, obs_window_);
      for (Eigen::Index r = 0; r < attn.rows(); ++r) {
        votes.row(lane * view.n_heads + r % view.n_heads) += attn.row(r);
      }
    }
    return votes;
  }

  Config config_;
  int obs_window_;
};

}  // namespace

extern const PartInfo snapkv;
constinit const PartInfo snapkv = describe<SnapKv>();

}  // namespace kvreplay
