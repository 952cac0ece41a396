// Selectors that weigh values, count, look ahead or compare keys: examples that can be followed by hand.
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "policies/catalogue.hpp"
#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

using Positions = std::vector<Pos>;

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

// Of the whole prompt, at its end.
std::vector<float> prompt_scores(const std::string& method, FakeView& view) {
  view.whole_prompt();
  const auto selector = make(method, view);
  selector->prefill(view);
  return scores(*selector, view);
}

Positions kept(const FakeView& view) { return {view.pos.begin(), view.pos.end()}; }

Positions step(Selector& selector, FakeView& view) {
  view.append();
  selector.observe(view);
  return view.evict(selector);
}

// Keys become unit vectors of their own, so that the logits of a query are its first numbers. (Softmax of ln p is p.)
void one_hot_keys(FakeView& view) {
  for (auto& lane : view.lanes) {
    lane.k.setIdentity();
  }
}
void attend(FakeView& view, Pos query, int head, const std::vector<double>& weights) {
  auto row = view.lanes[0].q.row(query * view.n_heads + head);
  row.setConstant(-30);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    row[static_cast<Eigen::Index>(i)] = static_cast<float>(std::log(weights[i]));
  }
}

// A .npy file of float64, [layers, heads, head_dim + 1, head_dim], which goes with this object.
class StatisticsFile {
 public:
  explicit StatisticsFile(const MatD& statistics, int layers = 1, int heads = 1)
      : path_((std::filesystem::temp_directory_path() / ("kvreplay_statistics_" + std::to_string(n_++) + ".npy"))) {
    const Eigen::Index d = statistics.cols();
    std::string header = "{'descr': '<f8', 'fortran_order': False, 'shape': (" + std::to_string(layers) + ", " +
                         std::to_string(heads) + ", " + std::to_string(statistics.rows() / layers / heads) + ", " +
                         std::to_string(d) + "), }";
    header.resize((header.size() + 10 + 63) / 64 * 64 - 10, ' ');
    std::ofstream file(path_, std::ios::binary);
    file << "\x93NUMPY" << '\x01' << '\0' << static_cast<char>(header.size() % 256)
         << static_cast<char>(header.size() / 256) << header;
    file.write(reinterpret_cast<const char*>(statistics.data()),
               static_cast<std::streamsize>(statistics.size() * static_cast<Eigen::Index>(sizeof(double))));
  }
  StatisticsFile(const StatisticsFile&) = delete;
  ~StatisticsFile() { std::filesystem::remove(path_); }
  std::string text() const { return "statistics=" + path_.string(); }

 private:
  static inline int n_ = 0;
  std::filesystem::path path_;
};

MatD gaussian(const Eigen::VectorXd& mean, const Eigen::MatrixXd& covariance) {
  MatD out(mean.size() + 1, mean.size());
  out << mean.transpose(), covariance;
  return out;
}

}  // namespace

TEST_CASE("morphkv lets the queries before the current one vote on what is older than their window",
          "[more_selectors]") {
  FakeView view(6, 3, 6);
  one_hot_keys(view);
  attend(view, 3, 0, {0.44, 0.50, 0.06});
  attend(view, 4, 0, {0.44, 0.08, 0.48});
  attend(view, 5, 0, {0.98, 0.01, 0.01});  // the current one has no vote
  view.budget = 5;                         // C = 4, and the current token
  const auto victim = [&](const std::string& method) {
    view.whole_prompt();
    auto selector = make(method, view);
    selector->prefill(view);
    CHECK(view.evict(*selector).empty());
    CHECK(step(*selector, view).empty());
    CHECK(step(*selector, view).empty());
    view.append();
    selector->observe(view);
    const Positions gone = view.evict(*selector);
    CHECK(view.pos.size() == 5);
    return gone;
  };
  CHECK(victim("morphkv:obs_window=2,skip_oldest=false") == Positions{2});           // sums .88, .58, .54
  CHECK(victim("morphkv:obs_window=2,skip_oldest=false,fuse=max") == Positions{0});  // .44, .50, .48
  CHECK(victim("morphkv:obs_window=2") == Positions{1});                             // the later query alone
}

