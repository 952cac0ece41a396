// LongFlow: drop the token whose weighted value is smallest for the current query, one set for all heads of a layer.
#include "policies/last_queries.hpp"
#include "policies/part.hpp"
#include "policies/value_norms.hpp"

namespace kvreplay {
namespace {

class LongFlow final : public Selector {
 public:
  struct Config {
    Norm norm = Norm::l1;
    Tokens obs_window{32, false};
    int kernel = 5;
  };
  static constexpr std::string_view kName = "longflow";
  static constexpr std::string_view kSummary = "attention of the current query times the norm of the value";
  static constexpr std::string_view kPaper = "arXiv:2603.11504";
  static constexpr std::string_view kDeviation =
      "the authors' code; the token in flight takes a slot of theirs, so that their slots are budget + 1; a prompt "
      "over "
      "the budget is cut once by SnapKV with their values";
  static constexpr std::array kParams{
      choice<&Config::norm>("norm", kNorms, "of the value; l1: the paper"),
      number<&Config::obs_window>("obs_window", 1, kUnbounded,
                                  "last prompt queries, which vote on the prompt and whose tokens survive its cut",
                                  Scale::log),
      number<&Config::kernel>("kernel", 1, 1023,
                              "prompt tokens whose votes are averaged, an odd number; 1: no pooling"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) { check_kernel(kName, c.kernel); }

  LongFlow(const Config& config, const SetShape& shape)
      : kernel_(config.kernel),
        obs_window_(std::max(1, config.obs_window.of(shape.budget))),
        norms_(shape, config.norm) {}

  void prefill(const View& view) override { norms_.meet(view); }
  void observe(const View& view) override { norms_.meet(view); }

  void score(const View& view, std::span<float> out) override {
    if (view.at_prefill()) {
      score_prompt(view, out);
      return;
    }
    std::fill(out.begin(), out.end(), 0.0F);
    attn_.resize(out.size());
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      for (int head = 0; head < view.n_heads; ++head) {
        view.head_attention(lane, head, attn_);
        for (std::size_t i = 0; i < out.size(); ++i) {
          const float weighted = attn_[i] * norms_.of(lane, view.pos[i]);
          out[i] = view.group == Reduce::max ? std::max(out[i], weighted) : out[i] + weighted;
        }
      }
    }
    if (view.group == Reduce::mean) {
      const float share = 1.0F / static_cast<float>(view.n_lanes * view.n_heads);
      std::transform(out.begin(), out.end(), out.begin(), [&](float x) { return x * share; });
    }
  }

 private:
  void score_prompt(const View& view, std::span<float> out) const {
    const int voters = std::min<int>(obs_window_, view.prompt_len);
    const Eigen::RowVectorXd mass = reduce_heads(view.group, column_mass_of_set(view, voters));
    const Eigen::Index n = slots_before(view, obs_window_);  // the voters' own columns are gone
    const Eigen::RowVectorXd votes = pool_neighbours(mass.head(n), Pooling::avg, kernel_);
    score_before_window(view, votes, obs_window_, out);
  }

  int kernel_, obs_window_;
  ValueNorms norms_;
  std::vector<float> attn_;  // (n_slots)
};

}  // namespace

extern const PartInfo longflow;
constinit const PartInfo longflow = describe<LongFlow>();

}  // namespace kvreplay
