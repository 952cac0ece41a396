// The residual selector against a slow float64 replay that recomputes everything from the list of
// evicted tokens.
#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>
#include <random>

#include "policies/part.hpp"

namespace kvreplay {

extern const PartInfo residual;

namespace {

struct Scenario {
  const char* what = "";
  int n_lanes = 1, n_heads = 1, head_dim = 16, v_head_dim = 16;
  Pos prompt_len = 40, n_tokens = 160;
  int budget = 12;
  // Of the selector.
  int sink = 1, window = 3, obs_window = 6, rerank = 1, chunk = 1;
  double ewma = 0;
  bool accumulate = true;
  // Of the engine.
  Reduce group = Reduce::mean;
  Order evict = Order::before_attention;
  bool pinned = false;  // the prompt is no slots
  int interval = 1, rewrite_every = 0;
  float key_mean = 0;
};

// A set with its tokens, and everything a view of it answers.
class Fake final : public View {
 public:
  explicit Fake(const Scenario& scenario) : s(scenario) {
    std::mt19937 gen(21);
    std::normal_distribution<float> normal;
    const auto fill = [&](MatF& m, int rows, int cols, float mean, float std) {
      m.resize(rows, cols);
      for (Eigen::Index i = 0; i < m.size(); ++i) {
        m.data()[i] = mean + std * normal(gen);
      }
    };
    for (int lane = 0; lane < s.n_lanes; ++lane) {
      fill(k.emplace_back(), s.n_tokens, s.head_dim, s.key_mean, 1);
      fill(q.emplace_back(), s.n_tokens * s.n_heads, s.head_dim, 0, 2);
      MatF mix, noise;
      fill(mix, s.head_dim, s.v_head_dim, 0, 0.3F);
      fill(noise, s.n_tokens, s.v_head_dim, 0.5F, 0.5F);
      v.push_back((k.back().array() - s.key_mean).matrix() * mix + noise);
    }
    scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
    prompt_len = s.prompt_len;
    head_dim = s.head_dim;
    v_head_dim = s.v_head_dim;
    n_lanes = s.n_lanes;
    n_heads = s.n_heads;
    budget = s.budget;
    group = s.group;
  }
  void show() { pos = slots; }

  // Weights of the queries at `now` over the slots, one row per lane and head.
  MatD weights() const {
    MatD w(n_lanes * n_heads, static_cast<Eigen::Index>(slots.size()));
    for (int lane = 0; lane < n_lanes; ++lane) {
      for (int head = 0; head < n_heads; ++head) {
        auto row = w.row(lane * n_heads + head);
        for (std::size_t i = 0; i < slots.size(); ++i) {
          row[static_cast<Eigen::Index>(i)] = logit(lane, head, now, slots[i]);
        }
        row.array() = (row.array() - row.maxCoeff()).exp();
        row /= row.sum();
      }
    }
    return w;
  }
  Eigen::RowVectorXd reduce(const MatD& rows) const {
    if (group == Reduce::max) {
      return rows.colwise().maxCoeff();
    }
    return group == Reduce::mean ? Eigen::RowVectorXd(rows.colwise().mean()) : Eigen::RowVectorXd(rows.colwise().sum());
  }
  void attention(std::span<float> out) const override {
    REQUIRE(out.size() == slots.size());
    const Eigen::RowVectorXd a = reduce(weights());
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(a[static_cast<Eigen::Index>(i)]);
    }
  }
  void head_attention(int, int, std::span<float>) const override { FAIL("not asked for"); }
  VecF key(int lane, int slot) const override { return {at(k, lane).row(token(slot)).data(), head_dim}; }
  VecF value(int lane, int slot) const override { return {at(v, lane).row(token(slot)).data(), v_head_dim}; }
  MatF queries(int, int) const override {
    FAIL("not asked for");
    return {};
  }
  MatD column_mass(int lane, int last) const override {
    REQUIRE(at_prefill());
    MatD mass = MatD::Zero(n_heads, prompt_len);
    for (Pos t = std::max(0, prompt_len - last); t < prompt_len; ++t) {
      for (int head = 0; head < n_heads; ++head) {
        Eigen::ArrayXd row(t + 1);
        for (Pos j = 0; j <= t; ++j) {
          row[j] = logit(lane, head, t, j);
        }
        row = (row - row.maxCoeff()).exp();
        mass.row(head).head(t + 1) += (row / row.sum()).matrix().transpose();
      }
    }
    return mass;
  }