TEST_CASE("morphkv takes each head's softmax, or one of the group's summed logits", "[more_selectors]") {
  FakeView view(6, 4, 6, 2);
  one_hot_keys(view);
  attend(view, 3, 0, {0.80, 0.15, 0.05});
  attend(view, 3, 1, {0.05, 0.25, 0.70});
  view.budget = 4;
  const auto victim = [&](const std::string& method) {
    view.whole_prompt();
    auto selector = make(method, view);
    selector->prefill(view);
    const Positions cut = view.evict(*selector);  // room for the token to come: what the first step attends
    CHECK(view.pos.size() == 3);
    CHECK(step(*selector, view).empty());
    return cut;
  };
  CHECK(victim("morphkv:obs_window=1") == Positions{1});              // largest of the heads: .80, .25, .70
  CHECK(victim("morphkv:obs_window=1,group=mean") == Positions{1});   // .425, .2, .375
  CHECK(victim("morphkv:obs_window=1,heads=joint") == Positions{2});  // products .04, .0375, .035
}

TEST_CASE("morphkv attends C + 1 tokens at every step, or bursts once it has grown", "[more_selectors]") {
  FakeView view(40, 12, 8, 2, 1);
  view.budget = 6;
  for (const auto& [text, limit] :
       {std::pair<std::string, std::size_t>{"morphkv:obs_window=2", 6}, {"morphkv:obs_window=2,evict_after=2", 12}}) {
    INFO(text);
    view.whole_prompt();
    auto selector = make(text, view);
    selector->prefill(view);
    view.evict(*selector);
    std::size_t most = 0, least = 99;
    for (int t = 0; t < 25; ++t) {
      view.append();
      selector->observe(view);
      view.evict(*selector);  // before it attends
      most = std::max(most, view.pos.size());
      least = std::min(least, view.pos.size());
      CHECK(view.pos.back() == view.now);
      CHECK(view.pos[view.pos.size() - 3] == view.now - 2);
    }
    CHECK(least == 6);
    CHECK(most == (limit == 6 ? 6 : 11));
  }
}

TEST_CASE("morphkv's votes follow keys that were rewritten", "[more_selectors]") {
  FakeView view(6, 4, 6);
  one_hot_keys(view);
  attend(view, 4, 0, {0.4, 0.3, 0.1, 0.2});
  view.budget = 5;
  view.whole_prompt();
  auto selector = make("morphkv:obs_window=1", view);
  selector->prefill(view);
  view.evict(*selector);
  step(*selector, view);
  view.append();
  const Positions changed{0, 2};  // they change places
  view.rewrite(0, 0, Eigen::VectorXf::Unit(6, 2), Eigen::VectorXf::Zero(6), 0, 0);
  view.rewrite(0, 2, Eigen::VectorXf::Unit(6, 0), Eigen::VectorXf::Zero(6), 0, 0);
  view.rewritten = changed;
  selector->observe(view);
  CHECK(view.evict(*selector) == Positions{0});
}

TEST_CASE("rpc compresses after every P tokens and keeps P / ratio more each time", "[more_selectors]") {
  FakeView view(60, 4, 8, 2, 2);
  view.budget = 8;  // P; T = 2, R = 3
  view.set_slots({});
  auto rpc = make("rpc:obs_window=3", view);
  std::vector<std::size_t> sizes;
  for (int t = 0; t < 44; ++t) {
    const Positions gone = step(*rpc, view);
    if (!gone.empty()) {
      sizes.push_back(view.pos.size() + gone.size());
      sizes.push_back(view.pos.size());
      CHECK(view.pos[view.pos.size() - 3] == view.now - 2);
    }
  }
  // n T + P + R before event n + 1, (n + 1) T + R after it; old survivors compete again.
  CHECK(sizes == std::vector<std::size_t>{11, 5, 13, 7, 15, 9, 17, 11, 19, 13});
}

TEST_CASE("rpc counts the newest query twice and forgets the window's oldest, unless told otherwise",
          "[more_selectors]") {
  FakeView view(6, 1, 6);
  one_hot_keys(view);
  attend(view, 3, 0, {1e-9, 0.90, 0.10});
  attend(view, 4, 0, {1e-9, 0.45, 0.55});
  view.budget = 2;  // P = R = 2, T = 1: of 1 and 2 one stays
  const auto left = [&](const std::string& method) {
    view.now = 0;
    view.set_slots({});
    auto rpc = make(method, view);
    for (int t = 0; t < 3; ++t) {
      CHECK(step(*rpc, view).empty());
    }
    step(*rpc, view);
    return kept(view);
  };
  CHECK(left("rpc:obs_window=2,ratio=2,kernel=1") == Positions{2, 3, 4});
  CHECK(left("rpc:obs_window=2,ratio=2,kernel=1,repeat_newest=false") == Positions{1, 3, 4});
}

