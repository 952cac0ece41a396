// Selectors that weigh values, count, look ahead or compare keys, against the float64 reference.
#include <catch2/catch.hpp>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_more_selectors.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

Traits grouped(Traits t, Reduce group) {
  t.group = group;
  return t;
}

Traits every(Traits t, int interval) {
  t.interval = interval;
  return t;
}

std::vector<Case> morphkv() {
  const Traits max = grouped(traits(Scope::kv_head, Pool::all, Order::before_attention), Reduce::max);
  return {
      {"morphkv", reference_morphkv(), max},
      {"morphkv:obs_window=3", reference_morphkv({3}), max, true, 3},
      {"morphkv:obs_window=4,fuse=max,heads=joint,skip_oldest=false", reference_morphkv({4, true, true, false}), max,
       true, 4},
      {"morphkv:obs_window=1", reference_morphkv({1}), max},
      {"morphkv:obs_window=3,group=mean,evict_after=1.5", reference_morphkv({3, false, false, true, 1.5}),
       grouped(max, Reduce::mean), true, 3},
  };
}

std::vector<Case> morphkv_variations() {
  const Traits before = traits(Scope::kv_head, Pool::all, Order::before_attention);
  const Traits pinned = traits(Scope::kv_head, Pool::decode, Order::before_attention);
  const Traits layer = traits(Scope::layer, Pool::all, Order::before_attention);
  return {
      {"morphkv:obs_window=3,scope=layer,heads=joint", reference_morphkv({3, false, true}), grouped(layer, Reduce::max),
       true, 3},
      {"morphkv:obs_window=3,pool=decode", reference_morphkv({3}), grouped(pinned, Reduce::max), true, 3},
      {"morphkv:obs_window=2,interval=5,group=sum", reference_morphkv({2}), every(grouped(before, Reduce::sum), 5),
       true, 2},
  };
}

std::vector<Case> rpc() {
  const Traits layer = traits(Scope::layer, Pool::decode), head = traits(Scope::kv_head, Pool::decode);
  return {
      {"rpc", reference_rpc(), layer},
      {"rpc:obs_window=4,ratio=2,kernel=3", reference_rpc({4, 2, 3}), layer, true, 4},
      {"rpc:obs_window=3,repeat_newest=false,kernel=1,scope=kv_head", reference_rpc({3, 4, 1, false}), head, true, 3},
      {"rpc:ratio=1", reference_rpc({32, 1}), layer},
  };
}

std::vector<Case> weighted() {
  const Traits layer = traits(Scope::layer), head = traits(Scope::kv_head);
  return {
      {"longflow", reference_longflow(), layer},
      {"longflow:obs_window=4,kernel=3,norm=l2", reference_longflow({true, 4, 3}), layer, true, 4},
      {"longflow:obs_window=2,scope=kv_head,group=max", reference_longflow({false, 2}), grouped(head, Reduce::max),
       true, 2},
      {"longflow:pool=decode", reference_longflow(), traits(Scope::layer, Pool::decode)},
      {"vatp", reference_vatp(), layer},
      {"vatp:sink=2,window=3,norm=l1,mass=sum,scope=kv_head", reference_vatp({2, {3, false}, true, true}), head, true,
       5},
      {"vatp:mass=sum,pool=decode,interval=5", reference_vatp({0, {0.5, true}, false, true}),
       every(traits(Scope::layer, Pool::decode), 5)},
  };
}

std::vector<Case> scissorhands() {
  const Traits head = traits(Scope::kv_head);
  return {
      {"scissorhands", reference_scissorhands(), head},
      {"scissorhands:window=0,history=5,drop=1", reference_scissorhands({{0, false}, {5, false}, {1, false}}), head},
      {"scissorhands:window=2,history=100%,drop=3,group=max",
       reference_scissorhands({{2, false}, {1, true}, {3, false}}), grouped(head, Reduce::max), true, 3},
      {"scissorhands:scope=layer,history=4,pool=decode", reference_scissorhands({{0.25, true}, {4, false}}),
       traits(Scope::layer, Pool::decode)},
  };
}

