#include "trace_capture/cpu/linear.hpp"

#include <algorithm>

#include "policies/errors.hpp"
#include "trace_capture/cpu/product.hpp"

namespace kvreplay {
namespace {

using Index = std::ptrdiff_t;

constexpr Index kPanel = 24;                     // weight rows that are widened together
constexpr Index kDepth = 512;                    // inputs of them at a time
constexpr Index kMaxRows = 512;                  // rows of x at a time
constexpr Index kWorthThreads = Index{1} << 17;  // multiplications
constexpr auto round_up = [](Index n, Index unit) { return (n + unit - 1) / unit * unit; };

std::size_t sz(Index n) { return static_cast<std::size_t>(n); }

}  // namespace

void Linear::apply(const Tensor& weight, const Tensor& bias, ConstRows x, Rows y) {
  KVREPLAY_CHECK(weight.shape.size() == 2 && weight.shape[0] == y.width && weight.shape[1] == x.width && x.n == y.n);
  for (Index first = 0; first < x.n; first += kMaxRows) {
    const Index n = std::min(kMaxRows, x.n - first);
    if (n == 1) {
      apply_to_one(weight, x[first], y[first]);
    } else {
      apply_to_block(weight, {x[first], n, x.width}, {y[first], n, y.width});
    }
  }
  if (bias) {
    bias_.resize(sz(y.width));
    widen(bias.type, bias.data, bias_);
    for (Index i = 0; i < y.n; ++i) {
      for (Index j = 0; j < y.width; ++j) {
        y[i][j] += bias_[sz(j)];
      }
    }
  }
}

// Every weight is used once: this runs at the speed of memory.
void Linear::apply_to_one(const Tensor& weight, const float* x, float* y) const {
  const Index outputs = weight.shape[0], inputs = weight.shape[1];
#pragma omp parallel for num_threads(threads_) schedule(static) if (outputs * inputs > kWorthThreads)
  for (Index row = 0; row < outputs; ++row) {
    y[row] = dot(weight.type, weight.data + sz(row * inputs) * size_of(weight.type), x, sz(inputs));
  }
}

void Linear::set_side_by_side(ConstRows x) {
  lanes_.resize(std::max(lanes_.size(), sz(round_up(x.n, kLanes) * x.width)));
#pragma omp parallel for num_threads(threads_) collapse(2) schedule(static) if (x.n * x.width > kWorthThreads)
  for (Index first = 0; first < x.n; first += kBlockLanes) {
    for (Index begin = 0; begin < x.width; begin += kDepth) {
      const Index n = std::min<Index>(kBlockLanes, x.n - first), lanes = round_up(n, kLanes);
      float* block = lanes_.data() + first * x.width;
      for (Index k = begin; k < std::min(x.width, begin + kDepth); ++k) {
        for (Index i = 0; i < lanes; ++i) {
          block[k * lanes + i] = i < n ? x[first + i][k] : 0.0F;
        }
      }
    }
  }
}

void Linear::apply_to_block(const Tensor& weight, ConstRows x, Rows y) {
  set_side_by_side(x);
  const Index outputs = weight.shape[0], inputs = weight.shape[1];
  const Index sum_row = round_up(x.n, kLanes);
#pragma omp parallel for num_threads(threads_) schedule(dynamic) if (x.n * outputs * inputs > kWorthThreads)
  for (Index first_row = 0; first_row < outputs; first_row += kPanel) {
    const Index rows = std::min(kPanel, outputs - first_row);
    alignas(64) float panel[kPanel * kDepth];  // (rows, kDepth)
    alignas(64) float sum[kPanel * kMaxRows];  // (rows, sum_row)
    std::fill_n(sum, rows * sum_row, 0.0F);
    for (Index begin = 0; begin < inputs; begin += kDepth) {
      const Index depth = std::min(kDepth, inputs - begin);
      for (Index r = 0; r < rows; ++r) {
        const std::byte* from = weight.data + sz((first_row + r) * inputs + begin) * size_of(weight.type);
        widen(weight.type, from, {panel + r * kDepth, sz(depth)});
      }
      for (Index first = 0; first < x.n; first += kBlockLanes) {
        const Index lanes = std::min<Index>(kBlockLanes, sum_row - first);
        add_product(static_cast<int>(rows), static_cast<int>(depth), static_cast<int>(lanes), {panel, kDepth, 1},
                    lanes_.data() + first * inputs + begin * lanes, lanes, sum + first, sum_row);
      }
    }
    for (Index i = 0; i < x.n; ++i) {
      for (Index r = 0; r < rows; ++r) {
        y[i][first_row + r] = sum[r * sum_row + i];
      }
    }
  }
}

}  // namespace kvreplay
