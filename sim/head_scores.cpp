#include "sim/head_scores.hpp"

#include <algorithm>

#include "sim/exact.hpp"
#include "sim/parallel.hpp"

namespace kvreplay {

HeadScores head_scores(const Layer& l, std::span<const std::int32_t> token_ids, const std::vector<bool>& evidence,
                       bool hard, int threads) {
  const auto n_heads = std::size_t(l.n_heads);
  HeadScores out{std::vector<double>(n_heads, 0.0), std::vector<double>(n_heads, 0.0),
                 std::vector<double>(n_heads, 0.0)};
  const Pos last = l.n_tokens - 1;  // the step whose next token nobody knows
  const double n_steps = last - l.prompt_len;
  parallel(l.n_kv_heads, threads, [&](int kv_head) {
    MatF weights;  // (group_size, tokens so far) of one step
    for (Pos now = l.prompt_len; now < last; ++now) {
      weights.noalias() = l.queries(kv_head, now, 1) * l.k[std::size_t(kv_head)].topRows(now + 1).transpose();
      soft_cap(l.logit_softcap, weights.array());
      const std::int32_t next = token_ids[std::size_t(now) + 1];
      for (int g = 0; g < l.group_size; ++g) {
        auto row = weights.row(g).array();
        Eigen::Index top = 0;
        const float largest = row.reverse().maxCoeff(&top);
        row = (row - largest).exp();
        const double z = row.cast<double>().sum();
        double surface = 0, logic = 0;
        const auto count = [&](Pos p, double attention) {
          if (p < l.prompt_len && evidence[std::size_t(p)]) {
            (token_ids[std::size_t(p)] == next ? surface : logic) += attention;
          }
        };
        if (hard) {
          count(now - Pos(top), 1);
        } else {
          for (Pos p = 0; p < l.prompt_len; ++p) {
            count(p, double(row[p]) / z);
          }
        }
        const auto head = std::size_t(kv_head * l.group_size + g);
        out.surface[head] += surface / n_steps;
        out.logic[head] += logic / n_steps;
        out.ignore[head] += (1 - surface - logic) / n_steps;
      }
    }
  });
  return out;
}

}  // namespace kvreplay
