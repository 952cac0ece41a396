// Encoders of kept tokens: their numbers as the literature or arithmetic gives them, and their bytes.
#include <catch2/catch.hpp>
#include <numbers>
#include <set>

#include "policies/method.hpp"
#include "policies/rewrite/lloyd_max.hpp"
#include "policies/rewrite/quantise.hpp"
#include "policies/rewrite/random_rotation.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;
using test::random_matrix;

namespace {

std::unique_ptr<Rewriter> make(const std::string& part, const FakeView& view, std::uint64_t seed = 0) {
  const Method m = parse_method("full:scope=layer+" + part);
  SetShape shape = view.shape();
  shape.seed = seed;
  return m.rewrite->info->rewrite(m.rewrite->config().get(), shape);
}

struct Errors {
  double key = 0, value = 0;  // squared, relative to the squared norm
};
Errors errors_of(const FakeView& view) {
  Errors e;
  double k = 0, v = 0;
  for (int lane = 0; lane < view.n_lanes; ++lane) {
    const FakeView::Lane& l = view.lanes[static_cast<std::size_t>(lane)];
    for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
      const Pos p = view.pos[static_cast<std::size_t>(i)];
      e.key += (view.key(lane, i).transpose() - l.k.row(p)).cast<double>().squaredNorm();
      e.value += (view.value(lane, i).transpose() - l.v.row(p)).cast<double>().squaredNorm();
      k += l.k.row(p).cast<double>().squaredNorm();
      v += l.v.row(p).cast<double>().squaredNorm();
    }
  }
  return {e.key / k, e.value / v};
}
// Of a prompt of standard normal numbers.
Errors relative_mse(const std::string& part, int n_tokens = 2048, int n_lanes = 1) {
  FakeView view(n_tokens, n_tokens, 128, 1, n_lanes);
  view.whole_prompt();
  make(part, view)->step(view);
  return errors_of(view);
}

double quantiser_mse(const Quantiser& q, Eigen::Index group) {
  const MatF x = random_matrix(4096, 128, 7);
  double error = 0;
  for (Eigen::Index r = 0; r < x.rows(); ++r) {
    Eigen::VectorXf row = x.row(r);
    q.apply(row, group);
    error += (row.transpose() - x.row(r)).cast<double>().squaredNorm();
  }
  return error / x.cast<double>().squaredNorm();
}

int n_changed(const FakeView& view, bool keys) {
  int n = 0;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    const auto p = view.pos[static_cast<std::size_t>(i)];
    n += keys ? view.key(0, i).transpose() != view.lanes[0].k.row(p)
              : view.value(0, i).transpose() != view.lanes[0].v.row(p);
  }
  return n;
}

}  // namespace

TEST_CASE("min-max quantising of normal numbers errs as much as it should", "[encoding]") {
  CHECK(quantiser_mse({2}, 32) == Approx(0.1534).epsilon(0.01));
  CHECK(quantiser_mse({2}, 128) == Approx(0.2475).epsilon(0.02));
  CHECK(quantiser_mse({3}, 32) == Approx(0.0281).epsilon(0.01));
  CHECK(quantiser_mse({3}, 128) == Approx(0.0453).epsilon(0.02));
  CHECK(quantiser_mse({4}, 32) == Approx(0.0061).epsilon(0.01));
  CHECK(quantiser_mse({4}, 128) == Approx(0.0099).epsilon(0.01));
  CHECK(quantiser_mse({8}, 32) == Approx(2e-5).epsilon(0.25));
  CHECK(quantiser_mse({8}, 128) == Approx(3e-5).epsilon(0.25));
  CHECK(quantiser_mse({16, false, false}, 32) < 1e-9);
}