std::vector<Case> expected() {
  const Traits grow = traits(Scope::kv_head, Pool::all, Order::after_attention, Decode::grow);
  const Traits evict = traits(Scope::kv_head), pinned = traits(Scope::layer, Pool::decode);
  return {
      {"expected", reference_expected(), grow},
      {"expected:sink=2,covariance=false,value_norm=false,future=7", reference_expected({2, 7, false, false}), grow,
       true, 2},
      {"expected:sink=0,epsilon=0.02,future=1,group=max", reference_expected({0, 1, true, true, 0.02}),
       grouped(grow, Reduce::max)},
      {"expected:decode=evict,sink=1,interval=5,buffer=9", reference_expected({1, 512, true, true, 0, false, 9}),
       every(evict, 5)},
      {"expected:decode=evict,decode_mode=kvpress,sink=2,interval=7,buffer=4,future=16",
       reference_expected({2, 16, true, true, 0, true, 4}), every(evict, 7), true, 2},
      {"expected:decode=evict,pool=decode,scope=layer,interval=3,buffer=6",
       reference_expected({4, 512, true, true, 0, false, 6}), every(pinned, 3)},
  };
}

std::vector<Case> infinipot() {
  const Traits head = traits(Scope::kv_head);
  std::vector<Case> out = {{"infinipot", reference_infinipot(), head}};
  const auto add = [&](const std::string& text, const InfiniPot& settings, Traits t, int least = 1) {
    out.push_back({text, reference_infinipot(settings), t, true, least});
  };
  InfiniPot s;
  s.block = 3;
  s.sink = 1;
  add("infinipot:sink=1,block=3", s, head);
  s.mapping = 'B';
  s.delta = {0.5, true};
  s.block = 2;
  s.query_ratio = 0.2;
  add("infinipot:sink=1,delta=50%,block=2,mapping=best_match,query_ratio=0.2", s, head);
  s.mapping = 'C';
  s.raw = true;
  add("infinipot:sink=1,delta=50%,block=2,mapping=nearest,keys=raw,query_ratio=0.2", s, head);
  s.block = 3;
  s.query_ratio = 0.25;
  s.mapping = 'D';
  s.once = true;
  s.tar_ratio = 1;
  s.delta = {2, false};
  add("infinipot:sink=1,delta=2,block=3,mapping=centroid,keys=raw,tar_ratio=1,prompt=once", s, head);
  s.raw = false;
  s.tar_ratio = 0;
  s.kernel = 3;
  add("infinipot:sink=1,delta=2,block=3,mapping=centroid,tar_ratio=0,pooling=kernel,kernel=3,prompt=once", s, head);
  s.tar_ratio = 0.6;
  s.once = false;
  s.block = 2;
  s.query_ratio = 0.5;
  add("infinipot:sink=1,delta=2,block=2,mapping=centroid,tar_ratio=0.6,query_ratio=0.5,pooling=kernel,kernel=3,"
      "scope=layer",
      s, traits(Scope::layer));
  s.sink = 4;
  add("infinipot:delta=2,block=2,mapping=centroid,tar_ratio=0.6,query_ratio=0.5,pooling=kernel,kernel=3,pool=decode", s,
      traits(Scope::kv_head, Pool::decode));
  return out;
}

void check_all(const std::vector<Case>& cases, const std::vector<int>& budgets = {1, 9, 72}) {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  check_layer(options(group_size, prompt_len, element), cases, budgets, false);
}

}  // namespace

TEST_CASE("morphkv selects as the reference does", "[more_selectors]") { check_all(morphkv()); }

TEST_CASE("rpc selects as the reference does", "[more_selectors]") {
  const int group_size = GENERATE(1, 3);
  const Pos prompt_len = GENERATE(1, 12, 48);
  const Element element = GENERATE(Element::f32, Element::f16, Element::bf16);
  // Its budget is a period: at most that of the whole trace keeps all.
  check_layer(options(group_size, prompt_len, element), rpc(), {1, 5, 9, 72}, false);
}

TEST_CASE("longflow and vatp select as the reference does", "[more_selectors]") { check_all(weighted()); }

TEST_CASE("scissorhands selects as the reference does", "[more_selectors]") { check_all(scissorhands()); }

TEST_CASE("expected attention selects as the reference does", "[more_selectors]") { check_all(expected()); }

TEST_CASE("infinipot selects as the reference does", "[more_selectors]") { check_all(infinipot(), {1, 9, 24, 72}); }

TEST_CASE("engine keys of these selectors do what the reference does", "[more_selectors]") {
  const int group_size = GENERATE(1, 3);
  check_layer(options(group_size, 12, Element::f32), morphkv_variations(), {1, 9, 72});
}

TEST_CASE("huge logits do not break these selectors", "[more_selectors]") {
  ToyOptions o = options(2, 20, Element::f32);
  o.kind = ToyKind::huge_logits;
  std::vector<Case> cases = morphkv();
  for (const auto& more : {rpc(), weighted(), scissorhands(), infinipot()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  check_layer(o, cases, {1, 9, 72}, false);
}
