#include "analysis/search.hpp"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "policies/errors.hpp"
#include "policies/values.hpp"

using namespace kvreplay;

namespace {

Axis axis(const std::string& method, const std::string& text) { return Axis::parse(text, method, params_of(method)); }

double number(const std::string& text) {
  double x = 0;
  REQUIRE(parse_number(text, x));
  return x;
}

SearchOptions options_of(int n, int rounds, std::uint64_t seed = 0) {
  return {.n_candidates = n, .n_rounds = rounds, .seed = seed, .identity = [](const std::vector<std::string>& values) {
            std::string all;
            for (const std::string& v : values) {
              all += v + ";";
            }
            return std::optional(all);
          }};
}

void refuses(const std::string& method, const std::string& text, const std::vector<std::string>& words) {
  INFO("param " << text);
  try {
    axis(method, text);
    FAIL("was accepted");
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    INFO(what);
    for (const std::string& word : words) {
      CHECK(what.find(word) != std::string::npos);
    }
  }
}

}  // namespace

TEST_CASE("a parameter's range has the scale that the parameter declares, or the one written") {
  const Axis alpha = axis("moment-kv", "alpha=0.3:0.995");
  CHECK(alpha.scale == Scale::one_minus);
  CHECK(alpha.at(0) == "0.3");
  CHECK(alpha.at(1) == "0.995");
  // Even in the logarithm of 1 - alpha: the middle keeps sqrt(0.7 * 0.005).
  CHECK(number(alpha.at(0.5)) == Approx(1 - std::sqrt(0.7 * 0.005)).epsilon(1e-3));
  CHECK(alpha.place(0.3) == 0);
  CHECK(alpha.place(1 - std::sqrt(0.7 * 0.005)) == Approx(0.5));
  CHECK(number(axis("moment-kv", "alpha=0.2:0.6:lin").at(0.25)) == Approx(0.3));
  const Axis window = axis("h2o", "window=0:63");
  CHECK(window.scale == Scale::log);
  CHECK(window.at(0) == "0");
  CHECK(window.at(0.5) == "7");  // whole numbers from 0: logarithm of one more
  CHECK(axis("h2o", "window=10%:90%:lin").at(0.5) == "50%");
  CHECK(axis("h2o", "window=4,50%,16").values == std::vector<std::string>{"4", "50%", "16"});
  CHECK(axis("h2o", "mass=sum,mean").values == std::vector<std::string>{"sum", "mean"});
  CHECK(axis("tova", "pin_newest=0,1").values == std::vector<std::string>{"false", "true"});
  CHECK(axis("h2o", "interval=1:8").param.engine);
  CHECK(axis("snapkv:budget=64/h2o", "prefill.kernel=3,5").param.prefill);
  CHECK(axis("momentkv", "adakv.alpha=0:1:lin").param.part->name == "adakv");
}

TEST_CASE("a range that cannot be is refused with its bounds") {
  refuses("moment-kv", "alpha=0.3:1.5", {"alpha=1.5", "0 to 1"});
  refuses("moment-kv", "alpha=0.3:1", {"one_minus", "below 1"});
  refuses("moment-kv", "alpha=0.5:0.3", {"0.5", "not below", "0.3"});
  refuses("moment-kv", "alhpa=0.3:0.9", {"'alhpa'", "'alpha'"});
  refuses("moment-kv", "alpha", {"LO:HI", "0 to 1"});
  refuses("moment-kv", "alpha=0.3:0.9:logg", {"'logg'", "'log'"});
  refuses("moment-kv", "alpha=0:0.9:log", {"logarithm", ":lin"});
  refuses("h2o", "window=1:50%", {"percent"});
  refuses("h2o", "window=1.5:4", {"whole number"});
  refuses("h2o", "mass=sum,men", {"'mean'"});
  refuses("h2o/h2o", "h2o.sink=0:4:5:6", {"LO:HI:SCALE"});
}