TEST_CASE("longflow scores a token by the mean of p |v|, and spares neither sinks nor the newest", "[more_selectors]") {
  FakeView view(3, 1, 3, 2);
  view.v_head_dim = 2;
  one_hot_keys(view);
  view.lanes[0].v = MatF{{1, -1}, {0.1F, 0.1F}, {2, 0}};
  attend(view, 2, 0, {0.5, 0.3, 0.2});
  attend(view, 2, 1, {0.1, 0.1, 0.8});
  view.budget = 2;
  view.set_slots({0});
  auto longflow = make("longflow", view);
  longflow->prefill(view);
  view.append();
  longflow->observe(view);
  view.append();
  longflow->observe(view);
  // .3, .02, .5 with the paper's factor 1 / (H d), d = 2
  const std::vector<float> s = scores(*longflow, view);
  CHECK(s[0] / 2 == Approx(0.3).epsilon(1e-6));
  CHECK(s[1] / 2 == Approx(0.02).epsilon(1e-6));
  CHECK(s[2] / 2 == Approx(0.5).epsilon(1e-6));
  CHECK(view.evict(*longflow) == Positions{1});
  view.lanes[0].v.row(2).setZero();
  view.set_slots({0, 1, 2});
  auto again = make("longflow", view);
  again->observe(view);
  CHECK(view.evict(*again) == Positions{2});
}

TEST_CASE("norms follow values that were rewritten", "[more_selectors]") {
  FakeView view(4, 1, 4);
  one_hot_keys(view);
  attend(view, 3, 0, {0.3, 0.3, 0.3, 0.1});
  view.lanes[0].v.setOnes();
  view.lanes[0].v.row(1) *= 0.5F;
  view.budget = 3;
  view.now = 2;
  view.set_slots({0, 1, 2});
  auto longflow = make("longflow", view);
  longflow->observe(view);
  const Positions changed{0, 1};
  view.rewrite(0, 0, view.lanes[0].k.row(0), Eigen::VectorXf::Constant(4, 0.1F), 0, 0);
  view.rewrite(0, 1, view.lanes[0].k.row(1), Eigen::VectorXf::Constant(4, 2.0F), 0, 0);
  view.rewritten = changed;
  view.append();
  longflow->observe(view);
  const std::vector<float> s = scores(*longflow, view);
  CHECK(s[0] == Approx(0.12).epsilon(1e-6));
  CHECK(s[1] == Approx(2.4).epsilon(1e-6));
  CHECK(s[2] == Approx(1.2).epsilon(1e-6));
}

TEST_CASE("vatp multiplies the heads' mean attention by the lanes' mean norm", "[more_selectors]") {
  FakeView view(5, 1, 2, 1, 2);
  view.budget = 4;
  view.lanes[0].v = MatF{{0, 0}, {3, 4}, {0, 0}, {1, 0}, {1, 1}};
  view.lanes[1].v = MatF{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}};
  view.script = {{1, 0.1F}, {2, 0.3F}, {3, 0.4F}, {4, 0.2F}};
  for (const auto& [text, expected] : {std::pair<std::string, std::vector<float>>{"vatp", {0.3F, 0.3F}},
                                       {"vatp:norm=l1", {0.4F, 0.3F}},
                                       {"vatp:mass=sum,norm=l1", {1.6F, 0.9F}}}) {
    INFO(text);
    view.now = 0;
    view.set_slots({});
    auto vatp = make(text + (text == "vatp" ? ":pool=decode" : ",pool=decode"), view);
    for (int t = 0; t < 4; ++t) {
      view.append();
      vatp->observe(view);
    }
    const std::vector<float> s = scores(*vatp, view);  // 3 and 4 are the recent half
    CHECK(s[0] == Approx(expected[0]).epsilon(1e-6));
    CHECK(s[1] == Approx(expected[1]).epsilon(1e-6));
    CHECK(std::isinf(s[2]));
    CHECK(std::isinf(s[3]));
  }
}

