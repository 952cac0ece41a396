// Whitelists and quotas of named spans, and the shares that quotas come from.
#include <catch2/catch.hpp>
#include <numeric>

#include "policies/method.hpp"
#include "policies/shares.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Positions = std::vector<Pos>;
using Spans = std::vector<TokenSpan>;

std::unique_ptr<Allocator> make(const std::string& part) {
  const Method m = parse_method("h2o+" + part);
  return m.allocate->info->allocate(m.allocate->config().get());
}

// A prompt of n tokens that an allocator and these scores cut to n_kept: who stays.
Positions cut(const std::string& part, const Spans& spans, int n_kept, std::vector<float> scores) {
  FakeView view(static_cast<int>(scores.size()) + 1, static_cast<int>(scores.size()), 2);
  view.whole_prompt();
  const int n_drop = static_cast<int>(scores.size()) - n_kept;
  make(part)->over_tokens(view, spans, n_drop, scores);
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int i) { return scores[static_cast<std::size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score(a) < score(b); });
  Positions kept(order.begin() + n_drop, order.end());
  std::sort(kept.begin(), kept.end());
  return kept;
}

int count(const Positions& kept, Pos begin, Pos end) {
  return static_cast<int>(std::count_if(kept.begin(), kept.end(), [&](Pos p) { return p >= begin && p < end; }));
}

// Scores that rise with position: by themselves they keep the end of the prompt.
std::vector<float> rising(int n) {
  std::vector<float> s(static_cast<std::size_t>(n));
  std::iota(s.begin(), s.end(), 1.0F);
  return s;
}

}  // namespace

TEST_CASE("shares are in proportion, whole, and give what is too much to the others") {
  const auto shares = [](int total, std::vector<double> weights, std::vector<int> most, Leftover l = {}) {
    return split(total, weights, most, l);
  };
  CHECK(shares(10, {1, 1, 2}, {100, 100, 100}) == std::vector<int>{3, 2, 5});  // 2.5, 2.5, 5: of equals the first
  CHECK(shares(10, {0.5, 0.31, 0.19}, {100, 100, 100}) == std::vector<int>{5, 3, 2});
  CHECK(shares(10, {38, 62}, {100, 100}) == std::vector<int>{4, 6});
  CHECK(shares(10, {38, 62}, {100, 100}, Leftover::last) == std::vector<int>{3, 7});
  CHECK(shares(10, {9, 1, 1}, {4, 100, 100}) == std::vector<int>{4, 3, 3});
  CHECK(shares(10, {9, 1, 0}, {4, 3, 100}) == std::vector<int>{4, 3, 3});
  CHECK(shares(10, {0, 0}, {100, 100}) == std::vector<int>{5, 5});
  CHECK(shares(10, {1, 1}, {2, 3}) == std::vector<int>{2, 3});
  CHECK(shares(0, {1, 1}, {2, 3}) == std::vector<int>{0, 0});
  CHECK(shares(7, {3, 4}, {7, 7}) == std::vector<int>{3, 4});
}

TEST_CASE("fair gives the quotas of the authors' code") {
  const auto kept = [](int n, int n_kept, Pos border) {
    const Positions p = cut("fair", {{"x", 0, border}, {"y", border, n}}, n_kept, rising(n));
    return std::pair(count(p, 0, border), count(p, border, n));
  };
  CHECK(kept(100, 50, 30) == std::pair(15, 35));
  CHECK(kept(101, 63, 60) == std::pair(37, 26));  // int(101 * (1 - 0.37)) = 63
  const Spans spans{{"x", 0, 38}, {"y", 38, 100}};
  CHECK(count(cut("fair", spans, 10, rising(100)), 0, 38) == 4);
  CHECK(count(cut("fair:rounding=last", spans, 10, rising(100)), 0, 38) == 3);  // floor(10 * 38 / 100)
}

TEST_CASE("fair keeps the best of each span, and the spans reach over the whole prompt") {
  const Spans spans{{"y", 12, 20}, {"x", 4, 10}, {"late", 30, 33}};
  const Positions kept = cut("fair", spans, 10, rising(20));
  // Half of the 10 tokens up to the end of x, of the 2 before y, and of y's 8.
  CHECK(kept == Positions{5, 6, 7, 8, 9, 11, 16, 17, 18, 19});
  CHECK(cut("fair:spans=x:y", spans, 10, rising(20)) == kept);
  // One span is all of the prompt: scores alone decide.
  CHECK(cut("fair:spans=x", spans, 4, rising(20)) == Positions{16, 17, 18, 19});
}

