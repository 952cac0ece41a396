// Selectors that work while decoding against the float64 reference.
#include <catch2/catch.hpp>

#include "tests/support/matrix.hpp"
#include "tests/support/reference_decode_selectors.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

Traits with(Scope scope, Pool pool, Reduce group = Reduce::mean, int interval = 1,
            Order order = Order::after_attention) {
  Traits t = traits(scope, pool, order);
  t.group = group;
  t.interval = interval;
  return t;
}

std::vector<Case> gkv_cases() {
  const auto scored = [](int interval, Scope scope = Scope::kv_head) {
    return with(scope, Pool::all, Reduce::max, interval);
  };
  ReferenceGkv four;
  four.window = 4;
  ReferenceGkv mean = four, sum = four, plain = four, reference = four, spread = four, share, every;
  mean.smooth = ReferenceSmooth::mean;
  mean.alpha = 0.5;
  sum.smooth = ReferenceSmooth::sum;
  sum.lambda = 1;
  plain.smooth = ReferenceSmooth::none;
  plain.lambda = 1;
  plain.normalise = false;
  plain.kernel = 5;
  reference.first = true;
  reference.temperature = 0.4;
  reference.lambda = 0.2;
  reference.kernel = 3;
  reference.threshold = 0.1;
  spread.gamma = 2;
  spread.lambda = 0.9;
  share.window = 1;
  share.ratio = 0.3;
  every.window = 1;
  every.alpha = 0.99;
  return {
      {"gkv", reference_gkv(), scored(128)},
      {"gkv:obs_window=4,interval=5", reference_gkv(four), scored(5), true, 4},
      {"gkv:obs_window=1,alpha=0.99,interval=1", reference_gkv(every), scored(1)},
      {"gkv:obs_window=4,smooth=mean,alpha=0.5,interval=3", reference_gkv(mean), scored(3), true, 4},
      {"gkv:obs_window=4,smooth=sum,lambda=1,interval=3", reference_gkv(sum), scored(3), true, 4},
      {"gkv:obs_window=4,smooth=none,lambda=1,normalise=false,pooling=max,interval=7", reference_gkv(plain), scored(7),
       true, 4},
      {"gkv:obs_window=4,no_neighbour=first,temperature=0.4,lambda=0.2,pooling=max,kernel=3,threshold=0.1,group=mean,"
       "interval=6",
       reference_gkv(reference), with(Scope::kv_head, Pool::all, Reduce::mean, 6), true, 4},
      {"gkv:obs_window=4,gamma=2,lambda=0.9,interval=5", reference_gkv(spread), scored(5), true, 4},
      {"gkv:obs_window=1,ratio=0.3,interval=2", reference_gkv(share), scored(2)},
      {"gkv:obs_window=4,scope=layer,interval=5", reference_gkv(four), scored(5, Scope::layer), true, 4},
      {"gkv:obs_window=4,scope=query_head,interval=5", reference_gkv(four), scored(5, Scope::query_head), true, 4},
      {"gkv:obs_window=4,interval=5,evict=before_attention", reference_gkv(four),
       with(Scope::kv_head, Pool::all, Reduce::max, 5, Order::before_attention), true, 4},
  };
}

std::vector<Case> rkv_cases() {
  const auto scored = [](int interval, Scope scope = Scope::kv_head) {
    return with(scope, Pool::all, Reduce::max, interval);
  };
  ReferenceRkv waits, eager, skip, layer;
  waits.window = 3;
  waits.buffer = 5;
  eager.window = 2;
  eager.buffer = 0;
  skip = eager;
  skip.first = false;
  skip.lambda = 0.5;
  skip.kernel = 1;
  skip.threshold = 0.2;
  layer = eager;
  layer.lambda = 1;
  return {
      {"rkv", reference_rkv(), scored(128)},
      {"rkv:obs_window=3,buffer=5", reference_rkv(waits), scored(5), true, 3},
      {"rkv:obs_window=3,buffer=5,interval=2", reference_rkv(waits), scored(2), true, 3},
      {"rkv:obs_window=2,buffer=0,interval=4", reference_rkv(eager), scored(4), true, 2},
      {"rkv:obs_window=2,buffer=0,lambda=0.5,kernel=1,threshold=0.2,no_neighbour=skip,interval=4", reference_rkv(skip),
       scored(4), true, 2},
      {"rkv:obs_window=2,buffer=0,interval=4,scope=layer", reference_rkv(eager), scored(4, Scope::layer), true, 2},
      {"rkv:obs_window=2,buffer=0,lambda=1,interval=4,scope=layer,group=sum", reference_rkv(layer),
       with(Scope::layer, Pool::all, Reduce::sum, 4), true, 2},
      {"rkv:obs_window=2,buffer=0,interval=4,scope=query_head,evict=before_attention", reference_rkv(eager),
       with(Scope::query_head, Pool::all, Reduce::max, 4, Order::before_attention), true, 2},
  };
}

