// Expected Attention: queries before RoPE are taken for Gaussian, which gives in closed form the attention that each
// key can expect from the positions to come.
#include "policies/column_mass.hpp"
#include "policies/npy.hpp"
#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/value_norms.hpp"
#include "policies/votes.hpp"

namespace kvreplay {
namespace {

enum class Buffer { corrected, kvpress };
constexpr std::string_view kBuffers[] = {"corrected", "kvpress"};

class Expected final : public Selector {
 public:
  struct Config {
    Tokens sink{4, false};
    int future = 512;
    bool covariance = true, value_norm = true;
    double epsilon = 0;
    std::string statistics;
    Buffer decode_mode = Buffer::corrected;
    int buffer = 256;
  };
  static constexpr std::string_view kName = "expected";
  static constexpr std::string_view kSummary = "attention expected from the queries of the next positions";
  static constexpr std::string_view kPaper = "arXiv:2510.00636";
  static constexpr std::string_view kDeviation =
      "kvpress' code and defaults (the paper: epsilon=0.02, and |W_o v| where the code has |v|); decode=grow keeps "
      "every decode token; decode=evict takes the latest queries at their true positions (decode_mode=kvpress: its "
      "places near 0 and its sinks in the buffer; there interval=512)";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded,
                            "first tokens, never evicted; as many first queries do not enter the statistics",
                            Scale::log),
      number<&Config::future>("future", 1, 1 << 20, "next positions over which the rotation is averaged", Scale::log),
      flag<&Config::covariance>("covariance", "the Gaussian's covariance counts; false: its mean alone"),
      flag<&Config::value_norm>("value_norm", "times the norm of the value"),
      number<&Config::epsilon>("epsilon", 0, 1, "added to the attention before that; kvpress' leaderboard: 0.01"),
      text<&Config::statistics>("statistics",
                                "a .npy file [layers, heads, head_dim + 1, head_dim] of means and covariances "
                                "(row 0, the rest) of queries before RoPE; none: of the queries themselves"),
      choice<&Config::decode_mode>("decode_mode", kBuffers,
                                   "corrected: the latest queries and the positions after them; kvpress: those since "
                                   "the last eviction without the first `sink`, future positions from their number on"),
      number<&Config::buffer>("buffer", 1, 1 << 20,
                              "latest queries of which decode=evict takes its statistics; kvpress "
                              "has one more",
                              Scale::log),
  };
  static Traits traits(const Config&) { return {.decode = Decode::grow}; }
  static Needs needs(const Config& c) {
    return {.prompt_queries = c.statistics.empty() ? Needs::kAll : 0, .pre_rope = true};
  }
  static void check(const Config& c, int) {
    if (c.statistics.empty()) {
      return;
    }
    const NpyFile file(c.statistics);
    if (file.shape().size() != 4 || file.shape()[2] != file.shape()[3] + 1) {
      throw ConfigError("expected: statistics=" + c.statistics + " has the shape " + file.shape_text() +
                        ", not [layers, heads, head_dim + 1, head_dim]");
    }
  }

  Expected(const Config& config, const SetShape& shape)
      : config_(config),
        sink_(config.sink.of(shape.budget)),
        rotation_(*shape.rotation),
        norms_(shape, Norm::l2),
        last_event_(shape.prompt_len - 1) {
    if (!config.statistics.empty()) {
      read_statistics(shape);
    }
  }

  void prefill(const View& view) override {
    has_prompt_ = true;
    norms_.meet(view);
  }
  void observe(const View& view) override { norms_.meet(view); }

  void score(const View& view, std::span<float> out) override {
    const Eigen::Index n_sinks = slots_older_than(view, sink_), n = static_cast<Eigen::Index>(out.size()) - n_sinks;
    const bool as_kvpress = !view.at_prefill() && config_.decode_mode == Buffer::kvpress;
    const int n_queries = view.at_prefill() ? view.now + 1
                          : as_kvpress      ? std::min(view.now - last_event_, config_.buffer + 1)
                                       : std::min(view.now + 1 - (has_prompt_ ? 0 : view.prompt_len), config_.buffer);
    const int first_position = as_kvpress ? n_queries : rotation_.ids[static_cast<std::size_t>(view.now)] + 1;
    if (!view.at_prefill()) {
      last_event_ = view.now;
    }
    MatD attn(view.n_lanes * view.n_heads, n);
    for (int lane = 0; n > 0 && lane < view.n_lanes; ++lane) {
      const MatD keys = averaged_keys(view, lane, n_sinks, first_position);
      const MatD q = given_.empty() ? raw_queries(view, lane, n_queries) : MatD();
      for (int head = 0; head < view.n_heads; ++head) {
        const Eigen::Index row = lane * view.n_heads + head;
        const Gaussian g = given_.empty() ? gaussian(q, head, view.n_heads, view.at_prefill() || as_kvpress)
                                          : given_[static_cast<std::size_t>(row)];
        Eigen::ArrayXd x = keys * g.mean;
        if (config_.covariance) {
          x += 0.5 * (keys * g.covariance).cwiseProduct(keys).rowwise().sum().array();
        }
        x = (x - x.maxCoeff()).exp();
        attn.row(row) = x / x.sum();
        for (Eigen::Index i = 0; config_.value_norm && i < n; ++i) {
          const float norm = norms_.of(lane, view.pos[static_cast<std::size_t>(n_sinks + i)]);
          attn(row, i) = (attn(row, i) + config_.epsilon) * static_cast<double>(norm);
        }
      }
    }
    const Eigen::RowVectorXd s = n > 0 ? reduce_heads(view.group, attn) : Eigen::RowVectorXd();
    std::fill(out.begin(), out.end(), n > 0 ? static_cast<float>(s.maxCoeff()) + 1 : 0.0F);
    std::transform(s.begin(), s.end(), out.begin() + n_sinks, [](double x) { return static_cast<float>(x); });
    protect(view, sink_, 0, out);
  }