TEST_CASE("quantisers do the small examples that one can do by hand", "[encoding]") {
  Eigen::VectorXf x(4);
  x << 0, 0.5F, 1.5F, 3;
  Quantiser{2}.apply(x);  // steps of 1; halves go to the even neighbour
  CHECK(x == Eigen::Vector4f(0, 0, 2, 3));
  x << -4, 0.6F, 2, 5;
  Quantiser{3, true, false}.apply(x);  // steps of 5 / 3
  CHECK((x - Eigen::Vector4f(-10.0F / 3, 0, 5.0F / 3, 5)).norm() < 1e-6F);
  x << -4, 1, 0, 3;
  Quantiser{1, true}.apply(x);
  CHECK(x == Eigen::Vector4f(-2, 2, 2, 2));
  x.setConstant(0.1F);
  Quantiser{2}.apply(x);
  CHECK(x == Eigen::Vector4f::Constant(0.1F));
  x.setZero();
  Quantiser{4, true}.apply(x);
  CHECK(x.isZero(0));
  x << -3e5F, 1, 2, 3e5F;  // more than half precision holds
  for (const bool symmetric : {false, true}) {
    for (const int bits : {1, 2, 8}) {
      Eigen::VectorXf y = x;
      Quantiser{bits, symmetric}.apply(y);
      CHECK(y.allFinite());
    }
  }
  CHECK(Quantiser{4}.bytes(128, 4) == 128 * 4 / 8.0 + 16);
  CHECK(Quantiser{4, true}.bytes(128, 4) == 128 * 4 / 8.0 + 8);
}

TEST_CASE("rounding noise raises a logit's exponential by as much as it should", "[encoding]") {
  // 128 channels, |q| = 1 with scale 128^-1/2 folded in, range 4: .06 at 2 bit, .003 at 4 bit.
  const MatF q = MatF::Constant(3, 128, 1 / std::sqrt(128.0F));
  CHECK(noise_bias(q, Eigen::ArrayXf::Constant(128, 4.0F / 3)) == Approx(0.074).epsilon(0.01));
  CHECK(noise_bias(q, Eigen::ArrayXf::Constant(128, 4.0F / 15)) == Approx(0.003).epsilon(0.02));
  CHECK(noise_bias(1e6F * q, Eigen::ArrayXf::Constant(128, 4.0F)) > 1e6F);
}

TEST_CASE("Lloyd-Max levels of normal numbers and of polar angles", "[encoding]") {
  const auto check = [](const std::vector<float>& found, const std::vector<double>& expected, double margin = 6e-5) {
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(found[i] == Approx(expected[i]).margin(margin));
    }
  };
  const auto normal = [](double x) { return std::exp(-x * x / 2); };
  const auto upper = [](std::vector<float> levels) {
    for (std::size_t i = 0; i < levels.size(); ++i) {
      CHECK(levels[i] == Approx(-levels[levels.size() - 1 - i]).margin(1e-6));
    }
    levels.erase(levels.begin(), levels.begin() + static_cast<std::ptrdiff_t>(levels.size() / 2));
    return levels;
  };
  check(upper(lloyd_max(normal, -8, 8, 2)), {.7979});
  check(upper(lloyd_max(normal, -8, 8, 4)), {.4528, 1.5104});
  check(upper(lloyd_max(normal, -8, 8, 8)), {.2451, .7560, 1.3439, 2.1519});
  check(upper(lloyd_max(normal, -8, 8, 16)), {.1284, .3880, .6568, .9423, 1.2562, 1.6180, 2.0690, 2.7326});
  const auto polar = [](int power) {
    return lloyd_max([power](double x) { return std::pow(std::sin(2 * x), power); }, 0, std::numbers::pi / 2, 4);
  };
  // The literature's fourth digit is off by up to three: by symmetry about pi / 4 levels add up to pi / 2 in pairs.
  check(polar(1), {.3096, .6338, .9366, 1.2609}, 3.5e-4);
  check(polar(3), {.4260, .6741, .8962, 1.1444}, 3.5e-4);
  check(polar(7), {.5240, .7057, .8647, 1.0464}, 3.5e-4);
  for (const int power : {1, 3, 7}) {
    const std::vector<float> levels = polar(power);
    CHECK(levels[0] + levels[3] == Approx(std::numbers::pi / 2).margin(1e-6));
    CHECK(levels[1] + levels[2] == Approx(std::numbers::pi / 2).margin(1e-6));
  }
}

TEST_CASE("the nearest level, on a line and around a circle", "[encoding]") {
  const std::vector<float> levels{0.5F, 2, 3};
  CHECK(nearest_level(levels, -9) == 0);
  CHECK(nearest_level(levels, 1.2F) == 0);
  CHECK(nearest_level(levels, 1.3F) == 1);
  CHECK(nearest_level(levels, 9) == 2);
  CHECK(nearest_level(levels, 3.9F, 4) == 0);
  CHECK(nearest_level(levels, 3.7F, 4) == 2);
  CHECK(nearest_level({3, 3.9F}, 0.1F, 4) == 1);
}