TEST_CASE("scissorhands drops a burst of those that were below average most often lately", "[more_selectors]") {
  FakeView view(8, 1, 2);
  view.budget = 4;
  view.set_slots({});
  auto scissorhands = make("scissorhands:window=1,history=3,drop=2,pool=decode", view);
  // Below 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6 counts.
  const std::vector<std::vector<float>> rows = {{0.6F}, {0.3F, 0.4F}, {0.2F, 0.2F, 0.5F}, {0.3F, 0.1F, 0.3F, 0.3F}};
  for (const std::vector<float>& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      view.script[static_cast<Pos>(i) + 1] = row[i];
    }
    CHECK(step(*scissorhands, view).empty());
  }
  view.script = {{1, 0.2F}, {2, 0.05F}, {3, 0.1F}, {4, 0.3F}, {5, 0.01F}};
  view.append();
  scissorhands->observe(view);
  CHECK(scores(*scissorhands, view) == std::vector<float>{-1, -3, -1, 0, 0});  // 5 is recent
  CHECK(view.evict(*scissorhands) == Positions{1, 2});                         // 1 and 3 tie: the older one
  view.script[6] = 0.2F;
  CHECK(step(*scissorhands, view).empty());
  CHECK(view.pos.size() == 4);
}

TEST_CASE("scissorhands counts what the prompt's last queries gave, each to what it could see", "[more_selectors]") {
  FakeView view(4, 4, 4);
  one_hot_keys(view);
  attend(view, 2, 0, {0.40, 0.35, 0.25});    // below 1/3: 2
  attend(view, 3, 0, {0.1, 0.5, 0.2, 0.2});  // below 1/4: 0, 2, 3
  view.budget = 3;
  CHECK(prompt_scores("scissorhands:window=0,history=2", view) == std::vector<float>{-1, 0, -2, -1});
  CHECK(prompt_scores("scissorhands:window=2,history=2", view) == std::vector<float>{-1, 0, 0, 0});
  CHECK_THROWS_WITH(parse_method("scissorhands:drop=9").check(8), Catch::Contains("drop=9"));
}

TEST_CASE("expected attention averages the rotation of the next positions in closed form", "[more_selectors]") {
  // One pair of frequency theta; ln of the score's ratio to that of a zero key is the averaged mean query times the
  // key.
  const auto shrink = [](double theta) {
    FakeView view(3, 3, 2);
    view.rotation.inv_freq = {theta};
    view.lanes[0].k = MatF{{0, 0}, {1, 0}, {0, 1}};
    view.budget = 1;
    const StatisticsFile file(gaussian(Eigen::Vector2d(1, 0), Eigen::Matrix2d::Zero()));
    const auto s = prompt_scores("expected:sink=0,value_norm=false," + file.text(), view);
    const double x = std::log(static_cast<double>(s[1]) / static_cast<double>(s[0]));
    const double y = std::log(static_cast<double>(s[2]) / static_cast<double>(s[0]));
    double mean_x = 0, mean_y = 0;  // the sum over positions 3 to 514 itself
    for (int p = 3; p < 3 + 512; ++p) {
      mean_x += std::cos(p * theta) / 512;
      mean_y += std::sin(p * theta) / 512;
    }
    CHECK(x == Approx(mean_x).margin(1e-6));
    CHECK(y == Approx(mean_y).margin(1e-6));
    const double middle = theta * (3 + 511 / 2.0);
    return x * std::cos(middle) + y * std::sin(middle);
  };
  CHECK(shrink(1) == Approx(-0.00407).margin(5e-6));
  CHECK(shrink(0.01) == Approx(0.21459).margin(5e-6));
  CHECK(shrink(1e-4) == Approx(0.99989).margin(5e-6));
  CHECK(shrink(0) == Approx(1).margin(1e-6));
}

