// What residual and momentum can do beyond their defaults: rounds, chunks, the look-ahead, value norms, lags.
#include <catch2/catch.hpp>
#include <numeric>
#include <set>

#include "policies/look_ahead.hpp"
#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

using Positions = std::vector<Pos>;
constexpr float kInf = std::numeric_limits<float>::infinity();

std::unique_ptr<Selector> make(const std::string& method, FakeView& view) {
  const Method m = parse_method(method);
  view.group = m.traits.group;
  return m.select.info->select(m.select.config().get(), view.shape());
}

std::vector<float> scores(Selector& selector, const FakeView& view) {
  std::vector<float> s(view.pos.size());
  selector.score(view, s);
  return s;
}

MatD random_double(Eigen::Index rows, Eigen::Index cols, unsigned seed) {
  return test::random_matrix(rows, cols, seed).cast<double>();
}

Evicted64 two_pass(const MatD& k, const MatD& v) {
  const Eigen::RowVectorXd k_mean = k.colwise().mean(), v_mean = v.colwise().mean();
  return {static_cast<double>(k.rows()), k_mean.transpose(), v_mean.transpose(),
          (v.rowwise() - v_mean).transpose() * (k.rowwise() - k_mean)};
}

// The corrected output of one query, as MomentKV's eq. 9, 11 and 12 have it.
Eigen::RowVectorXd corrected(const Eigen::VectorXd& q, const MatD& k, const MatD& v, const MatD& gone_k,
                             const MatD& gone_v) {
  Eigen::RowVectorXd out = Eigen::RowVectorXd::Zero(v.cols());
  double log_mass = -std::numeric_limits<double>::infinity();
  if (k.rows() > 0) {
    const Eigen::ArrayXd logits = k * q;
    const Eigen::ArrayXd w = (logits - logits.maxCoeff()).exp();
    log_mass = logits.maxCoeff() + std::log(w.sum());
    out = (w / w.sum()).matrix().transpose() * v;
  }
  if (gone_k.rows() == 0) {
    return out;
  }
  const Evicted64 e = two_pass(gone_k, gone_v);
  const Eigen::RowVectorXd estimate = (e.v_mean + e.scatter * q / e.n).transpose();
  const double log_evicted = std::log(e.n) + q.dot(e.k_mean);
  return out + 1 / (1 + std::exp(log_mass - log_evicted)) * (estimate - out);
}

MatD without(const MatD& m, Eigen::Index row) {
  MatD out(m.rows() - 1, m.cols());
  out << m.topRows(row), m.bottomRows(m.rows() - 1 - row);
  return out;
}
MatD with(const MatD& m, const Eigen::RowVectorXd& row) {
  MatD out(m.rows() + 1, m.cols());
  out << m, row;
  return out;
}

Eigen::ArrayXd brute_force(const Eigen::VectorXd& q, const MatD& k, const MatD& v, const MatD& gone_k,
                           const MatD& gone_v) {
  const Eigen::RowVectorXd now = corrected(q, k, v, gone_k, gone_v);
  Eigen::ArrayXd cost(k.rows());
  for (Eigen::Index j = 0; j < k.rows(); ++j) {
    cost[j] = (corrected(q, without(k, j), without(v, j), with(gone_k, k.row(j)), with(gone_v, v.row(j))) - now).norm();
  }
  return cost;
}

}  // namespace

TEST_CASE("the look-ahead is the change of the corrected output, to rounding") {
  const int n = GENERATE(1, 2, 30), n_gone = GENERATE(1, 2, 40);
  const double sharpness = GENERATE(0.1, 1.0, 8.0);
  const auto seed = static_cast<unsigned>(100 * n + n_gone);
  const MatD k = random_double(n, 8, seed), v = random_double(n, 5, seed + 1);
  const MatD gone_k = random_double(n_gone, 8, seed + 2), gone_v = random_double(n_gone, 5, seed + 3);
  const Eigen::VectorXd q = sharpness * random_double(8, 1, seed + 4);
  const Eigen::ArrayXd cost = look_ahead(two_pass(gone_k, gone_v), q, (k * q).array(), v);
  const Eigen::ArrayXd want = brute_force(q, k, v, gone_k, gone_v);
  // Terms of the size of the estimate cancel, which grows with the query.
  const double size = corrected(q, k, v, gone_k, gone_v).norm() + v.rowwise().norm().maxCoeff() * (1 + sharpness);
  INFO(n << " retained, " << n_gone << " evicted, sharpness " << sharpness);
  CHECK((cost - want).abs().maxCoeff() < 3e-15 * size);
}