  const Scenario s;
  float scale;
  std::vector<MatF> q, k,
      v;  // per lane: (n_tokens * n_heads, head_dim), (n_tokens, head_dim), (., v_head_dim)
  std::vector<Pos> slots;

 private:
  template <class T>
  static const T& at(const std::vector<T>& x, int i) {
    return x[static_cast<std::size_t>(i)];
  }
  Pos token(int slot) const { return at(slots, slot); }
  double logit(int lane, int head, Pos t, Pos j) const {
    return static_cast<double>(scale) *
           at(q, lane).row(Eigen::Index{t} * n_heads + head).cast<double>().dot(at(k, lane).row(j).cast<double>());
  }
};

// The score as the paper writes it, in float64 and from scratch at each step.
class Reference {
 public:
  explicit Reference(const Fake& fake) : f_(fake) {}

  // |v - v_mean - S k scale / n| of every slot, given who left.
  Eigen::ArrayXd residuals() const {
    Eigen::ArrayXd squares = Eigen::ArrayXd::Zero(std::ssize(f_.slots));
    for (std::size_t lane = 0; lane < f_.k.size(); ++lane) {
      const auto n = static_cast<Eigen::Index>(gone_k.empty() ? 0 : gone_k[lane].rows());
      MatD c = MatD::Zero(f_.v_head_dim, f_.head_dim);
      Eigen::VectorXd v_mean = Eigen::VectorXd::Zero(f_.v_head_dim);
      if (n > 0) {
        v_mean = gone_v[lane].colwise().mean();
        const MatD dk = gone_k[lane].rowwise() - gone_k[lane].colwise().mean();
        c = gone_v[lane].transpose() * dk * static_cast<double>(f_.scale) / static_cast<double>(n);
      }
      for (std::size_t i = 0; i < f_.slots.size(); ++i) {
        const Eigen::VectorXd key = f_.k[lane].row(f_.slots[i]).cast<double>();
        const Eigen::VectorXd value = f_.v[lane].row(f_.slots[i]).cast<double>();
        squares[static_cast<Eigen::Index>(i)] += (value - v_mean - c * key).squaredNorm();
      }
    }
    return squares.sqrt();
  }
  void lose(const std::vector<int>& slots) {
    for (std::size_t lane = 0; lane < f_.k.size(); ++lane) {
      gone_k.resize(f_.k.size());
      gone_v.resize(f_.k.size());
      for (int slot : slots) {
        const Pos p = f_.slots[static_cast<std::size_t>(slot)];
        const Eigen::Index n = gone_k[lane].rows();
        gone_k[lane].conservativeResize(n + 1, f_.head_dim);
        gone_v[lane].conservativeResize(n + 1, f_.v_head_dim);
        gone_k[lane].row(n) = f_.k[lane].row(p).cast<double>();
        gone_v[lane].row(n) = f_.v[lane].row(p).cast<double>();
      }
    }
  }
  void chunk_and_protect(Eigen::ArrayXd& score, int chunk, int window) const {
    for (Eigen::Index i = 0; i < score.size(); i += chunk) {
      const Eigen::Index n = std::min<Eigen::Index>(chunk, score.size() - i);
      score.segment(i, n).setConstant(Eigen::ArrayXd(score.segment(i, n)).mean());
    }
    const int sink = std::min(f_.s.sink, f_.budget), kept = std::min(window, f_.budget - sink);
    for (std::size_t i = 0; i < f_.slots.size(); ++i) {
      if (f_.slots[i] < sink || f_.slots[i] > f_.now - kept) {
        score[static_cast<Eigen::Index>(i)] = std::numeric_limits<double>::infinity();
      }
    }
  }
  Eigen::ArrayXd prompt_scores() {
    const int queries = std::min<int>(f_.s.obs_window, f_.prompt_len);
    MatD mass(0, f_.prompt_len);
    for (int lane = 0; lane < f_.n_lanes; ++lane) {
      const MatD more = f_.column_mass(lane, queries);
      mass.conservativeResize(mass.rows() + more.rows(), f_.prompt_len);
      mass.bottomRows(more.rows()) = more;
    }
    votes = (f_.reduce(mass) / queries).transpose().array();
    Eigen::ArrayXd score = votes;
    chunk_and_protect(score, f_.s.chunk, f_.s.obs_window);
    for (int round = 0; round < f_.s.rerank; ++round) {
      if (f_.s.accumulate) {
        lose(lowest(score));
      }
      score = votes * residuals();
      gone_k.clear();
      gone_v.clear();
      chunk_and_protect(score, f_.s.chunk, f_.s.obs_window);
    }
    return score;
  }
  std::vector<int> lowest(const Eigen::ArrayXd& score) const {
    std::vector<int> order(f_.slots.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] < score[b]; });
    order.resize(static_cast<std::size_t>(std::max<std::ptrdiff_t>(0, std::ssize(order) - f_.budget)));
    return order;
  }

  std::vector<MatD> gone_k, gone_v;  // per lane: evicted keys and values
  Eigen::ArrayXd votes;

 private:
  const Fake& f_;
};