TEST_CASE("expected attention of one sure query is its attention", "[more_selectors]") {
  const bool interleaved = GENERATE(false, true);
  const Pos n = 12;
  FakeView view(n, n, 6);
  view.rotation.interleaved = interleaved;
  view.rotation.attention_factor = 1.25;
  view.rotation.inv_freq = {0.7, 0.05};  // the last two numbers do not turn
  for (Pos p = 0; p < n; ++p) {
    view.rotation.ids[static_cast<std::size_t>(p)] = p + 3;
  }
  const MatF raw = test::random_matrix(1, 6, 5);
  for (Pos p = 0; p < n; ++p) {
    view.lanes[0].q.row(p) = raw.row(0);
    view.rotation.apply(p, std::span(view.lanes[0].q.row(p).data(), 6));
  }
  view.budget = 6;
  const auto s = prompt_scores("expected:sink=2,future=1,value_norm=false", view);
  MatF next = raw;
  view.rotation.ids.push_back(n + 3);
  view.rotation.apply(n, std::span(next.data(), 6));
  Eigen::ArrayXd attn = (view.lanes[0].k.bottomRows(n - 2) * next.transpose()).cast<double>().array();
  attn = (attn - attn.maxCoeff()).exp();
  attn /= attn.sum();
  for (Pos p = 2; p < n; ++p) {
    CHECK(static_cast<double>(s[static_cast<std::size_t>(p)]) == Approx(attn[p - 2]).epsilon(1e-5));
  }
  CHECK(std::isinf(s[0]));
}

TEST_CASE("expected attention is the mean of exp over Gaussian queries", "[more_selectors]") {
  FakeView view(4, 4, 4);
  view.rotation.inv_freq = {0.3, 0.02};
  view.budget = 2;
  const Eigen::MatrixXd a = 0.3 * test::random_matrix(4, 4, 3).cast<double>();
  const Eigen::VectorXd mean = 0.5 * test::random_matrix(4, 1, 4).cast<double>();
  const StatisticsFile file(gaussian(mean, a * a.transpose()));
  const auto s = prompt_scores("expected:sink=0,future=1,value_norm=false," + file.text(), view);
  const int n = 200000;
  const MatF noise = test::random_matrix(n, 4, 6);
  Eigen::ArrayXd sum = Eigen::ArrayXd::Zero(4);
  view.rotation.ids.push_back(4);
  MatF q = (noise.cast<double>() * a.transpose()).rowwise().operator+(mean.transpose()).cast<float>();
  for (int i = 0; i < n; ++i) {
    view.rotation.apply(4, std::span(q.row(i).data(), 4));
  }
  sum = (q * view.lanes[0].k.transpose()).cast<double>().array().exp().colwise().mean().transpose();
  sum /= sum.sum();
  for (Eigen::Index i = 0; i < 4; ++i) {
    CHECK(static_cast<double>(s[static_cast<std::size_t>(i)]) == Approx(sum[i]).epsilon(0.02));
  }
  // Without the covariance it is off by more than that.
  const auto mean_alone =
      prompt_scores("expected:sink=0,future=1,value_norm=false,covariance=false," + file.text(), view);
  double worst = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(mean_alone[i]) / sum[static_cast<Eigen::Index>(i)] - 1));
  }
  CHECK(worst > 0.05);
}

TEST_CASE("expected attention takes its statistics from a file or from the queries", "[more_selectors]") {
  FakeView view(20, 20, 4);
  view.budget = 5;
  const auto own = prompt_scores("expected", view);
  const MatD q = view.lanes[0].q.bottomRows(16).cast<double>();  // nothing turns; four sinks do not count
  const Eigen::VectorXd mean = q.colwise().mean().transpose();
  const Eigen::MatrixXd centred = q.rowwise() - mean.transpose();
  MatD both(10, 4);
  both << MatD::Zero(5, 4), gaussian(mean, centred.transpose() * centred / 16);
  const StatisticsFile file(both, 2, 1);
  view.whole_prompt();
  const Method m = parse_method("expected:" + file.text());
  SetShape shape = view.shape();
  shape.layer = 1;
  const auto selector = m.select.info->select(m.select.config().get(), shape);
  selector->prefill(view);
  const auto given = scores(*selector, view);
  for (std::size_t i = 4; i < own.size(); ++i) {
    CHECK(given[i] == Approx(own[i]).epsilon(1e-6));
  }
  CHECK(m.select.info->needs(m.select.config().get()).prompt_queries == 0);
  shape.layer = 2;
  CHECK_THROWS_WITH(m.select.info->select(m.select.config().get(), shape), Catch::Contains("does not hold layer 2"));
  const StatisticsFile flat(MatD::Zero(4, 4));
  CHECK_THROWS_WITH(parse_method("expected:" + flat.text()), Catch::Contains("[1, 1, 4, 4]"));
  CHECK_THROWS_WITH(parse_method("expected:statistics=/nowhere.npy"), Catch::Contains("/nowhere.npy"));
}

