// SALS, scoring: the tokens whose keys, in a few joint directions of all KV heads, agree most with the queries; one
// choice for the whole layer.
#include <complex>
#include <numeric>

#include "policies/part.hpp"
#include "policies/sals.hpp"

namespace kvreplay {
namespace {

enum class Score { shared, exact };
constexpr std::string_view kScores[] = {"shared", "exact"};

class SalsScore final : public Reader {
 public:
  struct Config {
    Score score = Score::shared;
    double rank = 0.25;
    double scoring_rank = 0.5;
    Tokens budget{100, true};
    Tokens sink{16};
    Tokens window{64};
    int dense_first = 2;
    int dense_last = 1;
    bool own_latent = true;
  };
  static constexpr std::string_view kName = "sals_score";
  static constexpr std::string_view kSummary =
      "tokens whose keys agree most with the queries in a few joint directions of all KV heads before RoPE";
  static constexpr std::string_view kPaper = "arXiv:2510.24273";
  static constexpr std::string_view kDeviation =
      "no code of the authors is public; directions come from the kept tokens of the trace's own prompt instead of a "
      "text corpus, and are fewer where the prompt spans fewer; the 12.5% setting is rank=0.125; how many tokens are "
      "critical is not said (about an eighth of the sequence in all): the budget says it, sinks and window included; a "
      "group's queries are averaged; score=exact is no part of the paper";
  static constexpr bool kAcrossHeads = true;
  static constexpr std::array kParams{
      choice<&Config::score>("score", kScores,
                             "shared: a sum over heads of logits without positions; exact: with them, from directions "
                             "per RoPE frequency, as many numbers per token"),
      number<&Config::rank>("rank", 0, 1, "numbers of a token's latent, as a share of n_kv_heads * head_dim"),
      number<&Config::scoring_rank>("scoring_rank", 0, 1, "share of these that is read to choose, the leading ones"),
      number<&Config::budget>("budget", 1, kUnbounded, "tokens read, by all query heads alike", Scale::log),
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens that are always read"),
      number<&Config::window>("window", 0, kUnbounded, "latest tokens that are always read"),
      number<&Config::dense_first>("dense_first", 0, 4096, "first layers of the model, read in full"),
      number<&Config::dense_last>("dense_last", 0, 4096, "last layers of the model, read in full"),
      flag<&Config::own_latent>("own_latent", "what is scored lies beside the keys; false where sals_store keeps it"),
  };
  static Needs needs(const Config&) {
    Needs n;
    n.pre_rope = true;
    return n;
  }

  // What was written must fit; the defaults shrink, the window first.
  static void check(const Config& c, int budget) {
    const Config usual;
    const auto written = [&](const Tokens& t, const Tokens& by_default) {
      return t.value == by_default.value && t.percent == by_default.percent ? 0 : t.of(budget);
    };
    const int sink = written(c.sink, usual.sink), window = written(c.window, usual.window);
    if (sink + window > std::max(1, c.budget.of(budget))) {
      throw ConfigError("sals_score: sink=" + std::to_string(c.sink.of(budget)) +
                        " and window=" + std::to_string(c.window.of(budget)) + " are more than the " +
                        std::to_string(c.budget.of(budget)) + " tokens that it may read");
    }
  }

  SalsScore(const Config& config, const SetShape& shape)
      : config_(config),
        rotation_(shape.rotation),
        dense_(is_dense_layer(shape, config.dense_first, config.dense_last)),
        n_read_(std::max(1, config.budget.of(shape.budget))),
        sink_(std::min(config.sink.of(shape.budget), n_read_)),
        window_(std::min(config.window.of(shape.budget), n_read_ - sink_)),
        rank_(std::max(1, static_cast<int>(std::lround(config.scoring_rank *
                                                       rank_of(config.rank, shape.n_lanes * shape.head_dim))))),
        number_bytes_(static_cast<double>(shape.element_bytes) / shape.n_lanes) {}

  void prefill(const View& view) override {
    if (!dense_) {
      const MatF k = joint_keys(view, all_slots(view), undo());
      basis_ = config_.score == Score::shared ? leading_directions(k, rank_) : directions_by_frequency(view, k);
    }
  }

  void choose(const View& view, int, int, std::vector<int>& slots) override {
    if (view.now != now_) {
      now_ = view.now;
      pick(view);
    }
    slots = chosen_;
  }

  double metadata_bytes(int n_slots) const override {
    return config_.own_latent ? number_bytes_ * static_cast<double>(basis_.cols()) * n_slots : 0;
  }
  double scoring_bytes(int) const override { return number_bytes_ * static_cast<double>(basis_.cols()) * n_scored_; }

 private:
  const Rotation* undo() const { return config_.score == Score::shared ? rotation_ : nullptr; }
  static std::vector<int> all_slots(const View& view) {
    std::vector<int> slots(view.pos.size());
    std::iota(slots.begin(), slots.end(), 0);
    return slots;
  }