std::unique_ptr<Selector> make(const Fake& f) {
  const std::shared_ptr<void> config = residual.config();
  const auto set = [&](std::string_view name, double value) {
    for (const ParamInfo& p : residual.params) {
      if (p.name == name) {
        p.set(config.get(), {value, false, {}});
        return;
      }
    }
    FAIL("no parameter " << name);
  };
  set("sink", f.s.sink);
  set("window", f.s.window);
  set("obs_window", f.s.obs_window);
  set("rerank", f.s.rerank);
  set("chunk", f.s.chunk);
  set("ewma", f.s.ewma);
  set("accumulate_prefill", f.s.accumulate);
  residual.check(config.get(), f.s.budget);
  SetShape shape;
  shape.n_lanes = f.n_lanes;
  shape.n_heads = f.n_heads;
  shape.head_dim = f.head_dim;
  shape.v_head_dim = f.v_head_dim;
  shape.n_tokens = f.s.n_tokens;
  shape.prompt_len = f.prompt_len;
  shape.budget = f.budget;
  shape.scale = f.scale;
  return residual.select(config.get(), shape);
}

// The `n_out` lowest scores are exact; every other is exact or a bound from below that is not below those.
void check_scores(const std::vector<float>& got, const Eigen::ArrayXd& want, std::size_t n_out, std::size_t& n_bounds) {
  std::vector<float> lowest = got;
  std::sort(lowest.begin(), lowest.end());
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double w = want[static_cast<Eigen::Index>(i)];
    CAPTURE(i);
    if (std::isinf(w)) {
      CHECK(std::isinf(got[i]));
    } else if (n_out > 0 && got[i] > lowest[n_out - 1] && static_cast<double>(got[i]) < w * (1 - 1e-5)) {
      ++n_bounds;
    } else {
      CHECK(static_cast<double>(got[i]) == Approx(w).epsilon(1e-5));
    }
  }
}

// The lowest of the selector's own scores; each must be the reference's choice up to 1e-5.
std::vector<int> victims(const Reference& reference, const std::vector<float>& got, const Eigen::ArrayXd& want) {
  const Eigen::Map<const Eigen::ArrayXf> scores(got.data(), std::ssize(got));
  std::vector<int> mine = reference.lowest(scores.cast<double>()), theirs = reference.lowest(want);
  if (!mine.empty()) {
    CHECK(want[mine.back()] <= want[theirs.back()] * (1 + 1e-5));
  }
  std::sort(mine.begin(), mine.end());
  return mine;
}

}  // namespace