TEST_CASE("expected attention: equal heads are one head, sharp epsilon ranks by value norm", "[more_selectors]") {
  FakeView one(24, 24, 4), three(24, 24, 4, 3);
  one.rotation.inv_freq = three.rotation.inv_freq = {0.5, 0.01};
  three.lanes[0].k = one.lanes[0].k;
  three.lanes[0].v = one.lanes[0].v;
  for (Eigen::Index r = 0; r < three.lanes[0].q.rows(); ++r) {
    three.lanes[0].q.row(r) = one.lanes[0].q.row(r / 3);
  }
  one.budget = three.budget = 8;
  const auto a = prompt_scores("expected", one), b = prompt_scores("expected", three);
  for (std::size_t i = 4; i < a.size(); ++i) {
    CHECK(a[i] == Approx(b[i]).epsilon(1e-6));
  }
  one.lanes[0].q *= 30;  // all expected attention on one key
  const auto s = prompt_scores("expected:epsilon=1,sink=0", one);
  std::vector<int> by_score(24), by_norm(24);
  std::iota(by_score.begin(), by_score.end(), 0);
  by_norm = by_score;
  const auto best = std::max_element(s.begin(), s.end()) - s.begin();
  std::sort(by_score.begin(), by_score.end(),
            [&](int x, int y) { return s[static_cast<std::size_t>(x)] < s[static_cast<std::size_t>(y)]; });
  std::sort(by_norm.begin(), by_norm.end(),
            [&](int x, int y) { return one.lanes[0].v.row(x).norm() < one.lanes[0].v.row(y).norm(); });
  std::erase(by_score, static_cast<int>(best));
  std::erase(by_norm, static_cast<int>(best));
  CHECK(by_score == by_norm);
}

TEST_CASE("expected attention: what is orthogonal to all keys in the mean query changes nothing", "[more_selectors]") {
  FakeView view(8, 8, 4);
  view.lanes[0].k.col(3).setZero();
  view.budget = 3;
  const Eigen::MatrixXd none = Eigen::MatrixXd::Zero(4, 4);
  const StatisticsFile plain(gaussian(Eigen::Vector4d(1, 2, 3, 0), none));
  const StatisticsFile moved(gaussian(Eigen::Vector4d(1, 2, 3, 9), none));
  CHECK(prompt_scores("expected:" + plain.text(), view) == prompt_scores("expected:" + moved.text(), view));
}

TEST_CASE("expected attention at decode: true positions, or kvpress' buffer", "[more_selectors]") {
  // One pair; all queries are the same vector before they turn. Keys are unit vectors at growing angles.
  FakeView view(60, 10, 2);
  view.rotation.inv_freq = {0.05};
  for (Pos p = 0; p < 60; ++p) {
    const double turned = 0.05 * p;
    view.lanes[0].q.row(p) << static_cast<float>(std::cos(turned)), static_cast<float>(std::sin(turned));
    view.lanes[0].k.row(p) << static_cast<float>(std::cos(turned)), static_cast<float>(std::sin(turned));
  }
  view.budget = 30;
  const auto favourite = [&](const std::string& method, Pos now) {
    view.whole_prompt();
    auto selector = make(method, view);
    selector->prefill(view);
    while (view.now < now) {
      view.append();
      selector->observe(view);
    }
    const auto s = scores(*selector, view);
    return static_cast<Pos>(std::max_element(s.begin(), s.end()) - s.begin());
  };
  const std::string text = "expected:sink=0,future=1,value_norm=false,decode=evict,buffer=8,decode_mode=";
  CHECK(favourite(text + "corrected", 49) == 49);  // the next position, 50, is nearest to the latest key
  CHECK(favourite(text + "kvpress", 49) == 9);     // a buffer of 8 + 1 queries: position 9
  CHECK(favourite(text + "kvpress", 14) == 5);     // of the 5 since the prompt: position 5
}

