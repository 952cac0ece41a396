// Where heads look: against loops over all tokens in double.
#include "sim/head_statistics.hpp"

#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support/reference_compare.hpp"

using namespace kvreplay;
using namespace kvreplay::testing;

namespace {

// One number per query head and statistic, from the definitions.
HeadStatistics slow(const ToyLayer& toy) {
  HeadStatistics out;
  const int n_steps = toy.n_steps(), n_looked = std::min(n_steps, 64);
  for (int head = 0; head < toy.n_heads(); ++head) {
    double sink = 0, local = 0, far = 0, entropy = 0, concentration = 0;
    int n_far_steps = 0;
    for (int i = 1; i <= n_looked; ++i) {
      const int step = i * n_steps / n_looked - 1;
      const int now = toy.options.prompt_len + step;
      std::vector<double> a;  // softmax over tokens 0 ... now
      double largest = -1e300;
      for (int pos = 0; pos <= now; ++pos) {
        double logit =
            toy.scale * toy.q[std::size_t(head)].row(now).dot(toy.k[std::size_t(toy.kv_head(head))].row(pos));
        if (toy.options.softcap > 0) {
          logit = toy.options.softcap * std::tanh(logit / toy.options.softcap);
        }
        a.push_back(logit);
        largest = std::max(largest, logit);
      }
      double z = 0;
      for (double& x : a) {
        x = std::exp(x - largest);
        z += x;
      }
      std::vector<double> away;
      for (int pos = 0; pos <= now; ++pos) {
        const double x = a[std::size_t(pos)] / z;
        if (x > 0) {
          entropy -= x * std::log(x) / std::log(double(now + 1)) / n_looked;
        }
        if (pos < 4) {
          sink += x / n_looked;
        } else if (pos > now - 32) {
          local += x / n_looked;
        } else {
          far += x / n_looked;
          away.push_back(x);
        }
      }
      std::sort(away.rbegin(), away.rend());
      double total = 0, top = 0;
      for (std::size_t j = 0; j < away.size(); ++j) {
        total += away[j];
        if (j < std::max<std::size_t>(1, away.size() / 100)) {
          top += away[j];
        }
      }
      if (total > 0) {
        concentration += top / total;
        ++n_far_steps;
      }
    }
    out.sink.push_back(sink);
    out.local.push_back(local);
    out.far.push_back(far);
    out.entropy.push_back(entropy);
    out.concentration.push_back(n_far_steps > 0 ? concentration / n_far_steps : std::nan(""));
  }
  return out;
}

ToyOptions options(ToyKind kind, Pos n_tokens, Pos prompt_len) {
  ToyOptions o;
  o.n_kv_heads = 3;
  o.group_size = 2;
  o.n_tokens = n_tokens;
  o.prompt_len = prompt_len;
  o.kind = kind;
  return o;
}

void check_same(const HeadStatistics& found, const HeadStatistics& truth) {
  for (std::size_t c = 0; c < HeadStatistics::kNames.size(); ++c) {
    const auto &x = *found.columns()[c], &y = *truth.columns()[c];
    REQUIRE(x.size() == y.size());
    for (std::size_t head = 0; head < x.size(); ++head) {
      INFO(HeadStatistics::kNames[c] << " of head " << head);
      if (std::isnan(y[head])) {
        CHECK(std::isnan(x[head]));
      } else {
        CHECK(x[head] == Approx(y[head]).epsilon(1e-5).margin(1e-12));
      }
    }
  }
}

}  // namespace

TEST_CASE("where heads look is what a loop over tokens finds", "[heads]") {
  for (const ToyKind kind : {ToyKind::structured, ToyKind::equal_keys, ToyKind::sharp, ToyKind::small_evicted}) {
    const ToyLayer toy = make_toy_layer(options(kind, 400, 130));
    check_same(head_statistics(engine_layer(toy), 2), slow(toy));
  }
}

TEST_CASE("a soft-cap is felt, and few steps and tokens are enough", "[heads]") {
  ToyOptions o = options(ToyKind::structured, 90, 20);
  o.softcap = 2;
  check_same(head_statistics(engine_layer(make_toy_layer(o)), 1), slow(make_toy_layer(o)));
  o = options(ToyKind::structured, 8, 2);  // the first four are sinks, the others local: nothing is far
  const ToyLayer tiny = make_toy_layer(o);
  const HeadStatistics found = head_statistics(engine_layer(tiny), 1);
  check_same(found, slow(tiny));
  CHECK(std::isnan(found.concentration[0]));
  CHECK(found.far[0] == 0);
}

TEST_CASE("uniform attention has entropy 1 and shares as the tokens are", "[heads]") {
  const HeadStatistics found = head_statistics(engine_layer(make_toy_layer(options(ToyKind::equal_keys, 404, 403))), 1);
  CHECK(found.entropy[0] == Approx(1));
  CHECK(found.sink[0] == Approx(4.0 / 404));
  CHECK(found.local[0] == Approx(32.0 / 404));
  CHECK(found.concentration[0] == Approx(3.0 / 368));  // a hundredth of 368 far tokens, rounded down
}

TEST_CASE("where heads look does not depend on the number of threads", "[heads]") {
  const Layer layer = engine_layer(make_toy_layer(options(ToyKind::structured, 300, 100)));
  const HeadStatistics one = head_statistics(layer, 1), three = head_statistics(layer, 3);
  for (std::size_t c = 0; c < HeadStatistics::kNames.size(); ++c) {
    CHECK(*one.columns()[c] == *three.columns()[c]);
  }
}