TEST_CASE("residual ranks and evicts as float64 does from scratch at every step") {
  const auto s = GENERATE(
      Scenario{.what = "plain"}, Scenario{.what = "the paper: nothing protected in decode", .window = 0},
      Scenario{.what = "GQA 4", .n_heads = 4}, Scenario{.what = "GQA 4, max", .n_heads = 4, .group = Reduce::max},
      Scenario{.what = "GQA 2, sum", .n_heads = 2, .group = Reduce::sum},
      Scenario{.what = "two lanes", .n_lanes = 2, .n_heads = 2, .v_head_dim = 9},
      Scenario{.what = "odd dimensions", .head_dim = 21, .v_head_dim = 37}, Scenario{.what = "budget 1", .budget = 1},
      Scenario{.what = "budget 1, nothing protected", .budget = 1, .sink = 0, .window = 0},
      Scenario{.what = "prompt of one token", .prompt_len = 1},
      Scenario{.what = "prompt within the budget", .prompt_len = 8}, Scenario{.what = "pinned prompt", .pinned = true},
      Scenario{.what = "attention alone for the prompt", .rerank = 0},
      Scenario{.what = "ranked again three times", .rerank = 3}, Scenario{.what = "chunks of 4", .chunk = 4},
      Scenario{.what = "the prompt is not remembered", .accumulate = false},
      Scenario{.what = "averaged attention", .n_heads = 2, .ewma = 0.9},
      Scenario{.what = "averaged attention, pinned", .ewma = 0.9, .pinned = true},
      Scenario{.what = "averaged attention, interval", .ewma = 0.9, .interval = 5},
      Scenario{.what = "after attention", .ewma = 0.5, .evict = Order::after_attention},
      Scenario{.what = "interval 5", .interval = 5}, Scenario{.what = "interval 20", .interval = 20},
      Scenario{.what = "rewritten tokens", .rewrite_every = 3}, Scenario{.what = "large key means", .key_mean = 5},
      Scenario{.what = "long", .prompt_len = 20, .n_tokens = 700, .budget = 30},
      Scenario{.what = "few can be the lowest", .prompt_len = 700, .n_tokens = 900, .budget = 200},
      Scenario{.what = "few can be the lowest of two lanes, large key means",
               .n_lanes = 2,
               .prompt_len = 600,
               .n_tokens = 700,
               .budget = 200,
               .key_mean = 5},
      Scenario{.what = "few can be the lowest, rewritten tokens",
               .prompt_len = 600,
               .n_tokens = 700,
               .budget = 200,
               .rewrite_every = 3});
  CAPTURE(s.what);
  Fake f(s);
  Reference reference(f);
  const std::unique_ptr<Selector> selector = make(f);
  std::vector<float> got;
  std::size_t n_bounds = 0;  // scores that were only bounded
  const auto evict = [&](const Eigen::ArrayXd& want) {
    got.resize(f.slots.size());
    selector->score(f, got);
    const std::vector<int> out = victims(reference, got, want);
    check_scores(got, want, f.at_prefill() ? 0 : out.size(), n_bounds);
    selector->evicted(f, out);
    if (!f.at_prefill() || s.accumulate) {
      reference.lose(out);
    }
    for (std::size_t i = out.size(); i-- > 0;) {
      f.slots.erase(f.slots.begin() + out[i]);
    }
    f.show();
  };

  f.now = s.prompt_len - 1;
  std::vector<double> sum(static_cast<std::size_t>(s.n_tokens)), weight(sum.size());
  if (!s.pinned) {
    f.slots.resize(static_cast<std::size_t>(s.prompt_len));
    std::iota(f.slots.begin(), f.slots.end(), 0);
    f.show();
    selector->prefill(f);
    const Eigen::ArrayXd want = reference.prompt_scores();
    for (Pos p = 0; p < s.prompt_len; ++p) {
      sum[static_cast<std::size_t>(p)] = reference.votes[p];
      weight[static_cast<std::size_t>(p)] = 1;
    }
    evict(want);
  }
  std::mt19937 gen(5);
  std::normal_distribution<float> normal;
  std::vector<Pos> rewritten;
  for (Pos t = s.prompt_len; t < s.n_tokens; ++t) {
    f.now = t;
    f.slots.push_back(t);
    f.show();
    f.rewritten = rewritten;
    Eigen::ArrayXd attention = f.reduce(f.weights()).transpose().array();
    for (std::size_t i = 0; i < f.slots.size() && s.ewma > 0; ++i) {
      const auto p = static_cast<std::size_t>(f.slots[i]);
      double& a = attention[static_cast<Eigen::Index>(i)];
      sum[p] = s.ewma * sum[p] + (1 - s.ewma) * a;
      weight[p] = s.ewma * weight[p] + (1 - s.ewma);
      a = sum[p] / weight[p];
    }
    if (s.evict == Order::after_attention) {
      selector->observe(f);
    }
    if ((t - s.prompt_len + 1) % s.interval == 0 && selector->surplus(f) > 0) {
      Eigen::ArrayXd want = attention * reference.residuals();
      reference.chunk_and_protect(want, 1, s.window);
      CAPTURE(t);
      evict(want);
      CHECK(std::ssize(f.slots) == s.budget);
    }
    if (s.evict == Order::before_attention) {
      selector->observe(f);
    }
    rewritten.clear();
    if (s.rewrite_every > 0 && t % s.rewrite_every == 0) {
      const Pos p = f.slots[static_cast<std::size_t>(t) % f.slots.size()];
      rewritten.push_back(p);
      for (std::size_t lane = 0; lane < f.k.size(); ++lane) {
        for (Eigen::Index a = 0; a < s.head_dim; ++a) {
          f.k[lane](p, a) = normal(gen);
        }
        for (Eigen::Index a = 0; a < s.v_head_dim; ++a) {
          f.v[lane](p, a) = normal(gen);
        }
      }
    }
  }
  if (s.budget >= 200) {
    CHECK(n_bounds > 0);  // the shortcut was taken
  }
}