 private:
  struct Gaussian {
    Eigen::VectorXd mean;  // (head_dim) softmax scale folded in
    MatD covariance;       // (head_dim, head_dim)
  };

  void read_statistics(const SetShape& shape) {
    NpyFile file(config_.statistics);
    const Eigen::Index d = shape.head_dim, per_head = d * (d + 1);
    const int first_head = shape.n_heads == 1 ? shape.set : shape.kv_head * shape.n_heads;
    const int n = shape.n_lanes * shape.n_heads;
    if (file.shape()[0] <= shape.layer || file.shape()[1] < first_head + n || file.shape()[3] != d) {
      throw ConfigError("expected: statistics=" + config_.statistics + " has the shape " + file.shape_text() +
                        ", which does not hold layer " + std::to_string(shape.layer) + ", query head " +
                        std::to_string(first_head + n - 1) + " with head_dim " + std::to_string(d));
    }
    const double scale = static_cast<double>(shape.scale);
    for (int head = first_head; head < first_head + n; ++head) {
      const MatD m = file.read((shape.layer * file.shape()[1] + head) * per_head, d + 1, d);
      given_.push_back({scale * m.row(0).transpose(), scale * scale * m.bottomRows(d)});
    }
  }

  // Before RoPE, softmax scale folded in, as View::queries has them: (n_queries * n_heads, head_dim).
  MatD raw_queries(const View& view, int lane, int n_queries) const {
    MatF q = view.queries(lane, n_queries);
    const Pos first = view.now + 1 - static_cast<Pos>(q.rows()) / view.n_heads;
    for (Eigen::Index r = 0; r < q.rows(); ++r) {
      rotation_.undo(first + static_cast<Pos>(r) / view.n_heads,
                     std::span(q.row(r).data(), static_cast<std::size_t>(q.cols())));
    }
    return q.cast<double>();
  }

  // The first `sink` queries are left out, unless there are no others.
  Gaussian gaussian(const MatD& q, int head, int n_heads, bool drop_sinks) const {
    const Eigen::Index all = q.rows() / n_heads, dropped = drop_sinks && all > sink_ ? sink_ : 0, n = all - dropped;
    MatD x(n, q.cols());
    for (Eigen::Index i = 0; i < n; ++i) {
      x.row(i) = q.row((dropped + i) * n_heads + head);
    }
    Gaussian g;
    g.mean = x.colwise().mean().transpose();
    if (config_.covariance) {
      x.rowwise() -= g.mean.transpose();
      g.covariance.noalias() = x.transpose() * x / static_cast<double>(n);
    }
    return g;
  }

  // Keys from slot `from` on, turned back by the mean of the next rotations: per pair a turn by the middle angle that
  // shrinks by sin(future a / 2) / (future sin(a / 2)), a the angle of one position. (n, head_dim)
  MatD averaged_keys(const View& view, int lane, Eigen::Index from, int first_position) const {
    const auto n_slots = static_cast<Eigen::Index>(view.pos.size());
    MatD keys = first_keys(view, lane, n_slots).bottomRows(n_slots - from).cast<double>();
    for (int i = 0; i < static_cast<int>(rotation_.inv_freq.size()); ++i) {
      const double angle = rotation_.inv_freq[static_cast<std::size_t>(i)], half = std::sin(angle / 2);
      const double shrink = std::abs(half) < 1e-12 ? 1 : std::sin(config_.future * angle / 2) / (config_.future * half);
      const double middle = angle * (first_position + (config_.future - 1) / 2.0);
      const double c = rotation_.attention_factor * shrink * std::cos(middle);
      const double s = rotation_.attention_factor * shrink * std::sin(middle);
      const int a = rotation_.first_of(i), b = rotation_.second_of(i);
      const Eigen::VectorXd first = keys.col(a);
      keys.col(a) = c * first + s * keys.col(b);
      keys.col(b) = c * keys.col(b) - s * first;
    }
    return keys;
  }

  Config config_;
  int sink_;
  const Rotation& rotation_;
  ValueNorms norms_;
  std::vector<Gaussian> given_;  // per query head of the set, where a file gives them
  bool has_prompt_ = false;      // false: it is pinned, and the buffer begins with the decode
  Pos last_event_;
};

}  // namespace

extern const PartInfo expected;
constinit const PartInfo expected = describe<Expected>();

}  // namespace kvreplay