  void pick(const View& view) {
    chosen_ = all_slots(view);
    n_scored_ = 0;
    if (dense_) {
      return;
    }
    meet(view);
    if (static_cast<int>(chosen_.size()) <= n_read_) {
      return;
    }
    const auto pos = [&](int slot) { return view.pos[static_cast<std::size_t>(slot)]; };
    const auto rest = std::stable_partition(
        chosen_.begin(), chosen_.end(), [&](int slot) { return pos(slot) < sink_ || pos(slot) > view.now - window_; });
    n_scored_ = static_cast<int>(chosen_.end() - rest);
    const Eigen::VectorXf q = basis_.transpose() * joint_query(view);
    std::vector<float> score(view.pos.size());
    for (auto it = rest; it != chosen_.end(); ++it) {
      score[static_cast<std::size_t>(*it)] = latent_.row(pos(*it)).dot(q);
    }
    const auto last = chosen_.begin() + n_read_;
    std::nth_element(rest, last, chosen_.end(), [&](int a, int b) {
      const float x = score[static_cast<std::size_t>(a)], y = score[static_cast<std::size_t>(b)];
      return x != y ? x > y : a > b;
    });
    chosen_.erase(last, chosen_.end());
  }

  // Latents of what arrived, and of what was rewritten, since the last step.
  void meet(const View& view) {
    std::vector<int> slots;
    for (const Pos p : view.rewritten) {
      const auto it = std::lower_bound(view.pos.begin(), view.pos.end(), p);
      if (p <= newest_ && it != view.pos.end() && *it == p) {
        slots.push_back(static_cast<int>(it - view.pos.begin()));
      }
    }
    std::sort(slots.begin(), slots.end());
    slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
    const auto arrived = std::upper_bound(view.pos.begin(), view.pos.end(), newest_) - view.pos.begin();
    for (int i = static_cast<int>(arrived); i < static_cast<int>(view.pos.size()); ++i) {
      slots.push_back(i);
    }
    newest_ = view.pos.back();
    if (latent_.rows() <= newest_) {
      latent_.conservativeResize(std::max<Eigen::Index>(newest_ + 1, 2 * latent_.rows()), basis_.cols());
    }
    const MatF latent = joint_keys(view, slots, undo()) * basis_;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      latent_.row(view.pos[static_cast<std::size_t>(slots[i])]) = latent.row(static_cast<Eigen::Index>(i));
    }
  }

  Eigen::VectorXf joint_query(const View& view) const {  // (n_lanes * head_dim)
    Eigen::VectorXf q(view.n_lanes * view.head_dim);
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      auto one = q.segment(lane * view.head_dim, view.head_dim);
      one = view.queries(lane, 1).colwise().mean();
      if (undo() != nullptr) {
        undo()->undo(view.now, {one.data(), static_cast<std::size_t>(view.head_dim)});
      }
    }
    return q;
  }

  // A frequency turns the pairs (x, y) of all KV heads, as complex numbers, by one common factor, which commutes with
  // any complex map of them and drops out of their energies. So the directions, and q . k in them, can be had from
  // keys and queries as RoPE left them. Each complex direction is two real ones: (n_lanes * head_dim, 2 * directions).
  MatF directions_by_frequency(const View& view, const MatF& k) const {
    struct Direction {
      double energy;
      int first, second;
      Eigen::VectorXcd of_lane;
    };
    std::vector<Direction> all;
    const int dim = view.head_dim, turned = rotation_->rotary_dim();
    for (int i = 0; 2 * i < dim; ++i) {
      const bool turns = 2 * i < turned;  // numbers that RoPE leaves alone pair up as neighbours
      const int first = turns ? rotation_->first_of(i) : 2 * i, second = turns ? rotation_->second_of(i) : 2 * i + 1;
      Eigen::MatrixXcd z(k.rows(), view.n_lanes);
      for (int lane = 0; lane < view.n_lanes; ++lane) {
        z.col(lane).real() = k.col(lane * dim + first).cast<double>();
        z.col(lane).imag().setZero();
        if (second < dim) {
          z.col(lane).imag() = k.col(lane * dim + second).cast<double>();
        }
      }
      const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXcd> eigen(z.transpose() * z.conjugate());
      for (int j = 0; j < view.n_lanes; ++j) {
        all.push_back({eigen.eigenvalues()[j], first, second, eigen.eigenvectors().col(j)});
      }
    }
    std::stable_sort(all.begin(), all.end(),
                     [](const Direction& a, const Direction& b) { return a.energy > b.energy; });
    int n = 0;
    while (n < std::max(1, rank_ / 2) && n < static_cast<int>(all.size()) &&
           all[static_cast<std::size_t>(n)].energy > kNoEnergy * all[0].energy) {
      ++n;
    }
    MatF basis = MatF::Zero(k.cols(), 2 * n);
    for (int c = 0; c < n; ++c) {
      const Direction& d = all[static_cast<std::size_t>(c)];
      for (int lane = 0; lane < view.n_lanes; ++lane) {
        const auto v = std::complex<float>(d.of_lane[lane]);
        basis(lane * dim + d.first, 2 * c) = v.real();
        basis(lane * dim + d.first, 2 * c + 1) = -v.imag();
        if (d.second < dim) {
          basis(lane * dim + d.second, 2 * c) = v.imag();
          basis(lane * dim + d.second, 2 * c + 1) = v.real();
        }
      }
    }
    return basis;
  }

  Config config_;
  const Rotation* rotation_;  // of the trace
  bool dense_;
  int n_read_, sink_, window_, rank_;
  double number_bytes_;  // of one number of the layer's latent, per KV head
  MatF basis_;           // (n_lanes * head_dim, numbers read to choose)
  MatF latent_;          // (positions, numbers read to choose)
  Pos newest_ = -1, now_ = -1;
  int n_scored_ = 0;
  std::vector<int> chosen_;  // slots at now_
};

}  // namespace

extern const PartInfo sals_score;
constinit const PartInfo sals_score = describe<SalsScore>();

}  // namespace kvreplay