TEST_CASE("residual judges before attention and says what it needs of the prompt") {
  const std::shared_ptr<void> config = residual.config();
  CHECK(residual.traits(config.get()).evict == Order::before_attention);
  CHECK(residual.traits(config.get()).scope == Scope::kv_head);
  CHECK(residual.needs(config.get()).prompt_queries == 32);
  CHECK(residual.budgeted(config.get()));
  CHECK(residual.foresight == Foresight::none);
}

TEST_CASE("a token that the moments predict leaves first, whatever its attention") {
  // Evicted tokens all carry value (1, 0); so does the most attended survivor, which therefore
  // costs nothing.
  Scenario s{.head_dim = 2,
             .v_head_dim = 2,
             .prompt_len = 6,
             .n_tokens = 7,
             .budget = 4,
             .sink = 0,
             .window = 0,
             .obs_window = 1};
  Fake f(s);
  f.q[0].setZero();
  f.q[0].row(6) << 5, 0;
  f.k[0].setZero();
  f.k[0](3, 0) = 1;
  f.v[0].rowwise() = Eigen::RowVector2f(1, 0);
  f.v[0].row(4) << 0, 3;
  f.v[0].row(5) << 0, 2;
  f.v[0].row(6) << 0, 1;
  const std::unique_ptr<Selector> selector = make(f);
  f.now = 5;
  f.slots = {0, 1, 2, 3, 4, 5};
  f.show();
  selector->prefill(f);
  std::vector<float> score(6);
  selector->score(f, score);
  CHECK(score[0] == score[1]);  // a tie: the engine drops the older
  CHECK(score[4] > score[0]);
  selector->evicted(f, std::vector<int>{0, 1});
  f.now = 6;
  f.slots = {2, 3, 4, 5, 6};
  f.show();
  score.resize(5);
  selector->score(f, score);
  CHECK(score[0] == 0);
  CHECK(score[1] == 0);
  CHECK(score[2] > score[3]);
  CHECK(score[3] > score[4]);
  CHECK(score[4] > 0);
}

}  // namespace kvreplay
