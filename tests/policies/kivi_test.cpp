#include <catch2/catch.hpp>
#include <set>

#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;

namespace {

std::unique_ptr<Rewriter> make(const std::string& keys, const FakeView& view) {
  const Method m = parse_method("full+kivi" + keys);
  return m.rewrite->info->rewrite(m.rewrite->config().get(), view.shape());
}

bool key_changed(const FakeView& view, int slot) {
  return view.key(0, slot).transpose() != view.lanes[0].k.row(view.pos[static_cast<std::size_t>(slot)]);
}
bool value_changed(const FakeView& view, int slot) {
  return view.value(0, slot).transpose() != view.lanes[0].v.row(view.pos[static_cast<std::size_t>(slot)]);
}
template <class Changed>
int count(const FakeView& view, Changed changed) {
  int n = 0;
  for (int i = 0; i < static_cast<int>(view.pos.size()); ++i) {
    n += changed(view, i);
  }
  return n;
}

double relative_mse(const std::string& keys, bool of_keys) {
  FakeView view(4096 + 128, 4096 + 128, 128);
  view.whole_prompt();
  make(keys, view)->step(view);
  double error = 0, power = 0;
  for (int i = 0; i < 4096; ++i) {
    const auto& m = of_keys ? view.lanes[0].k : view.lanes[0].v;
    const VecF stored = of_keys ? view.key(0, i) : view.value(0, i);
    error += (stored.transpose() - m.row(i)).cast<double>().squaredNorm();
    power += m.row(i).cast<double>().squaredNorm();
  }
  return error / power;
}

}  // namespace

TEST_CASE("kivi's schedule: a prompt of 1000 with residual 128") {
  FakeView view(1200, 1000, 32);
  view.whole_prompt();
  auto kivi = make("", view);
  kivi->step(view);
  CHECK(count(view, key_changed) == 896);
  CHECK(count(view, value_changed) == 872);
  for (int step = 1; step <= 160; ++step) {
    view.append();
    kivi->step(view);
    INFO("decode step " << step);
    CHECK(count(view, key_changed) == (step < 24 ? 896 : step < 152 ? 1024 : 1152));
    CHECK(count(view, value_changed) == 872 + step);
  }
}

TEST_CASE("a prompt shorter than the residual stays exact") {
  FakeView view(200, 100, 32);
  view.whole_prompt();
  make("", view)->step(view);
  CHECK(count(view, key_changed) == 0);
  CHECK(count(view, value_changed) == 0);
}

TEST_CASE("kivi's relative error on normal numbers is that of min-max quantisation") {
  const bool of_keys = GENERATE(false, true);
  INFO((of_keys ? "keys" : "values"));
  CHECK(relative_mse(":bits=2,group=32", of_keys) == Approx(0.1534).epsilon(0.02));
  CHECK(relative_mse(":bits=2,group=128", of_keys) == Approx(0.2475).epsilon(0.02));
  CHECK(relative_mse(":bits=4,group=32", of_keys) == Approx(0.0061).epsilon(0.02));
  CHECK(relative_mse(":bits=4,group=128", of_keys) == Approx(0.0099).epsilon(0.02));
  CHECK(relative_mse(":bits=3,group=32", of_keys) == Approx(0.0281).epsilon(0.02));
  CHECK(relative_mse(":bits=8,group=32,fp16_constants=false", of_keys) < 3e-5);
  CHECK(relative_mse(":bits=16,group=32,fp16_constants=false", of_keys) < 1e-9);
}

TEST_CASE("keys share constants per channel over tokens, values per token over channels") {
  FakeView view(256, 256, 64);
  view.whole_prompt();
  make(":bits=2,group=32,residual=128", view)->step(view);
  for (int c = 0; c < 64; ++c) {
    std::set<float> levels;
    for (int i = 0; i < 32; ++i) {
      levels.insert(view.key(0, i)[c]);
    }
    CHECK(levels.size() <= 4);
  }
  for (int i = 0; i < 8; ++i) {
    const VecF v = view.value(0, i);
    CHECK(std::set<float>(v.begin(), v.begin() + 32).size() <= 4);
    CHECK(std::set<float>(v.begin(), v.end()).size() > 4);
  }
}

TEST_CASE("bytes count the bits and two half-precision constants per group") {
  FakeView view(512, 512, 128);
  view.whole_prompt();
  make("", view)->step(view);
  const double encoded = 128 * 2 / 8.0 + 4 * 128 / 32.0;  // the same for a key and for a value
  CHECK(view.bytes(0, 0) == Approx(2 * encoded));
  CHECK(view.bytes(0, 511) == Approx(encoded + 2 * 128));  // the residual's value is exact
}

TEST_CASE("a constant group is exact, and so is a number at the group's ends") {
  FakeView view(64, 64, 32);
  view.lanes[0].v.setConstant(0.1F);
  view.lanes[0].k.col(0).setConstant(3.0F);
  view.whole_prompt();
  make(":group=32,residual=32,fp16_constants=false", view)->step(view);
  CHECK(count(view, value_changed) == 0);
  CHECK(view.key(0, 5)[0] == 3.0F);
}

TEST_CASE("under eviction a group holds the next resident tokens") {
  FakeView view(100, 64, 8);
  view.whole_prompt();
  auto kivi = make(":group=4,residual=8", view);
  std::vector<Pos> odd;
  for (Pos p = 1; p < 64; p += 2) {
    odd.push_back(p);
  }
  odd.resize(15);
  view.set_slots(odd);
  kivi->step(view);
  CHECK(count(view, key_changed) == 8);
  CHECK(count(view, value_changed) == 7);
  view.set_slots({odd.begin() + 4, odd.end()});  // four of the first eight leave: 11 slots, 7 exact keys
  kivi->step(view);
  CHECK(count(view, key_changed) == 4);
  view.append();
  kivi->step(view);
  CHECK(count(view, key_changed) == 12);
}
