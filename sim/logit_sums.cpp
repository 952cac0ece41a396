#include "sim/logit_sums.hpp"

#include <algorithm>
#include <array>
#include <limits>

namespace kvreplay {
namespace {

constexpr std::size_t kPart = 64;     // tokens summed in float
constexpr std::size_t kTogether = 4;  // tokens at once, so that the sums are read and written once for all
constexpr Eigen::Index kStrip = 64;   // rows between two looks ahead

struct Sums {
  const float* __restrict typical;
  float* __restrict low, * __restrict high, * __restrict sum, * __restrict squares;
};

template <std::size_t N>
void add_rows(const std::array<const float*, N>& token, Eigen::Index begin, Eigen::Index end, const Sums& to) {
  const Sums s = to;
#pragma omp simd
  for (Eigen::Index r = begin; r < end; ++r) {
    float low = s.low[r], high = s.high[r], sum = 0, squares = 0;
    for (std::size_t i = 0; i < N; ++i) {
      const float x = token[i][r] - s.typical[r];
      low = x < low ? x : low;
      high = x > high ? x : high;
      sum += x;
      squares += x * x;
    }
    s.low[r] = low;
    s.high[r] = high;
    s.sum[r] += sum;
    s.squares[r] += squares;
  }
}

}  // namespace

LogitSums::LogitSums(Eigen::ArrayXf typical)
    : typical_(std::move(typical)),
      part_(Eigen::ArrayXf::Zero(typical_.size())),
      part_squares_(part_),
      sum_(Eigen::ArrayXd::Zero(typical_.size())),
      squares_(sum_) {
  high_.setConstant(typical_.size(), -std::numeric_limits<float>::infinity());
  low_ = -high_;
}

void LogitSums::flush() {
  sum_ += part_.cast<double>();
  squares_ += part_squares_.cast<double>();
  part_.setZero();
  part_squares_.setZero();
  n_part_ = 0;
}

void LogitSums::add(std::span<const float* const> tokens) {
  const Sums to{typical_.data(), low_.data(), high_.data(), part_.data(), part_squares_.data()};
  const Eigen::Index rows = typical_.size();
  std::size_t j = 0;
  for (; j + kTogether <= tokens.size(); j += kTogether) {
    std::array<const float*, kTogether> now, next;
    for (std::size_t i = 0; i < kTogether; ++i) {
      now[i] = tokens[j + i];
      next[i] = tokens[std::min(j + kTogether + i, tokens.size() - 1)];
    }
    for (Eigen::Index r = 0; r < rows; r += kStrip) {
      const Eigen::Index end = std::min(r + kStrip, rows);
      for (Eigen::Index line = r; line < end; line += 16) {  // tokens lie apart: nobody else fetches the next ones
        for (const float* token : next) {
          __builtin_prefetch(token + line);
        }
      }
      add_rows<kTogether>(now, r, end, to);
    }
    n_part_ += kTogether;
    if (n_part_ >= kPart) {
      flush();
    }
  }
  for (; j < tokens.size(); ++j) {
    add(tokens[j], 0);
  }
}

void LogitSums::add(const float* token, Eigen::Index from) {
  add_rows<1>({token}, from, typical_.size(),
              {typical_.data(), low_.data(), high_.data(), part_.data(), part_squares_.data()});
  if (++n_part_ >= kPart) {
    flush();
  }
}

void LogitSums::finish(const Eigen::ArrayXd& n, Eigen::ArrayXd& variance, Eigen::ArrayXd& spread) {
  flush();
  const Eigen::ArrayXd mean = sum_ / n.max(1.0);
  variance = (squares_ / n.max(1.0) - mean.square()).max(0.0);
  spread = (n > 0).select((high_.cast<double>() - mean).max(mean - low_.cast<double>()), 0.0);
}

}  // namespace kvreplay