TEST_CASE("random rotations keep lengths and are the same for the same seed", "[encoding]") {
  for (const int dim : {1, 12, 64, 96}) {
    for (const MatF& m : {random_rotation(dim, 3), random_hadamard(dim, 3)}) {
      CHECK((m * m.transpose() - MatF::Identity(dim, dim)).norm() < 1e-4F);
    }
    CHECK(random_rotation(dim, 3) == random_rotation(dim, 3));
    CHECK(random_rotation(dim, 3) != random_rotation(dim, 4));
  }
  CHECK((random_hadamard(64, 3).array().abs() - 0.125F).isZero(1e-6F));
}

TEST_CASE("turboquant's relative error is that of its levels", "[encoding]") {
  const std::string rotation = GENERATE(",rotation=gaussian", ",rotation=hadamard");
  const double expected[] = {.3634, .1175, .03455, .00950};
  for (int bits = 1; bits <= 4; ++bits) {
    INFO(bits << rotation);
    const Errors e = relative_mse("turboquant:outliers=0,bits=" + std::to_string(bits) + rotation);
    // Coordinates of a unit vector in 128 dimensions have slightly lighter tails than normal numbers.
    CHECK(e.key == Approx(expected[bits - 1]).epsilon(0.03));
    CHECK(e.value == Approx(expected[bits - 1]).epsilon(0.03));
    CHECK(e.key < std::sqrt(3.0) * std::numbers::pi / 2 * std::pow(4, -bits));
  }
}

TEST_CASE("turboquant does not care for channels out of line, min-max quantising of tokens does", "[encoding]") {
  FakeView view(1024, 1024, 128), kivi(1024, 1024, 128);
  for (FakeView* v : {&view, &kivi}) {
    v->lanes[0].v.leftCols(2) *= 30;
    v->whole_prompt();
  }
  make("turboquant:outliers=0,bits=2", view)->step(view);
  make("kivi:bits=2,group=128", kivi)->step(kivi);
  CHECK(errors_of(view).value == Approx(.1175).epsilon(0.1));
  const auto rest = [](const FakeView& v) {  // error of the ordinary channels
    double error = 0;
    for (int i = 0; i < 512; ++i) {
      error += (v.value(0, i).transpose() - v.lanes[0].v.row(i)).tail(126).cast<double>().squaredNorm();
    }
    return error / v.lanes[0].v.topRows(512).rightCols(126).cast<double>().squaredNorm();
  };
  CHECK(rest(kivi) > 0.9);
}

TEST_CASE("turboquant's outlier channels get the extra bit", "[encoding]") {
  FakeView view(1024, 1024, 128);
  view.lanes[0].k(Eigen::all, Eigen::seq(0, 127, 4)) *= 20;
  view.whole_prompt();
  make("turboquant:bits=2", view)->step(view);
  double large = 0, all = 0;
  for (int i = 0; i < 1024; ++i) {
    const Eigen::RowVectorXf off = view.key(0, i).transpose() - view.lanes[0].k.row(i);
    large += off(Eigen::seq(0, 127, 4)).squaredNorm();
    all += view.lanes[0].k.row(i)(Eigen::seq(0, 127, 4)).squaredNorm();
  }
  CHECK(large / all == Approx(.03455).epsilon(0.06));      // of 32 dimensions alone
  const double encoded = (96 * 2 + 32 * 3) / 8.0 + 2 * 2;  // 2.25 bit and two norms
  CHECK(view.bytes(0, 0) == Approx(2 * encoded));
}

