// What the last queries say: their logits are those of attention, with the model's soft-cap and the slots' biases.
#include "policies/last_queries.hpp"

#include <catch2/catch.hpp>

#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using namespace kvreplay::test;

TEST_CASE("logits of the last queries are capped where the model caps them") {
  FakeView view(8, 6, 4, 2);
  view.whole_prompt();
  const MatF plain = last_logits(view, 0, 3, 6);
  view.logit_softcap = 0.5F;
  const MatF capped = last_logits(view, 0, 3, 6);
  REQUIRE(capped.rows() == 6);
  for (Eigen::Index i = 0; i < plain.size(); ++i) {
    CHECK(capped.data()[i] == Approx(0.5 * std::tanh(static_cast<double>(plain.data()[i]) / 0.5)));
  }
}

TEST_CASE("the newest query's attention is the view's own, biases of merged slots included") {
  FakeView view(8, 6, 4, 2);
  view.whole_prompt();
  view.rewrite(0, 2, view.key(0, 2), view.value(0, 2), std::log(5.0F), 16);
  const MatD attn = last_attention(view, 0, 2);  // (2 tokens * 2 heads, 6)
  for (int head = 0; head < 2; ++head) {
    std::vector<float> own(6);
    view.head_attention(0, head, own);
    for (Eigen::Index i = 0; i < 6; ++i) {
      CHECK(attn(2 + head, i) == Approx(own[static_cast<std::size_t>(i)]).epsilon(1e-5));
    }
  }
  CHECK(attn(0, 5) == 0);  // the older query does not see the newest token
}

TEST_CASE("what the window does not hold stays behind it, in order of score") {
  FakeView view(8, 6, 4);
  view.budget = 2;
  view.whole_prompt();
  std::vector<float> out(6);
  score_before_window(view, Eigen::RowVector3d(1, 5, 3), 3, out);
  CHECK(out ==
        std::vector<float>{1, 5, 3, 6, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()});
}
