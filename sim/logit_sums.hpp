// Variance and extremes of the logits of many tokens, row by row, in one pass over them.
#pragma once
#include <span>

#include "policies/policy.hpp"

namespace kvreplay {

// Sums are of differences to a typical logit of the row, so that little cancels.
class LogitSums {
 public:
  explicit LogitSums(Eigen::ArrayXf typical);  // (rows)
  // A token's logits: (rows). These tokens count in every row.
  void add(std::span<const float* const> tokens);
  // This one counts in rows [from, rows).
  void add(const float* token, Eigen::Index from);
  // n: (rows) how many tokens were added. Population variance, and max |logit - mean|; 0 where n is.
  void finish(const Eigen::ArrayXd& n, Eigen::ArrayXd& variance, Eigen::ArrayXd& spread);

 private:
  void flush();
  Eigen::ArrayXf typical_, low_, high_, part_, part_squares_;  // (rows); parts: of few tokens, in float
  Eigen::ArrayXd sum_, squares_;                               // (rows)
  std::size_t n_part_ = 0;
};

}  // namespace kvreplay