TEST_CASE("turboquant's sketch makes inner products unbiased, and its variance is bounded", "[encoding]") {
  constexpr int kDim = 64, kSeeds = 600;
  const FakeView view(2, 2, kDim);
  const Eigen::VectorXf q = view.lanes[0].q.row(0);
  const double truth = static_cast<double>(q.dot(view.lanes[0].k.row(0)));
  const auto estimates = [&](const std::string& keys) {
    Eigen::ArrayXd x(kSeeds);
    for (int s = 0; s < kSeeds; ++s) {
      FakeView one(2, 2, kDim);
      one.whole_prompt();
      make("turboquant:bits=2,outliers=0,keys=" + keys, one, static_cast<std::uint64_t>(s))->step(one);
      x[s] = static_cast<double>(q.dot(one.key(0, 0)));
    }
    return x;
  };
  const Eigen::ArrayXd sketched = estimates("inner_product");
  const double variance = (sketched - sketched.mean()).square().mean();
  const double bound = std::numbers::pi / (2 * kDim) * .3634 *
                       static_cast<double>(view.lanes[0].k.row(0).squaredNorm() * q.squaredNorm());
  CHECK(std::abs(sketched.mean() - truth) < 4 * std::sqrt(variance / kSeeds));
  CHECK(variance < 1.15 * bound);
  // Without it they shrink by the relative error of two bits, on average.
  double bytes = 0;
  const auto slope = [&](const std::string& keys) {
    FakeView many(2048, 2048, kDim);
    many.whole_prompt();
    make("turboquant:bits=2,outliers=0" + keys, many)->step(many);
    double xy = 0, xx = 0;
    for (int i = 0; i < 2048; ++i) {
      xy += static_cast<double>(many.key(0, i).dot(many.lanes[0].k.row(i)));
      xx += static_cast<double>(many.lanes[0].k.row(i).squaredNorm());
    }
    bytes = many.bytes(0, 0);
    return xy / xx;
  };
  CHECK(slope("") == Approx(1 - .1175).epsilon(0.01));
  CHECK(slope(",rescale=true") == Approx(1).epsilon(0.01));
  CHECK(bytes == 2 * (kDim * 2 / 8.0 + 2));
  CHECK(slope(",keys=inner_product") == Approx(1).epsilon(0.02));
  CHECK(bytes == kDim * 2 / 8.0 + 4 + kDim * 2 / 8.0 + 2);
}

TEST_CASE("polarquant's relative error at 3.875 bits, and its bytes", "[encoding]") {
  const Errors e = relative_mse("polarquant");
  CHECK(e.key == Approx(.0321).epsilon(0.02));
  CHECK(e.value == Approx(.0321).epsilon(0.02));
  const Errors fitted = relative_mse("polarquant:codebook=kmeans");
  CHECK(fitted.key == Approx(.0321).epsilon(0.03));
  CHECK(fitted.key <= e.key * 1.001);
  FakeView view(20, 16, 128);
  view.whole_prompt();
  auto polar = make("polarquant", view);
  polar->step(view);
  CHECK(view.bytes(0, 0) == 2 * 128 * 3.875 / 8);
  CHECK(n_changed(view, true) == 16);
  view.append();
  polar->step(view);
  CHECK(n_changed(view, true) == 16);  // what is generated stays exact
  auto all = make("polarquant:generated=true,what=values", view);
  all->step(view);
  CHECK(n_changed(view, false) == 17);
  CHECK(view.bytes(0, 16) == 2 * 128 + 128 * 3.875 / 8);
}

TEST_CASE("online codebooks fit angles that the rotation did not even out", "[encoding]") {
  const auto error = [](const std::string& part) {
    FakeView view(512, 512, 64);
    view.lanes[0].k.array() += 3;  // without a rotation angles gather about a few places
    view.whole_prompt();
    make(part, view)->step(view);
    return errors_of(view).key;
  };
  CHECK(error("polarquant:rotate=false,codebook=kmeans") < 0.5 * error("polarquant:rotate=false"));
}

TEST_CASE("tada's compression ratio, by heads and bits", "[encoding]") {
  const auto ratio = [](int heads, int bits, const std::string& more = "") {
    FakeView view(8, 8, 128, 1, heads);
    view.whole_prompt();
    make("tada:residual=8,bits=" + std::to_string(bits) + more, view)->step(view);
    return view.bytes(0, 0) / (2 * 128 * 2);
  };
  CHECK(ratio(32, 2) == Approx(.172).margin(5e-4));
  CHECK(ratio(32, 4) == Approx(.297).margin(5e-4));
  CHECK(ratio(32, 8) == Approx(.547).margin(5e-4));
  CHECK(ratio(8, 2) == Approx(.266).margin(5e-4));
  CHECK(ratio(8, 4) == Approx(.391).margin(5e-4));
  CHECK(ratio(8, 8) == Approx(.641).margin(5e-4));
  CHECK(ratio(4, 4) == Approx(.516).margin(5e-4));
  CHECK(ratio(8, 4, ",symmetric=true") == Approx(1.0 / 8 + 4 / 16.0 + 1.0 / 128));
  CHECK(ratio(8, 4, ",centre=tokens") == Approx(1.0 / 8 + 4 / 16.0 + 2.0 / 128));  // a mean for eight tokens
  CHECK(ratio(8, 4, ",centre=none") == Approx(4 / 16.0 + 2.0 / 128));
}