TEST_CASE("infinipot: TaR takes the recent blocks and the most unlike, VaN the rest", "[more_selectors]") {
  // 32, 40 and 64 frames of 140 tokens, cut to 24 frames: 3360 tokens, half of them TaR's.
  const auto counts = [](int frames, int delta) {
    const Pos n = 140 * frames;
    FakeView view(n, n, 2);
    view.budget = n - 1;
    const auto s = prompt_scores("infinipot:sink=0,block=140,prompt=once,delta=" + std::to_string(delta), view);
    const float above = *std::max_element(s.begin(), s.end());
    std::array<std::ptrdiff_t, 3> out{};  // TaR's, of these the last ones in a row, the others
    out[0] = std::count(s.begin(), s.end(), above);
    out[1] = std::find_if(s.rbegin(), s.rend(), [&](float x) { return x != above; }) - s.rbegin();
    out[2] = out[0] - out[1];
    const auto selector = make("infinipot:sink=0,block=140,prompt=once,delta=" + std::to_string(delta), view);
    CHECK(n - selector->surplus(view) == 3360);
    return out;
  };
  CHECK(counts(32, 32 * 140 - 1 - 3360) == std::array<std::ptrdiff_t, 3>{1680, 1120, 560});
  CHECK(counts(40, 40 * 140 - 1 - 3360) == std::array<std::ptrdiff_t, 3>{1680, 1400, 280});
  CHECK(counts(64, 64 * 140 - 1 - 3360) == std::array<std::ptrdiff_t, 3>{1680, 1680, 0});  // forbidden in the code
}

TEST_CASE("infinipot: the ends of its ratios", "[more_selectors]") {
  const Pos n = 40;
  FakeView view(n, n, 6);
  view.budget = 39;
  const auto survivors = [&](const std::string& settings) {
    view.whole_prompt();
    auto selector = make("infinipot:sink=0,block=4,prompt=once,delta=19," + settings, view);  // C = 20
    selector->prefill(view);
    view.evict(*selector);
    CHECK(view.pos.size() == 20);
    return kept(view);
  };
  std::vector<Pos> by_norm(static_cast<std::size_t>(n));
  std::iota(by_norm.begin(), by_norm.end(), 0);
  std::sort(by_norm.begin(), by_norm.end(),
            [&](Pos a, Pos b) { return view.lanes[0].v.row(a).norm() > view.lanes[0].v.row(b).norm(); });
  by_norm.resize(20);
  std::sort(by_norm.begin(), by_norm.end());
  CHECK(survivors("tar_ratio=0") == by_norm);  // VaN alone
  Positions latest(20);
  std::iota(latest.begin(), latest.end(), 20);
  CHECK(survivors("tar_ratio=1,query_ratio=0.5") == latest);  // TaR's share is what is recent
  // TaR alone: nothing asks for norms.
  const Positions tar = survivors("tar_ratio=1");
  view.lanes[0].v = test::random_matrix(n, 6, 77);
  CHECK(survivors("tar_ratio=1") == tar);
  CHECK(std::equal(tar.end() - 8, tar.end(), latest.end() - 8));  // 2 of 10 blocks are recent
}

TEST_CASE("infinipot drops older copies of a recent block first", "[more_selectors]") {
  const std::string mapping = GENERATE("same_offset", "best_match", "nearest", "centroid");
  const Pos n = 32;
  FakeView view(n, n, 16);
  for (const Pos block : {1, 2, 5}) {  // copies of the latest block, 7
    view.lanes[0].k.middleRows(4 * block, 4) = view.lanes[0].k.bottomRows(4);
  }
  if (mapping == "centroid") {  // one direction for the whole block, or its mean says little
    for (const Pos block : {1, 2, 5, 7}) {
      view.lanes[0].k.middleRows(4 * block, 4).rowwise() = Eigen::RowVectorXf(view.lanes[0].k.row(28));
    }
  }
  view.budget = 31;
  view.whole_prompt();
  auto selector =
      make("infinipot:sink=0,block=4,prompt=once,delta=11,tar_ratio=1,query_ratio=0.125,mapping=" + mapping, view);
  selector->prefill(view);
  CHECK(view.evict(*selector) == Positions{4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23});
}

