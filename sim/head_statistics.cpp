#include "sim/head_statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sim/exact.hpp"
#include "sim/measure.hpp"
#include "sim/parallel.hpp"

namespace kvreplay {
namespace {

struct Sums {
  double sink = 0, local = 0, far = 0, entropy = 0, concentration = 0;
  int n_far = 0;  // steps that have far attention
};

// logits: of one query on tokens [0, n). `weights` is room to work in.
void add(Sums& sums, const float* logits, Pos n, std::vector<double>& weights) {
  const double top = double(*std::max_element(logits, logits + n));
  weights.resize(std::size_t(n));
  double z = 0, weighted = 0;  // sum of w, of w ln w
  for (Pos i = 0; i < n; ++i) {
    const double x = double(logits[i]) - top, w = std::exp(x);
    weights[std::size_t(i)] = w;
    z += w;
    weighted += w * x;
  }
  const Pos far_begin = std::min(n, kHeadSink), far_end = std::max(far_begin, n - kHeadLocal);
  const auto begin = weights.begin();
  double sink = 0, far = 0, local = 0;
  std::for_each(begin, begin + far_begin, [&](double w) { sink += w; });
  std::for_each(begin + far_begin, begin + far_end, [&](double w) { far += w; });
  std::for_each(begin + far_end, weights.end(), [&](double w) { local += w; });
  sums.sink += sink / z;
  sums.far += far / z;
  sums.local += local / z;
  // -sum a ln a with a = w / z.
  sums.entropy += n > 1 ? std::max(0.0, std::log(z) - weighted / z) / std::log(double(n)) : 0;
  if (far > 0) {
    const Pos n_top = std::max(1, (far_end - far_begin) / 100);
    std::nth_element(begin + far_begin, begin + far_begin + n_top - 1, begin + far_end, std::greater<>());
    double largest = 0;
    std::for_each(begin + far_begin, begin + far_begin + n_top, [&](double w) { largest += w; });
    sums.concentration += largest / far;
    ++sums.n_far;
  }
}

}  // namespace

HeadStatistics head_statistics(const Layer& l, int threads) {
  const std::vector<int> steps = checkpoint_steps(l.n_steps(), kHeadSteps);
  const auto n_heads = std::size_t(l.n_heads);
  HeadStatistics out;
  for (auto* column : {&out.sink, &out.local, &out.far, &out.entropy, &out.concentration}) {
    column->assign(n_heads, std::numeric_limits<double>::quiet_NaN());
  }
  if (steps.empty()) {
    return out;
  }
  parallel(l.n_kv_heads, threads, [&](int kv_head) {
    std::vector<Sums> sums(std::size_t(l.group_size));
    std::vector<double> weights;
    MatF logits;  // (group_size, n) of one step
    for (const int step : steps) {
      const Pos now = l.prompt_len + step, n = now + 1;
      logits.noalias() = l.queries(kv_head, now, 1) * l.k[std::size_t(kv_head)].topRows(n).transpose();
      soft_cap(l.logit_softcap, logits.array());
      for (int h = 0; h < l.group_size; ++h) {
        add(sums[std::size_t(h)], logits.row(h).data(), n, weights);
      }
    }
    for (int h = 0; h < l.group_size; ++h) {
      const Sums& s = sums[std::size_t(h)];
      const auto head = std::size_t(kv_head * l.group_size + h);
      const double n = double(steps.size());
      out.sink[head] = s.sink / n;
      out.local[head] = s.local / n;
      out.far[head] = s.far / n;
      out.entropy[head] = s.entropy / n;
      if (s.n_far > 0) {
        out.concentration[head] = s.concentration / s.n_far;
      }
    }
  });
  return out;
}

}  // namespace kvreplay