TEST_CASE("fair's strength leads from what scores keep to equal fractions") {
  const Spans spans{{"x", 0, 50}, {"y", 50, 100}};
  const auto of_x = [&](const std::string& keys) { return count(cut("fair" + keys, spans, 40, rising(100)), 0, 50); };
  CHECK(of_x(":strength=0") == 0);
  CHECK(of_x(":strength=0.25") == 5);
  CHECK(of_x(":strength=0.5") == 10);
  CHECK(of_x("") == 20);
  // By scores, y has all 40.
  CHECK(cut("fair:strength=0", spans, 40, rising(100)) == cut("fair:strength=0,spans=x", spans, 40, rising(100)));
}

TEST_CASE("fair's quotas sum to what is kept, and a span gives what it does not hold to the others") {
  const int n_kept = GENERATE(1, 2, 7, 59, 60);
  const Positions kept = cut("fair", {{"a", 0, 1}, {"b", 1, 3}, {"c", 3, 60}}, n_kept, rising(60));
  CHECK(std::ssize(kept) == n_kept);
  // At a decode step: 3 of span a's 30 tokens are left, so of its quota of 5 two go to others.
  FakeView view(80, 60, 2);
  Positions slots{5, 6, 7};
  for (Pos p = 30; p < 60; ++p) {
    slots.push_back(p);
  }
  view.set_slots(slots);
  view.now = 59;
  view.append();
  std::vector<float> scores(slots.size() + 1, 1.0F);
  make("fair")->over_tokens(view, Spans{{"a", 0, 30}, {"b", 30, 60}}, 24, scores);
  CHECK(std::count(scores.begin(), scores.begin() + 3, -kInf) == 0);
  CHECK(std::count(scores.begin(), scores.end(), -kInf) == 24);
}

TEST_CASE("fair drops protected tokens last, and the older of equals first") {
  std::vector<float> scores(20, 1.0F);
  scores[2] = scores[19] = kInf;
  const Positions kept = cut("fair", {{"x", 0, 10}, {"y", 10, 20}}, 4, scores);
  CHECK(kept == Positions{2, 9, 18, 19});
}

TEST_CASE("whitelist keeps its spans, and the best of the others by score") {
  const Spans spans{{"system", 2, 5}, {"user", 5, 9}, {"system", 12, 13}, {"late", 18, 30}};
  CHECK(cut("whitelist:spans=system", spans, 6, rising(20)) == Positions{2, 3, 4, 12, 18, 19});
  CHECK(cut("whitelist:spans=system", spans, 4, rising(20)) == Positions{2, 3, 4, 12});
  CHECK(cut("whitelist:spans=late:system", spans, 6, rising(20)) == Positions{2, 3, 4, 12, 18, 19});
  std::vector<float> scores = rising(20);
  scores[0] = scores[1] = scores[19] = kInf;  // what a selector protects comes right after the spans
  CHECK(cut("whitelist:spans=system", spans, 6, scores) == Positions{1, 2, 3, 4, 12, 19});
  CHECK(cut("whitelist:spans=system", spans, 4, scores) == Positions{2, 3, 4, 12});
  CHECK_THROWS_WITH(cut("whitelist:spans=system", spans, 3, rising(20)),
                    Catch::Contains("4 tokens") && Catch::Contains("3 may stay"));
}

TEST_CASE("spans that do not fit or are not there are refused") {
  const Spans spans{{"system", 2, 5}, {"user", 5, 9}, {"system", 12, 13}};
  CHECK_THROWS_WITH(parse_method("h2o+whitelist"), Catch::Contains("spans=NAME"));
  CHECK_THROWS_WITH(make("whitelist:spans=sytem")->check_spans(spans, 20, 9),
                    Catch::Contains("'sytem'") && Catch::Contains("system, user"));
  CHECK_THROWS_WITH(make("fair:spans=user:x")->check_spans(spans, 20, 9), Catch::Contains("'x'"));
  CHECK_THROWS_WITH(make("whitelist:spans=system:user")->check_spans(spans, 20, 7),
                    Catch::Contains("8 tokens") && Catch::Contains("budget of 7"));
  CHECK_NOTHROW(make("whitelist:spans=system:user")->check_spans(spans, 20, 8));
  CHECK_NOTHROW(make("whitelist:spans=system:user")->check_spans(spans, 7, 5));  // of the prompt alone
  CHECK_NOTHROW(make("fair")->check_spans(spans, 20, 1));
  CHECK_THROWS_WITH(parse_method("momentum+fair"), Catch::Contains("pinned"));
  CHECK_THROWS_WITH(parse_method("h2o+fair+adakv"), Catch::Contains("at most one"));
  CHECK(parse_method("h2o+fair").needs().spans);
  CHECK(parse_method("h2o+whitelist:spans=a:b").name == "h2o+whitelist:spans=a:b");
}