std::vector<Case> pool_cases() {
  using Mode = ReferenceScope::Mode;
  const Traits decode = with(Scope::query_head, Pool::decode);
  const Traits per_head = with(Scope::kv_head, Pool::all), per_query_head = with(Scope::query_head, Pool::all);
  const auto lazy = [](int interval, Scope scope = Scope::query_head) {
    return with(scope, Pool::all, Reduce::mean, interval);
  };
  return {
      {"scope", reference_scope(), decode},
      {"scope:window=1", reference_scope({Mode::slide, 1}), decode},
      {"scope:window=3,mass=cumulative,scope=kv_head", reference_scope({Mode::slide, 3, true}),
       with(Scope::kv_head, Pool::decode), true, 3},
      {"scope:window=3,mode=adaptive", reference_scope({Mode::adaptive, 3}), decode, true, 3},
      {"scope:window=3,mode=adaptive,growth=paper", reference_scope({Mode::adaptive, 3, false, true}), decode, true, 3},
      {"scope:window=3,mode=discontinuous", reference_scope({Mode::discontinuous, 3}), decode, true, 3},
      {"scope:window=3,mode=discontinuous,mass=cumulative,steps=40",
       reference_scope({Mode::discontinuous, 3, true, false, 40}), decode, true, 3},
      {"scope:window=3,pool=all", reference_scope({Mode::slide, 3}), per_query_head, true, 3},
      {"lazyeviction", reference_lazyeviction(), lazy(52)},
      {"lazyeviction:window=3,alpha_thr=0.02", reference_lazyeviction({3, 0.02}), lazy(3), true, 3},
      {"lazyeviction:window=3,alpha_thr=0.02,score=paper", reference_lazyeviction({3, 0.02, true}), lazy(3), true, 3},
      {"lazyeviction:window=3,alpha_thr=0.02,gap=open,scope=kv_head", reference_lazyeviction({3, 0.02, false, true}),
       lazy(3, Scope::kv_head), true, 3},
      {"lazyeviction:window=1,alpha_thr=0.1,score=paper,gap=open", reference_lazyeviction({1, 0.1, true, true}),
       lazy(1)},
      {"raas", reference_raas(), with(Scope::layer, Pool::decode)},
      {"raas:page=1", reference_raas({1}), with(Scope::layer, Pool::decode)},
      {"raas:page=4,fraction=0.2,scope=kv_head", reference_raas({4, false, 0.2}), with(Scope::kv_head, Pool::decode)},
      {"raas:page=2,by=threshold,threshold=0.05", reference_raas({2, true, 0.5, 0.05}),
       with(Scope::layer, Pool::decode)},
      {"raas:page=3,pool=all,evict=before_attention", reference_raas({3}),
       with(Scope::layer, Pool::all, Reduce::mean, 1, Order::before_attention)},
      {"h2o:mass=current", reference_h2o_current(), per_head},
      {"h2o-longflow", reference_h2o_current(), with(Scope::layer, Pool::all, Reduce::sum)},
      {"h2o-scope", reference_h2o_current({256, false}), per_query_head},
      {"streaming:sink=0,window=1", reference_streaming_first(1, 0), per_head},
      {"streaming-scope", reference_streaming_first(256, 0), with(Scope::kv_head, Pool::decode)},
  };
}

}  // namespace

TEST_CASE("gkv selects and measures as the reference does") {
  check_layer(options(GENERATE(1, 3), GENERATE(1, 12, 48), Element::f32), gkv_cases(), {1, 9, 72}, false);
}

TEST_CASE("rkv selects and measures as the reference does") {
  check_layer(options(GENERATE(1, 3), GENERATE(1, 12, 48), Element::f32), rkv_cases(), {1, 9, 72}, false);
}

TEST_CASE("scope, lazyeviction, raas and the variants of h2o and streaming do as the reference does") {
  check_layer(options(GENERATE(1, 3), GENERATE(1, 12, 48), Element::f32), pool_cases(), {1, 9, 72}, false);
}

TEST_CASE("selectors of the decode on half-precision traces, beside compensators") {
  const Element element = GENERATE(Element::f16, Element::bf16);
  std::vector<Case> cases = gkv_cases();
  for (const auto& more : {rkv_cases(), pool_cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  check_layer(options(3, 12, element), cases, {9}, true);
}

TEST_CASE("selectors of the decode where logits are huge or keys equal") {
  ToyOptions o = options(3, 20, Element::f32);
  o.kind = GENERATE(ToyKind::huge_logits, ToyKind::equal_keys);
  std::vector<Case> cases = gkv_cases();
  for (const auto& more : {rkv_cases(), pool_cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  check_layer(o, cases, {1, 9}, false);
}