TEST_CASE("where all logits are equal nothing is lost by forgetting, and huge logits break nothing") {
  const MatD k = random_double(12, 4, 5), gone_k = random_double(30, 4, 6);
  const MatD v = random_double(12, 3, 7), gone_v = random_double(30, 3, 8);
  const MatD same_k = MatD::Ones(12, 4), same_gone = MatD::Ones(30, 4);
  Eigen::VectorXd q = Eigen::VectorXd::Zero(4);
  // Output and estimate together stay the mean of all values.
  CHECK(look_ahead(two_pass(gone_k, gone_v), q, (k * q).array(), v).maxCoeff() < 1e-14);
  q.setConstant(0.3);
  CHECK(look_ahead(two_pass(same_gone, gone_v), q, (same_k * q).array(), v).maxCoeff() < 1e-14);
  for (const double size : {1e4, -1e4}) {
    q.setConstant(size);
    const Eigen::ArrayXd cost = look_ahead(two_pass(gone_k, gone_v), q, (k * q).array(), v);
    CHECK(cost.isFinite().all());
    CHECK((cost >= 0).all());
  }
}

TEST_CASE("residual's look-ahead averages each token over the last queries that saw it") {
  const int queries = GENERATE(1, 3, 50), n_lanes = GENERATE(1, 2);
  const auto group = GENERATE("mean", "max", "sum");
  FakeView view(60, 30, 6, 2, n_lanes);
  view.budget = 12;
  const std::string keys =
      "residual:score=lookahead,sink=0,window=0,obs_window=2,queries=" + std::to_string(queries) + ",group=" + group;
  auto selector = make(keys, view);
  view.whole_prompt();
  selector->prefill(view);
  Positions gone = view.evict(*selector);
  REQUIRE(gone.size() == 18);
  for (int step = 0; step < 25; ++step) {
    view.append();
    const std::vector<float> got = scores(*selector, view);
    const std::size_t n = got.size();
    std::vector<double> want(n, 0.0), by_head(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
      std::vector<double> heads;
      const Pos first = std::max<Pos>({0, view.now - queries + 1, view.pos[i]});
      for (const auto& lane : view.lanes) {
        for (int h = 0; h < 2; ++h) {
          double sum = 0;
          for (Pos t = first; t <= view.now; ++t) {
            Positions seen;
            std::copy_if(view.pos.begin(), view.pos.end(), std::back_inserter(seen), [&](Pos p) { return p <= t; });
            const auto rows = [](const MatF& m, const Positions& at) {
              MatD out(static_cast<Eigen::Index>(at.size()), m.cols());
              for (std::size_t r = 0; r < at.size(); ++r) {
                out.row(static_cast<Eigen::Index>(r)) = m.row(at[r]).cast<double>();
              }
              return out;
            };
            sum += brute_force(lane.q.row(t * 2 + h).cast<double>(), rows(lane.k, seen), rows(lane.v, seen),
                               rows(lane.k, gone), rows(lane.v, gone))[static_cast<Eigen::Index>(i)];
          }
          heads.push_back(sum / (view.now - first + 1));
        }
      }
      const double total = std::accumulate(heads.begin(), heads.end(), 0.0);
      want[i] = view.group == Reduce::max   ? *std::max_element(heads.begin(), heads.end())
                : view.group == Reduce::sum ? total
                                            : total / static_cast<double>(heads.size());
      CHECK(static_cast<double>(got[i]) == Approx(want[i]).epsilon(1e-4).margin(1e-5));
    }
    for (const Pos p : view.evict(*selector)) {
      gone.push_back(p);
    }
  }
}

TEST_CASE("with nothing evicted the look-ahead of one token is nothing, and the residual score decides") {
  FakeView a(40, 5, 6), b(40, 5, 6);
  a.budget = b.budget = 12;
  auto ahead = make("residual:score=lookahead", a), plain = make("residual", b);
  for (FakeView* view : {&a, &b}) {
    view->whole_prompt();
  }
  ahead->prefill(a);
  plain->prefill(b);
  for (int t = 0; t < 8; ++t) {
    a.append();
    b.append();
  }
  CHECK(scores(*ahead, a) == scores(*plain, b));
  const MatD k = random_double(6, 4, 1), v = random_double(6, 4, 2), none(0, 4);
  CHECK(brute_force(Eigen::VectorXd::Ones(4), k, v, none, none).maxCoeff() < 1e-15);
}