TEST_CASE("the search finds the smallest value of one range, for every case, and always with the same points") {
  const std::vector<Axis> axes{axis("moment-kv", "alpha=0.3:0.995")};
  const double best[] = {0.61, 0.97};
  int asked = 0;
  const Evaluate evaluate = [&](std::span<const Point> points, int) {
    std::vector<std::vector<double>> values;
    for (const Point& p : points) {
      const double y = std::log(1 - number(p.values[0]));
      values.push_back({std::pow(y - std::log(1 - best[0]), 2), std::abs(y - std::log(1 - best[1]))});
    }
    asked += int(points.size());
    return values;
  };
  const std::vector<Point> points = search(axes, options_of(32, 2), evaluate);
  CHECK(points.size() == 32);
  CHECK(asked < 2 * 32);
  std::set<std::string> distinct;
  for (const Point& p : points) {
    distinct.insert(p.values[0]);
    CHECK(number(p.values[0]) >= 0.3);
    CHECK(number(p.values[0]) <= 0.995);
  }
  CHECK(distinct.size() == 32);
  const double coarse = std::log(0.7 / 0.005) / 15;  // spacing of the first look in the logarithm
  for (const double b : best) {
    double nearest = 9;
    for (const Point& p : points) {
      nearest = std::min(nearest, std::abs(std::log(1 - number(p.values[0])) - std::log(1 - b)));
    }
    CHECK(nearest < coarse / 4);
  }
  const std::vector<Point> again = search(axes, options_of(32, 2), evaluate);
  for (std::size_t i = 0; i < points.size(); ++i) {
    CHECK(points[i].values == again[i].values);
  }
}

TEST_CASE("the search finds the smallest value of two ranges and a list better than its grid") {
  const std::vector<Axis> axes{axis("momentkv", "residual.window=1:256:log"), axis("momentkv", "adakv.alpha=0:1"),
                               axis("momentkv", "safeguard=kvpress,official")};
  const auto f = [](const Point& p) {
    return std::pow(std::log(number(p.values[0]) / 37), 2) / 8 + std::pow(number(p.values[1]) - 0.37, 2) * 4 +
           (p.values[2] == "official" ? 0 : 1);
  };
  const auto best_of = [&](const std::vector<Point>& points) {
    double low = 9;
    for (const Point& p : points) {
      low = std::min(low, f(p));
    }
    return low;
  };
  const Evaluate evaluate = [&](std::span<const Point> points, int) {
    std::vector<std::vector<double>> values;
    for (const Point& p : points) {
      values.push_back({f(p)});
    }
    return values;
  };
  for (const std::uint64_t seed : {0, 1, 2}) {
    const double refined = best_of(search(axes, options_of(64, 3, seed), evaluate));
    const double grid = best_of(search(axes, options_of(64, 0, seed), evaluate));
    CHECK(refined < grid);
    CHECK(refined < 0.02);
  }
}

TEST_CASE("whole numbers count once, what cannot be is left out, flat values spread") {
  const std::vector<Axis> axes{axis("snapkv", "kernel=1:9")};
  SearchOptions options = options_of(32, 2);
  options.identity = [](const std::vector<std::string>& values) -> std::optional<std::string> {
    const int kernel = std::stoi(values[0]);
    return kernel % 2 == 1 ? std::optional(values[0]) : std::nullopt;
  };
  const Evaluate flat = [](std::span<const Point> points, int) {
    return std::vector<std::vector<double>>(points.size(), {0.0});
  };
  const std::vector<Point> points = search(axes, options, flat);
  std::set<std::string> values;
  for (const Point& p : points) {
    values.insert(p.values[0]);
  }
  CHECK(values == std::set<std::string>{"1", "3", "5", "7", "9"});
  CHECK(points.size() == 5);

  const std::vector<Axis> wide{axis("moment-kv", "alpha=0.3:0.995")};
  CHECK(search(wide, options_of(12, 1), flat).size() == 12);
  const std::vector<Axis> many{axis("momentkv", "residual.window=1:256:log"), axis("momentkv", "adakv.alpha=0:1"),
                               axis("momentkv", "residual.sink=0:8"), axis("momentkv", "obs_window=8:64")};
  CHECK(search(many, options_of(20, 2), flat).size() == 20);  // too many ranges for a grid: a sample
}
