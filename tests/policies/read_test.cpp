#include <catch2/catch.hpp>
#include <set>

#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

std::unique_ptr<Reader> make(const std::string& part, const FakeView& view, int layer = 5) {
  const Method m = parse_method("full+" + part);
  SetShape shape = view.shape();
  shape.layer = layer;
  return m.read->info->read(m.read->config().get(), shape);
}

std::set<int> chosen(Reader& reader, const FakeView& view, int lane = 0, int head = 0) {
  std::vector<int> slots;
  reader.choose(view, lane, head, slots);
  const std::set<int> unique(slots.begin(), slots.end());
  CHECK(unique.size() == slots.size());
  return unique;
}

std::set<int> range(int begin, int end) {
  std::set<int> s;
  for (int i = begin; i < end; ++i) {
    s.insert(i);
  }
  return s;
}

}  // namespace

TEST_CASE("quest reads the pages of highest bound and always the newest") {
  FakeView view(100, 90, 4);
  view.lanes[0].k.setZero();
  view.lanes[0].q.setZero();
  view.lanes[0].q.col(0).setConstant(1);
  view.lanes[0].k(20, 0) = 5;   // page 2
  view.lanes[0].k(41, 0) = 4;   // page 5
  view.lanes[0].k(70, 0) = -9;  // a large key of the wrong sign
  view.budget = 24;
  view.whole_prompt();
  view.append();
  auto quest = make("quest:page=8,min_pages=1", view);
  auto expected = range(16, 24);
  expected.merge(range(40, 48));
  expected.merge(range(88, 91));
  CHECK(chosen(*quest, view) == expected);
  CHECK(quest->metadata_bytes(91) == 12 * 2 * 4 * 2);
}

TEST_CASE("a page's bound is at least the logit of each of its keys") {
  FakeView view(200, 199, 16, 2);
  view.budget = 16;
  view.whole_prompt();
  view.append();
  auto quest = make("quest:page=8,min_pages=1", view);
  for (int head = 0; head < 2; ++head) {
    const Eigen::RowVectorXf q = view.queries(0, 1).row(head);
    std::vector<float> bound(25);
    for (int page = 0; page < 25; ++page) {
      const MatF k = view.lanes[0].k.middleRows(page * 8, 8);
      for (int c = 0; c < 16; ++c) {
        bound[static_cast<std::size_t>(page)] += std::max(q[c] * k.col(c).maxCoeff(), q[c] * k.col(c).minCoeff());
      }
      CHECK(bound[static_cast<std::size_t>(page)] >= (k * q.transpose()).maxCoeff() - 1e-4F);
    }
    const int best = static_cast<int>(std::max_element(bound.begin(), bound.end() - 1) - bound.begin());
    auto expected = range(best * 8, best * 8 + 8);
    expected.merge(range(192, 200));
    CHECK(chosen(*quest, view, 0, head) == expected);
  }
}

TEST_CASE("quest reads at least min_pages, everything when the budget allows, and dense layers in full") {
  FakeView view(100, 96, 8);
  view.budget = 1;
  view.whole_prompt();
  view.append();
  CHECK(chosen(*make("quest:page=16", view), view).size() == 33);  // 3 pages, the newest of one token
  view.budget = 200;
  CHECK(chosen(*make("quest", view), view) == range(0, 97));
  view.budget = 1;
  CHECK(chosen(*make("quest:dense_layers=6", view), view) == range(0, 97));
}

TEST_CASE("quest passes over pages that were evicted, and follows keys that were rewritten") {
  FakeView view(64, 60, 4);
  view.lanes[0].k.setZero();
  view.lanes[0].q.setZero();
  view.lanes[0].q.col(0).setConstant(1);
  view.lanes[0].k(3, 0) = 50;
  view.budget = 16;
  view.whole_prompt();
  view.append();
  auto quest = make("quest:page=8,min_pages=1", view);
  CHECK(chosen(*quest, view).count(3) == 1);
  std::vector<Pos> rest;
  for (Pos p = 8; p <= 60; ++p) {
    rest.push_back(p);
  }
  view.set_slots(rest);
  view.append();
  Eigen::VectorXf k = Eigen::VectorXf::Zero(4);
  k[0] = 9;
  view.rewrite(0, 12, k, k, 0, 0);  // position 20, page 2
  const std::vector<Pos> rewritten{20};
  view.rewritten = rewritten;
  auto expected = range(8, 16);  // slots of positions 16..23
  expected.merge(range(48, 54));
  CHECK(chosen(*quest, view) == expected);
}

TEST_CASE("topk reads the tokens of highest attention, for a KV head or for each query head") {
  FakeView view(80, 60, 8, 4);
  view.budget = 10;
  view.whole_prompt();
  view.append();
  const auto best = [&](const std::vector<float>& a) {
    std::vector<int> order(a.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int i, int j) { return a[static_cast<std::size_t>(i)] > a[static_cast<std::size_t>(j)]; });
    return std::set<int>(order.begin(), order.begin() + 10);
  };
  std::vector<float> a(61);
  view.attention(a);
  auto shared = make("topk", view);
  for (int head = 0; head < 4; ++head) {
    CHECK(chosen(*shared, view, 0, head) == best(a));
  }
  auto own = make("topk:per=query_head", view);
  for (int head = 0; head < 4; ++head) {
    view.head_attention(0, head, a);
    CHECK(chosen(*own, view, 0, head) == best(a));
  }
  view.append();
  a.resize(62);
  view.attention(a);
  CHECK(chosen(*shared, view) == best(a));
  CHECK(chosen(*make("topk:budget=100", view), view) == range(0, 62));
}

TEST_CASE("in a layer-wide set topk chooses for each lane by its own heads") {
  FakeView view(40, 30, 8, 2, 3);
  view.budget = 1;
  view.whole_prompt();
  view.append();
  auto topk = make("topk", view);
  for (int lane = 0; lane < 3; ++lane) {
    Eigen::ArrayXf sum = Eigen::ArrayXf::Zero(31), one(31);
    for (int head = 0; head < 2; ++head) {
      view.head_attention(lane, head, {one.data(), 31});
      sum += one;
    }
    Eigen::Index best = 0;
    sum.maxCoeff(&best);
    for (int head = 0; head < 2; ++head) {
      CHECK(chosen(*topk, view, lane, head) == std::set<int>{static_cast<int>(best)});
    }
  }
}