TEST_CASE("infinipot asks no query and no scale", "[more_selectors]") {
  const auto run = [](float key_scale, float value_scale, unsigned query_seed) {
    FakeView view(60, 30, 6, 2);
    view.lanes[0].k *= key_scale;
    view.lanes[0].v *= value_scale;
    view.lanes[0].q = test::random_matrix(120, 6, query_seed);
    view.budget = 16;
    view.whole_prompt();
    auto selector = make("infinipot:block=2", view);
    selector->prefill(view);
    std::vector<Positions> gone = {view.evict(*selector)};
    for (int t = 0; t < 30; ++t) {
      gone.push_back(step(*selector, view));
      CHECK(view.pos.size() <= 16);
      CHECK(view.pos[3] == 3);  // sinks
    }
    return gone;
  };
  const auto plain = run(1, 1, 1);
  CHECK(run(4, 1, 1) == plain);
  CHECK(run(1, 0.125F, 1) == plain);
  CHECK(run(1, 1, 99) == plain);
}

TEST_CASE("infinipot meets the cap within the prompt as it would have token by token", "[more_selectors]") {
  FakeView streamed(60, 45, 6), stepped(60, 20, 6);
  stepped.lanes = streamed.lanes;
  const auto run = [](FakeView& view) {
    view.budget = 20;
    view.whole_prompt();
    auto selector = make("infinipot:block=2,delta=6", view);
    selector->prefill(view);
    view.evict(*selector);
    while (view.now < 59) {
      step(*selector, view);
    }
    return kept(view);
  };
  CHECK(run(streamed) == run(stepped));
}

TEST_CASE("infinipot pools value norms as wide as its rule says", "[more_selectors]") {
  const Pos n = 12;
  FakeView view(n, n, 2);
  view.lanes[0].v.setZero();
  view.lanes[0].v(6, 0) = 7;
  view.budget = n - 1;
  const std::string text = "infinipot:sink=0,tar_ratio=0,prompt=once";
  const auto scores_at = [&](const std::string& settings, int layer) {
    view.whole_prompt();
    const Method m = parse_method(text + settings);
    SetShape shape = view.shape();
    shape.layer = layer;
    shape.n_model_layers = 8;
    const auto selector = m.select.info->select(m.select.config().get(), shape);
    selector->prefill(view);
    const auto s = scores(*selector, view);
    return std::count_if(s.begin(), s.end(), [](float x) { return x > 0; });
  };
  CHECK(scores_at("", 0) == 1);
  CHECK(scores_at(",pooling=kernel,kernel=5", 0) == 5);
  CHECK(scores_at(",pooling=layer", 1) == 7);
  CHECK(scores_at(",pooling=layer", 2) == 5);
  CHECK(scores_at(",pooling=layer", 5) == 3);
  CHECK(scores_at(",pooling=layer", 7) == 1);
  // Deviation over mean of (7, eleven zeros): sqrt(11) = 3.3166
  CHECK(scores_at(",pooling=variation", 0) == 1);
  CHECK(scores_at(",pooling=variation,tau1=3.32,tau2=4,tau3=5", 0) == 7);
  CHECK(scores_at(",pooling=variation,tau1=3.31,tau2=4,tau3=5", 0) == 5);
  CHECK(scores_at(",pooling=variation,tau1=1,tau2=3.31,tau3=5", 0) == 3);
  CHECK_THROWS_WITH(parse_method("infinipot:kernel=4"), Catch::Contains("kernel=4"));
}

TEST_CASE("equal keys, one token and a budget of one are legal for all of them", "[more_selectors]") {
  for (const std::string text : {"morphkv", "rpc", "longflow", "vatp", "scissorhands", "expected", "infinipot",
                                 "infinipot:mapping=nearest,block=1", "morphkv:obs_window=1,heads=joint"}) {
    for (const Pos prompt : {1, 9}) {
      FakeView view(prompt + 8, prompt, 4, 2, 2);
      for (auto& lane : view.lanes) {
        lane.k.setConstant(100);
        lane.q *= 1000;
      }
      view.budget = 1;
      INFO(text << " after " << prompt);
      view.whole_prompt();
      auto selector = make(text, view);
      selector->prefill(view);
      view.evict(*selector);
      for (int t = 0; t < 8; ++t) {
        view.append();
        selector->observe(view);
        for (const float s : scores(*selector, view)) {
          CHECK_FALSE(std::isnan(s));
        }
        view.evict(*selector);
        CHECK((view.pos.size() <= 1 || text == "rpc"));
      }
    }
  }
}
