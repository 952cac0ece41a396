// SnapKV: the prompt's last queries vote on its tokens; votes are pooled so that neighbours stay
// together.
#include "policies/column_mass.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

enum class Pooling { avg, max };
constexpr std::string_view kPoolings[] = {"avg", "max"};

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
      "values of kvpress (the authors' code: preset snapkv-official); decode=grow keeps every "
      "decode token, so that "
      "the budget holds for the prompt alone; decode=evict scores resident keys again with the "
      "last queries";
  static constexpr std::array kParams{
      number<&Config::obs_window>("obs_window", 1, kUnbounded, "last queries, which vote and whose tokens stay",
                                  Scale::log),
      choice<&Config::pooling>("pooling", kPoolings,
                               "avg: mean over the kernel, zeros beyond the ends; max: maximum over it"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens pooled, an odd number; 1: no pooling"),
  };
  static Traits traits(const Config&) { return {.decode = Decode::grow}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.obs_window.percent ? Needs::kAll : c.obs_window.of(0)};
  }
  static void check(const Config& c, int) {
    if (c.kernel % 2 == 0) {
      throw ConfigError("snapkv: kernel=" + std::to_string(c.kernel) +
                        " is even; pooling is centred, so kernel must be odd");
    }
  }

  SnapKv(const Config& config, const SetShape& shape)
      : config_(config), obs_window_(std::max(1, config.obs_window.of(shape.budget))) {}

  void score(const View& view, std::span<float> out) override {
    const Pos first_voter = view.now - obs_window_ + 1;
    Eigen::Index n = 0;  // slots before the window
    while (n < static_cast<Eigen::Index>(out.size()) && view.pos[static_cast<std::size_t>(n)] < first_voter) {
      ++n;
    }
    const MatD votes =
        view.at_prefill() ? column_mass_of_set(view, std::min(obs_window_, view.prompt_len)) : current_votes(view);
    const Eigen::RowVectorXd s = reduce_heads(view.group, pooled(votes.leftCols(n) / obs_window_));
    std::fill(out.begin(), out.end(), n > 0 ? static_cast<float>(s.maxCoeff()) + 1 : 0.0F);
    for (Eigen::Index i = 0; i < n; ++i) {
      out[static_cast<std::size_t>(i)] = static_cast<float>(s[i]);
    }
    protect(view, 0, obs_window_, out);
  }

 private:
  // Rows are heads, columns slots; the window's columns are gone, as in kvpress.
  MatD pooled(const MatD& votes) const {
    const Eigen::Index n = votes.cols(), half = config_.kernel / 2;
    MatD out(votes.rows(), n);
    for (Eigen::Index i = 0; i < n; ++i) {
      const Eigen::Index begin = std::max<Eigen::Index>(0, i - half), end = std::min(n, i + half + 1);
      const auto near = votes.middleCols(begin, end - begin);
      if (config_.pooling == Pooling::max) {
        out.col(i) = near.rowwise().maxCoeff();
      } else {
        out.col(i) = near.rowwise().sum() / config_.kernel;
      }
    }
    return out;
  }

  // What column_mass gives at the prompt's end, from the keys that are resident now: (n_lanes *
  // n_heads, n_slots).
  MatD current_votes(const View& view) const {
    const int n = static_cast<int>(view.pos.size()), heads = view.n_heads;
    MatD votes = MatD::Zero(view.n_lanes * heads, n);
    MatF k(n, view.head_dim);
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      for (int i = 0; i < n; ++i) {
        k.row(i) = view.key(lane, i);
      }
      const MatF q = view.queries(lane, obs_window_);
      MatF attn = q * k.transpose();  // (voters * n_heads, n_slots)
      const int voters = static_cast<int>(q.rows()) / heads;
      for (int r = 0; r < attn.rows(); ++r) {
        int past = n;  // slots that this voter can see
        while (past > 0 && view.pos[static_cast<std::size_t>(past - 1)] > view.now - voters + 1 + r / heads) {
          --past;
        }
        if (past == 0) {
          continue;
        }
        auto row = attn.row(r).head(past);
        row = (row.array() - row.maxCoeff()).exp();
        votes.row(lane * heads + r % heads).head(past) += row.cast<double>() / row.cast<double>().sum();
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
