#include "policies/residuals.hpp"

#include <algorithm>
#include <cmath>

namespace kvreplay {
namespace {

std::size_t at(std::ptrdiff_t i) { return static_cast<std::size_t>(i); }

float step_size(const Moments& m, float scale) { return m.n > 0 ? scale / static_cast<float>(m.n) : 0; }

void gather(const View& view, int lane, std::span<const int> slots, MatF& k, MatF& v) {
  k.resize(std::ssize(slots), view.head_dim);
  v.resize(std::ssize(slots), view.v_head_dim);
  for (Eigen::Index i = 0; i < k.rows(); ++i) {
    k.row(i) = view.key(lane, slots[at(i)]);
    v.row(i) = view.value(lane, slots[at(i)]);
  }
}

}  // namespace

void accumulate(const View& view, std::span<const int> slots, LaneMoments& into) {
  constexpr std::size_t kChunk = 1024, kFew = 8;  // more at once are cheaper merged than one by one
  MatF k, v;                                      // (slots of the chunk, head_dim), (., v_head_dim)
  for (std::size_t l = 0; l < into.size(); ++l) {
    const int lane = static_cast<int>(l);
    if (slots.size() <= kFew) {
      for (int slot : slots) {
        into[l].add(view.key(lane, slot), view.value(lane, slot));
      }
      continue;
    }
    for (std::size_t i = 0; i < slots.size(); i += kChunk) {
      gather(view, lane, slots.subspan(i, std::min(kChunk, slots.size() - i)), k, v);
      into[l].merge(Moments::of(k, v));
    }
  }
}

void residuals(const View& view, std::span<const int> slots, const LaneMoments& moments, float scale,
               std::span<float> out) {
  constexpr std::size_t kChunk = 256, kFew = 8;
  std::vector<double> squares(slots.size(), 0.0);
  MatF k, v;  // (slots of the chunk, head_dim), (., v_head_dim)
  for (std::size_t l = 0; l < moments.size(); ++l) {
    const int lane = static_cast<int>(l);
    const Moments& m = moments[l];
    const float step = step_size(m, scale);
    if (slots.size() <= kFew) {  // a product would spend its time on rearranging S
      for (std::size_t i = 0; i < slots.size(); ++i) {
        const Eigen::VectorXf r = view.value(lane, slots[i]) - m.v_mean - m.scatter * (step * view.key(lane, slots[i]));
        squares[i] += static_cast<double>(r.squaredNorm());
      }
      continue;
    }
    for (std::size_t i = 0; i < slots.size(); i += kChunk) {
      const std::size_t n = std::min(kChunk, slots.size() - i);
      gather(view, lane, slots.subspan(i, n), k, v);
      k *= step;
      v.rowwise() -= m.v_mean.transpose();
      v.noalias() -= k * m.scatter.transpose();
      for (std::size_t j = 0; j < n; ++j) {
        squares[i + j] += static_cast<double>(v.row(static_cast<Eigen::Index>(j)).squaredNorm());
      }
    }
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    out[i] = static_cast<float>(std::sqrt(squares[i]));
  }
}

// From now on residuals are known under the moments as they are.
void ResidualTracker::look(const View& view, const LaneMoments& now) {
  at_look_ = now;
  for (Pos pos : view.pos) {
    known_[at(pos)].residual = -1;
  }
  judged_ = 0;
}

void ResidualTracker::forget(const View& view) {
  for (Pos pos : view.rewritten) {
    known_[at(pos)].residual = -1;
  }
}

// Tokens that are new or changed, under the moments of the last look.
void ResidualTracker::learn(const View& view) {
  std::vector<int> slots;
  for (std::size_t i = 0; i < view.pos.size(); ++i) {
    if (known_[at(view.pos[i])].residual < 0) {
      slots.push_back(static_cast<int>(i));
    }
  }
  std::vector<float> found(slots.size());
  residuals(view, slots, at_look_, scale_, found);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    double reach = 0;
    for (std::size_t lane = 0; lane < at_look_.size(); ++lane) {
      reach += static_cast<double>((view.key(static_cast<int>(lane), slots[i]) - at_look_[lane].k_mean).squaredNorm());
    }
    known_[at(view.pos[at(slots[i])])] = {found[i], static_cast<float>(std::sqrt(reach))};
  }
}

// How far residuals may have moved since the last look: |r' - r| <= all + per_reach * reach, for
// r - r' = (v_mean' - v_mean) + (M' - M) k_mean + (M' - M)(k - k_mean) with M = S scale / n.
ResidualTracker::Drift ResidualTracker::drift(const LaneMoments& now) const {
  double all = 0, per_reach = 0;
  MatF slope;  // (v_head_dim, head_dim)
  for (std::size_t lane = 0; lane < now.size(); ++lane) {
    const Moments& m = now[lane];
    const Moments& before = at_look_[lane];
    slope = step_size(m, scale_) * m.scatter - step_size(before, scale_) * before.scatter;
    all += static_cast<double>((m.v_mean - before.v_mean + slope * before.k_mean).squaredNorm());
    per_reach = std::max(per_reach, static_cast<double>(slope.squaredNorm()));
  }
  return {static_cast<float>(std::sqrt(all)), static_cast<float>(std::sqrt(per_reach))};
}

void ResidualTracker::score(const View& view, const LaneMoments& now, int n_out, std::span<float> out) {
  constexpr float kSlack = 1e-4F;    // rounding
  constexpr std::size_t kShare = 4;  // of the slots: a fresh look costs about as much as judging so many
  if (at_look_.empty()) {
    look(view, now);
  }
  learn(view);
  const Drift moved = drift(now);
  low_.resize(out.size());
  highs_.clear();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const Known& x = known_[at(view.pos[i])];
    const float by = moved.all + moved.per_reach * x.reach + kSlack * x.residual;
    low_[i] = std::isinf(out[i]) ? out[i] : out[i] * std::max(0.0F, x.residual - by);
    if (!std::isinf(out[i])) {
      highs_.push_back(out[i] * (x.residual + by));
    }
  }
  const auto n_lowest = std::min<std::ptrdiff_t>(n_out, std::ssize(highs_));
  candidates_.clear();
  if (n_lowest <= 0) {
    judged_ = out.size();  // nobody has to leave, so nobody is a candidate: the scores are asked for themselves
  } else {
    const auto last = highs_.begin() + (n_lowest - 1);
    std::nth_element(highs_.begin(), last, highs_.end());
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (low_[i] <= *last && out[i] > 0 && !std::isinf(out[i])) {
        candidates_.push_back(static_cast<int>(i));
      }
    }
  }
  judged_ += candidates_.size();
  if (judged_ > out.size() / kShare) {
    look(view, now);
    learn(view);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] *= std::isinf(out[i]) ? 1 : known_[at(view.pos[i])].residual;
    }
    return;
  }
  std::vector<float> found(candidates_.size());
  residuals(view, candidates_, now, scale_, found);
  for (std::size_t j = 0; j < candidates_.size(); ++j) {
    const std::size_t i = at(candidates_[j]);
    low_[i] = out[i] * found[j];
  }
  std::copy(low_.begin(), low_.end(), out.begin());
}

}  // namespace kvreplay