TEST_CASE("in rounds the prompt's surplus leaves share by share, each ranked by the moments of those before") {
  const int rounds = GENERATE(1, 2, 5, 28, 40), chunk = GENERATE(1, 4);
  FakeView view(40, 40, 6, 2);
  view.budget = 12;
  auto selector = make("residual:prefill=rounds,sink=1,obs_window=3,rounds=" + std::to_string(rounds) +
                           ",chunk=" + std::to_string(chunk),
                       view);
  view.whole_prompt();
  selector->prefill(view);
  const std::vector<float> got = scores(*selector, view);
  const Eigen::RowVectorXd votes = view.column_mass(0, 3).colwise().mean() / 3;

  Positions gone;
  std::vector<double> score(40);
  for (int round = 1; round <= rounds; ++round) {
    MatD k(std::ssize(gone), 6), v(std::ssize(gone), 6);
    for (std::size_t i = 0; i < gone.size(); ++i) {
      k.row(static_cast<Eigen::Index>(i)) = view.lanes[0].k.row(gone[i]).cast<double>();
      v.row(static_cast<Eigen::Index>(i)) = view.lanes[0].v.row(gone[i]).cast<double>();
    }
    for (Pos p = 0; p < 40; ++p) {
      Eigen::VectorXd r = view.lanes[0].v.row(p).cast<double>();
      if (!gone.empty()) {
        const Evicted64 e = two_pass(k, v);
        r -= e.v_mean + e.scatter * view.lanes[0].k.row(p).cast<double>().transpose() / e.n;
      }
      score[static_cast<std::size_t>(p)] = votes[p] * r.norm();
    }
    for (int i = 0; i < 40; i += chunk) {
      const double mean = std::accumulate(score.begin() + i, score.begin() + i + chunk, 0.0) / chunk;
      std::fill(score.begin() + i, score.begin() + i + chunk, mean);
    }
    Positions left;
    for (Pos p = 1; p < 37; ++p) {
      if (std::find(gone.begin(), gone.end(), p) == gone.end()) {
        left.push_back(p);
      }
    }
    std::stable_sort(left.begin(), left.end(), [&](Pos a, Pos b) {
      return score[static_cast<std::size_t>(a)] < score[static_cast<std::size_t>(b)];
    });
    gone.insert(gone.end(), left.begin(), left.begin() + 28 * round / rounds - std::ssize(gone));
  }
  std::sort(gone.begin(), gone.end());
  CHECK(view.evict(*selector) == gone);
  // Scores of those that left lie below all others, so that an allocator's other budget cuts in the same order.
  for (const Pos p : gone) {
    for (const Pos kept : view.pos) {
      CHECK(got[static_cast<std::size_t>(p)] <= got[static_cast<std::size_t>(kept)]);
    }
  }
}

TEST_CASE("prefill=attention is rerank=0, and one round is attention times the value's norm") {
  FakeView view(40, 40, 6, 2);
  view.budget = 12;
  view.whole_prompt();
  const auto prompt = [&](const std::string& keys) {
    auto selector = make("residual:obs_window=4," + keys, view);
    selector->prefill(view);
    return scores(*selector, view);
  };
  CHECK(prompt("prefill=attention") == prompt("rerank=0"));
  CHECK(prompt("prefill=attention,rerank=3") == prompt("rerank=0"));
  CHECK(prompt("rerank=1") != prompt("rerank=0"));
  const std::vector<float> one = prompt("prefill=rounds,rounds=1"), votes = prompt("rerank=0");
  std::size_t n = 0;
  for (std::size_t i = 1; i < 36; ++i, ++n) {
    CHECK(one[i] == Approx(votes[i] * view.lanes[0].v.row(static_cast<Eigen::Index>(i)).norm()).epsilon(1e-5));
  }
  CHECK(n == 35);
  CHECK(one[0] == kInf);
  CHECK(one[36] == kInf);
}

TEST_CASE("chunks of four stay or leave whole where the budget is a number of chunks") {
  FakeView view(48, 48, 6);
  view.budget = 16;
  auto selector = make("residual:sink=0,obs_window=4,chunk=4", view);
  view.whole_prompt();
  selector->prefill(view);
  view.evict(*selector);
  REQUIRE(view.pos.size() == 16);
  for (std::size_t i = 0; i < 16; i += 4) {
    CHECK(view.pos[i] % 4 == 0);
    CHECK(view.pos[i + 3] == view.pos[i] + 3);
  }
}

TEST_CASE("residual refuses options that would say nothing") {
  CHECK_THROWS_WITH(parse_method("residual:queries=4"), Catch::Contains("score=lookahead"));
  CHECK_THROWS_WITH(parse_method("residual:score=lookahead,ewma=0.5"), Catch::Contains("queries"));
  CHECK_NOTHROW(parse_method("residual:score=lookahead,queries=4"));
}

TEST_CASE("Moment-KV's value-norm ablation adds attention times the value's norm") {
  FakeView view(20, 4, 3, 2, 2);
  view.set_slots({});
  view.budget = 4;
  auto momentum = make("momentum:alpha=0.9,value_norm=true", view);
  std::vector<double> want(20, 0.0);
  for (int t = 0; t < 12; ++t) {
    view.append();
    momentum->observe(view);
    std::vector<float> attention(view.pos.size());
    view.attention(attention);
    const std::vector<float> got = scores(*momentum, view);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const Pos p = view.pos[i];
      const float norm = (view.lanes[0].v.row(p).norm() + view.lanes[1].v.row(p).norm()) / 2;
      double& sum = want[static_cast<std::size_t>(p)];
      sum = 0.9 * sum + static_cast<double>(attention[i] * norm);
      CHECK(static_cast<double>(got[i]) == Approx(sum).epsilon(1e-5));
    }
    view.evict(*momentum);
  }
}