TEST_CASE("tada gains where heads are alike, and only there", "[encoding]") {
  const auto error = [](double alike, const std::string& centre) {
    FakeView view(256, 256, 64, 1, 8);
    const MatF shared = random_matrix(256, 64, 99);
    for (FakeView::Lane& l : view.lanes) {
      l.k = static_cast<float>(std::sqrt(alike)) * shared + static_cast<float>(std::sqrt(1 - alike)) * l.k;
    }
    view.whole_prompt();
    make("tada:bits=2,centre=" + centre, view)->step(view);
    return errors_of(view).key;
  };
  CHECK(error(0.9, "heads") < 0.15 * error(0.9, "none"));
  CHECK(error(0, "heads") > 0.7 * error(0, "none"));
  CHECK(relative_mse("tada:bits=8", 256, 4).key < 1e-4);
}

TEST_CASE("a mean over tokens takes off what all keys share", "[encoding]") {
  FakeView view(256, 256, 64);
  view.lanes[0].k.rowwise() += 20 * random_matrix(1, 64, 5).row(0);
  FakeView plain = view;
  for (FakeView* v : {&view, &plain}) {
    v->whole_prompt();
  }
  make("tada:bits=4,centre=tokens", view)->step(view);
  make("tada:bits=4,centre=none", plain)->step(plain);
  CHECK(errors_of(view).key < 0.02 * errors_of(plain).key);
}

TEST_CASE("encoders keep their exact tokens, batches and halves", "[encoding]") {
  FakeView view(60, 20, 16, 1, 2);
  view.whole_prompt();
  auto tada = make("tada:residual=8", view);
  tada->step(view);
  CHECK(n_changed(view, true) == 16);
  for (int i = 0; i < 5; ++i) {
    CHECK(n_changed(view, false) == (i < 4 ? 16 : 24));
    view.append();
    tada->step(view);
  }
  FakeView turbo(60, 20, 16);
  turbo.whole_prompt();
  auto quant = make("turboquant:residual=6,what=keys", turbo);
  quant->step(turbo);
  CHECK(n_changed(turbo, true) == 14);
  turbo.set_slots({3, 5, 14, 15, 16, 17, 18, 19});  // eviction moves nothing
  turbo.append();
  quant->step(turbo);
  CHECK(n_changed(turbo, true) == 3);
  CHECK(n_changed(turbo, false) == 0);
  CHECK(turbo.bytes(0, 0) == 12 * 3 / 8.0 + 4 * 4 / 8.0 + 4 + 16 * 2);
  FakeView kivi(60, 60, 16);
  kivi.whole_prompt();
  make("kivi:group=4,residual=8,what=values", kivi)->step(kivi);
  CHECK(n_changed(kivi, true) == 0);
  CHECK(n_changed(kivi, false) == 52);
}

TEST_CASE("vectors without a direction and huge ones stay finite", "[encoding]") {
  for (const std::string part :
       {"turboquant:keys=inner_product", "turboquant:outliers=1", "polarquant", "polarquant:codebook=kmeans",
        "polarquant:levels=1", "tada:residual=1", "tada:residual=1,symmetric=true,centre=tokens", "kivi:residual=32",
        "kivi:residual=32,debias=4"}) {
    for (const float size : {0.0F, 1.0F, 1e9F}) {
      INFO(part << " at " << size);
      FakeView view(40, 40, 24);
      view.lanes[0].k.setConstant(size);
      view.lanes[0].v *= size;
      view.whole_prompt();
      make(part, view)->step(view);
      for (int i = 0; i < 40; ++i) {
        CHECK(view.key(0, i).allFinite());
        CHECK(view.value(0, i).allFinite());
      }
    }
  }
}

TEST_CASE("what joins heads asks for one set for all of them", "[encoding]") {
  CHECK_THROWS_WITH(parse_method("full+tada"), Catch::Contains("write scope=layer at 'full'"));
  CHECK_NOTHROW(parse_method("full:scope=layer+tada"));
}
