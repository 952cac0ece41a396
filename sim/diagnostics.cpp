#include "sim/diagnostics.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "sim/head_statistics.hpp"

namespace kvreplay {
namespace {

constexpr Pos kSink = kHeadSink;

bool asks_future(const MetricSet& m) {
  return m.has(Metric::future_missed_mass) || m.has(Metric::future_missed_mass_no_sink);
}
bool asks_top(const MetricSet& m) { return m.has(Metric::top1_agreement) || m.has(Metric::top16_jaccard); }
bool asks_importance(const MetricSet& m) {
  return m.has(Metric::importance_return) || m.has(Metric::lost_importance) || m.has(Metric::importance_gain) ||
         m.has(Metric::importance_loss);
}

// 1 - |A and B| / |A or B| of ascending lists, of the tokens before `end`; 0 of nothing.
double jaccard_distance(std::span<const Pos> a, std::span<const Pos> b, Pos end) {
  const auto before = [&](std::span<const Pos> x) {
    return x.first(std::size_t(std::lower_bound(x.begin(), x.end(), end) - x.begin()));
  };
  a = before(a);
  b = before(b);
  std::size_t both = 0;
  for (auto i = a.begin(), j = b.begin(); i != a.end() && j != b.end();) {
    both += *i == *j;
    const bool first = *i <= *j, second = *j <= *i;
    i += first;
    j += second;
  }
  const std::size_t either = a.size() + b.size() - both;
  return either > 0 ? 1 - double(both) / double(either) : 0;
}

}  // namespace

// ---- TopTokens ----
void TopTokens::reset(int n_rows) {
  tokens_.resize(std::size_t(n_rows) * kTop);
  weights_.resize(tokens_.size());
  n_.assign(std::size_t(n_rows), 0);
  least_.setConstant(n_rows, std::numeric_limits<float>::min());
}

void TopTokens::offer(int row, Pos token, float weight) {
  if (!(weight >= least_[row])) {
    return;
  }
  const std::size_t first = std::size_t(row) * kTop;
  int& n = n_[std::size_t(row)];
  const auto before = [&](int i) {  // whether the i-th stands before the new one
    const float w = weights_[first + std::size_t(i)];
    return w > weight || (w == weight && tokens_[first + std::size_t(i)] < token);
  };
  if (n == kTop) {
    if (before(kTop - 1)) {
      return;
    }
    --n;
  }
  int at = n++;
  for (; at > 0 && !before(at - 1); --at) {
    weights_[first + std::size_t(at)] = weights_[first + std::size_t(at) - 1];
    tokens_[first + std::size_t(at)] = tokens_[first + std::size_t(at) - 1];
  }
  weights_[first + std::size_t(at)] = weight;
  tokens_[first + std::size_t(at)] = token;
  if (n == kTop) {
    least_[row] = weights_[first + kTop - 1];
  }
}

void TopTokens::offer(int begin, int end, Pos token, const float* weights) {
  if (begin >= end || !(VecF(weights, end - begin).array() >= least_.segment(begin, end - begin)).any()) {
    return;
  }
  for (int r = begin; r < end; ++r) {
    offer(r, token, weights[r - begin]);
  }
}

// ---- FullAttention ----
FullAttention::FullAttention(const Layer& layer, const MetricSet& metrics)
    : layer_(layer), future_(asks_future(metrics)), top_(asks_top(metrics)), importance_(asks_importance(metrics)) {
  heads_.resize(std::size_t(layer.n_kv_heads));
  for (Head& h : heads_) {
    if (future_) {
      h.existing.setZero(layer.group_size, layer.n_steps());
      h.existing_no_sink = h.existing;
    }
    if (importance_) {
      h.mass.setZero(layer.group_size, (layer.n_tokens + kWindow - 1) / kWindow);
    }
  }
}

void FullAttention::block(int kv_head, const ExactBlock& e) {
  Head& h = heads_[std::size_t(kv_head)];
  if (future_) {
    future(h, e);
  }
  if (importance_) {
    importance(h, e);
  }
  if (top_) {
    h.top.reset(e.rows);
    for (Pos p = 0; p < e.begin + e.steps; ++p) {
      const int from = std::max(0, p - e.begin) * e.group_size;
      h.top.offer(from, e.rows, p, e.weights.row(p).data() + from);
    }
  }
}

// A query sees for each step behind it how much of its attention goes to tokens that were there then.
void FullAttention::future(Head& h, const ExactBlock& e) const {
  for (int r = 0; r < e.rows; ++r) {
    const Pos now = e.begin + r / e.group_size;
    const int g = r % e.group_size;
    double later = 0;  // weight of the tokens born since
    for (Pos t = now - 1; t >= std::max(layer_.prompt_len, now - kHorizon); --t) {
      later += double(e.weights(t + 1, r));
      double sinks = 0;
      for (Pos p = 0; p < std::min<Pos>(kSink, t + 1); ++p) {
        sinks += double(e.weights(p, r));
      }
      h.existing(g, t - layer_.prompt_len) += std::max(0.0, e.z[r] - later) / e.z[r];
      h.existing_no_sink(g, t - layer_.prompt_len) += std::max(0.0, e.z[r] - later - sinks) / e.z[r];
    }
  }
}

void FullAttention::importance(Head& h, const ExactBlock& e) const {
  h.events.clear();
  const int first_step = e.begin - layer_.prompt_len;
  const Eigen::ArrayXf inv_z = e.z.inverse().cast<float>();
  for (int s = 0; s < e.steps;) {
    const int n = std::min(e.steps - s, kWindow - (first_step + s) % kWindow);  // steps of one event
    const int from = s * e.group_size, n_rows = n * e.group_size;
    Eigen::ArrayXf attn(n_rows);
    for (Pos p = 0; p < e.begin + s + n; ++p) {
      attn = e.weights.row(p).segment(from, n_rows).transpose().array() * inv_z.segment(from, n_rows);
      h.mass.col(p / kWindow) += MapF(attn.data(), n, e.group_size).colwise().sum().transpose().cast<double>();
    }
    s += n;
    if ((first_step + s) % kWindow == 0) {
      const Pos begin = e.begin + s - kWindow;  // windows that were whole when the event began
      h.events.push_back({first_step + s - 1, h.mass.leftCols(begin / kWindow)});
    }
  }
}

// ---- Diagnostics ----
bool Diagnostics::asked(const Layer& layer, const MetricSet& m) {
  return asks_future(m) || asks_top(m) || asks_importance(m) || m.has(Metric::churn) ||
         (m.has(Metric::lost_mass) && !layer.spans.empty());
}

Diagnostics::Diagnostics(const Layer& layer, const MetricSet& metrics, const FullAttention& full, CellResult& cell,
                         int kv_row, int n_heads)
    : layer_(layer), full_(full), cell_(cell), kv_row_(kv_row) {
  if (asks_future(metrics)) {
    missed_.setZero(n_heads, layer.n_steps());
    missed_no_sink_ = missed_;
  }
  if (asks_importance(metrics)) {
    windows_.assign(std::size_t(n_heads), std::vector<Window>(std::size_t((layer.n_tokens + kWindow - 1) / kWindow)));
    counts_.resize(std::size_t(n_heads));
  }
}

Series* Diagnostics::find(Metric metric) const {
  for (Series& s : cell_.series) {
    if (s.metric == metric) {
      return &s;
    }
  }
  return nullptr;
}

void Diagnostics::block(const Set& set, const Lane& lane, const Eigen::ArrayXd& all, const Eigen::ArrayXd& gone) {
  if (missed_.size() > 0) {
    future(set, lane, all, gone);
  }
  if (find(Metric::top1_agreement) || find(Metric::top16_jaccard)) {
    agreement(set, lane);
  }
  if (!counts_.empty()) {
    importance(set, lane);
  }
  churn(set, lane);
  lost_mass(set, lane, all);
  if (set.reads()) {
    read_before_.assign(lane.read.end() - set.n_heads, lane.read.end());
  }
}

// A query adds its weight of every token that had left by then to each of the kHorizon steps behind it. The mass of all
// that have left is known: going back, only what left in between is taken off.
void Diagnostics::future(const Set& set, const Lane& lane, const Eigen::ArrayXd& all, const Eigen::ArrayXd& gone) {
  const ExactBlock& e = set.exact(lane);
  const int group = layer_.group_size, first_step = e.begin - layer_.prompt_len;
  for (std::size_t i = lane.n_measured; i < lane.evicted.size(); ++i) {
    if (lane.evicted[i].token < kSink) {
      sinks_.push_back(lane.evicted[i]);
    }
  }
  for (int r = 0; r < set.n_steps * set.n_heads; ++r) {
    const Pos now = e.begin + r / set.n_heads;
    const int head = r % set.n_heads, row = (r / set.n_heads) * group + lane.first_head + head;
    const auto is_gone = [](Pos at, const Eviction& x) { return at < x.missing_from; };
    auto i =
        std::size_t(std::upper_bound(lane.evicted.begin(), lane.evicted.end(), now, is_gone) - lane.evicted.begin());
    double sum = gone[r];
    if (set.reads()) {
      sum = 0;
      for (std::size_t j = 0; j < i; ++j) {
        sum += double(e.weights(lane.evicted[j].token, row));
      }
    }
    for (Pos t = now - 1; t >= std::max(layer_.prompt_len, now - kHorizon); --t) {
      for (; i > 0 && lane.evicted[i - 1].missing_from > t; --i) {
        sum -= double(e.weights(lane.evicted[i - 1].token, row));
      }
      if (i == 0) {
        break;
      }
      double sinks = 0;
      for (const Eviction& sink : sinks_) {
        sinks += sink.missing_from <= t ? double(e.weights(sink.token, row)) : 0;
      }
      missed_(head, t - layer_.prompt_len) += std::max(0.0, sum) / all[r];
      missed_no_sink_(head, t - layer_.prompt_len) += std::max(0.0, sum - sinks) / all[r];
    }
  }
  const FullAttention::Head& full = full_.head(lane.kv_head);
  const auto put = [&](Metric metric, const MatD& missed, const MatD& existing) {
    Series* series = find(metric);
    for (int h = 0; series && h < set.n_heads; ++h) {
      for (int s = std::max(0, first_step - kHorizon); s < first_step + set.n_steps; ++s) {
        const double there = existing(lane.first_head + h, s);
        if (there >= kLeastExisting) {
          series->at(lane.kv_head * group + lane.first_head + h, s) = float(missed(h, s) / there);
        }
      }
    }
  };
  put(Metric::future_missed_mass, missed_, full.existing);
  put(Metric::future_missed_mass_no_sink, missed_no_sink_, full.existing_no_sink);
}

void Diagnostics::agreement(const Set& set, const Lane& lane) {
  const ExactBlock& e = set.exact(lane);
  const int heads = set.n_heads, n_rows = set.n_steps * heads, group = layer_.group_size;
  top_.reset(n_rows);
  const auto exact_row = [&](int r) { return (r / heads) * group + lane.first_head + r % heads; };
  const auto offer = [&](Pos token, const float* weights, int begin, int end) {  // steps [begin, end)
    if (heads == group) {
      top_.offer(begin * heads, std::max(begin, end) * heads, token, weights + begin * heads);
      return;
    }
    for (int r = begin * heads; r < end * heads; ++r) {
      top_.offer(r, token, weights[exact_row(r)]);
    }
  };
  if (set.reads()) {
    for (int r = 0; r < n_rows; ++r) {
      for (Pos p : lane.read[std::size_t(r)]) {
        top_.offer(r, p, e.weights(p, exact_row(r)));
      }
    }
  } else {
    for (Pos p = 0; set.prompt_by_prefix() && p < layer_.prompt_len; ++p) {
      offer(p, e.weights.row(p).data(), 0, set.n_steps);
    }
    for (const Column& c : lane.columns) {
      offer(c.token, c.weights, c.begin, c.end);
    }
  }
  Series *first = find(Metric::top1_agreement), *jaccard = find(Metric::top16_jaccard);
  const FullAttention::Head& full = full_.head(lane.kv_head);
  for (int r = 0; r < n_rows; ++r) {
    const auto mine = top_.of(r), theirs = full.top.of(exact_row(r));
    if (mine.empty()) {
      continue;
    }
    const int head = lane.kv_head * group + lane.first_head + r % heads;
    const int step = e.begin - layer_.prompt_len + r / heads;
    if (first) {
      first->at(head, step) = mine[0] == theirs[0] ? 1 : 0;
    }
    if (jaccard) {
      const auto both = std::count_if(
          mine.begin(), mine.end(), [&](Pos p) { return std::find(theirs.begin(), theirs.end(), p) != theirs.end(); });
      jaccard->at(head, step) = float(double(both) / (double(mine.size() + theirs.size()) - double(both)));
    }
  }
}

void Diagnostics::importance(const Set& set, const Lane& lane) {
  const ExactBlock& e = set.exact(lane);
  const int n_events = layer_.n_steps() / kWindow, first_step = e.begin - layer_.prompt_len;
  std::vector<int> order;
  for (const FullAttention::Event& event : full_.head(lane.kv_head).events) {
    const int index = event.step / kWindow, n_windows = int(event.mass.cols());
    const Pos now = layer_.prompt_len + event.step;
    for (; n_counted_ < lane.evicted.size() && lane.evicted[n_counted_].missing_from <= now; ++n_counted_) {
      for (std::vector<Window>& windows : windows_) {
        ++windows[std::size_t(lane.evicted[n_counted_].token / kWindow)].n_gone;
      }
    }
    // As many as the cache could hold if it kept whole windows.
    const int n_kept =
        std::min(n_windows, std::max(1, lane.n_resident[std::size_t(event.step - first_step)] / kWindow));
    for (int h = 0; h < set.n_heads; ++h) {
      Counts& counts = counts_[std::size_t(h)];
      const auto mass = event.mass.row(lane.first_head + h);
      order.resize(std::size_t(n_windows));
      std::iota(order.begin(), order.end(), 0);
      std::nth_element(order.begin(), order.begin() + n_kept, order.end(),
                       [&](int a, int b) { return mass[a] != mass[b] ? mass[a] > mass[b] : a < b; });
      std::vector<char> now_important(std::size_t(n_windows), 0);
      for (int i = 0; i < n_kept; ++i) {
        now_important[std::size_t(order[std::size_t(i)])] = 1;
      }
      // A run that is over, or that is open when the trace ends: eligible if all its chances to return are in it.
      const auto close = [&](const Window& w, int end) {
        if (w.run >= kInactive && end - w.run + kInactive - 1 + kReturn < n_events) {
          const bool returned = w.run <= kInactive - 1 + kReturn;
          ++counts.eligible;
          counts.returned += returned;
          counts.lost += w.lost;
          counts.lost_returned += returned && w.lost;
        }
      };
      for (int i = 0; i < n_windows; ++i) {
        Window& w = windows_[std::size_t(h)][std::size_t(i)];
        const bool important = now_important[std::size_t(i)] != 0;
        if (w.known) {
          ++counts.from[w.important];
          counts.changed[w.important] += important != w.important;
        }
        w.known = true;
        w.important = important;
        if (important) {
          close(w, index);
          w.run = 0;
        } else if (++w.run == kInactive) {
          w.lost = w.n_gone == kWindow;
        }
        if (index == n_events - 1) {
          close(w, n_events);
        }
      }
    }
    if (index < n_events - 1) {
      continue;
    }
    const auto put = [&](Metric metric, auto part, auto whole) {
      Series* series = find(metric);
      for (int h = 0; series && h < set.n_heads; ++h) {
        const Counts& c = counts_[std::size_t(h)];
        if (whole(c) > 0) {
          series->at(lane.kv_head * layer_.group_size + lane.first_head + h, 0) =
              float(double(part(c)) / double(whole(c)));
        }
      }
    };
    using C = const Counts&;
    put(
        Metric::importance_return, [](C c) { return c.returned; }, [](C c) { return c.eligible; });
    put(
        Metric::lost_importance, [](C c) { return c.lost_returned; }, [](C c) { return c.lost; });
    put(
        Metric::importance_gain, [](C c) { return c.changed[0]; }, [](C c) { return c.from[0]; });
    put(
        Metric::importance_loss, [](C c) { return c.changed[1]; }, [](C c) { return c.from[1]; });
  }
}

// Between what is attended at a step and at the one before, of the tokens that both could attend.
void Diagnostics::churn(const Set& set, const Lane& lane) const {
  Series* series = find(Metric::churn);
  if (!series) {
    return;
  }
  const Pos begin = set.exact(lane).begin;
  std::size_t left = 0;  // evictions that are felt before the step
  while (left < lane.evicted.size() && lane.evicted[left].missing_from < begin) {
    ++left;
  }
  for (int s = 0; s < set.n_steps; ++s) {
    const Pos now = begin + s;
    const auto there_before = double(now) - double(left);
    int leaving = 0;
    for (; left < lane.evicted.size() && lane.evicted[left].missing_from <= now; ++left) {
      leaving += lane.evicted[left].token < now;
    }
    if (now == layer_.prompt_len) {
      continue;
    }
    double distance = there_before > 0 ? leaving / there_before : 0;
    if (set.reads()) {
      distance = 0;
      for (int h = 0; h < set.n_heads; ++h) {
        const auto at = std::size_t(s * set.n_heads + h);
        const auto& before = s > 0 ? lane.read[at - std::size_t(set.n_heads)] : read_before_[std::size_t(h)];
        distance += jaccard_distance(before, lane.read[at], now) / set.n_heads;
      }
    }
    series->at(kv_row_, now - layer_.prompt_len) = float(distance);
  }
}

void Diagnostics::lost_mass(const Set& set, const Lane& lane, const Eigen::ArrayXd& all) const {
  const ExactBlock& e = set.exact(lane);
  const int n_rows = set.n_steps * set.n_heads;
  for (Series& series : cell_.series) {
    if (series.metric != Metric::lost_mass) {
      continue;
    }
    std::vector<char> in_span(std::size_t(layer_.n_tokens), 0);
    for (const TokenSpan& span : layer_.spans) {  // ranges of one name count together
      if (span.name == series.span) {
        std::fill(in_span.begin() + span.begin, in_span.begin() + std::min(span.end, layer_.n_tokens), 1);
      }
    }
    Eigen::ArrayXd lost = Eigen::ArrayXd::Zero(n_rows);
    const auto row_of = [&](int r) {
      return (r / set.n_heads) * layer_.group_size + lane.first_head + r % set.n_heads;
    };
    if (set.reads()) {
      for (int r = 0; r < n_rows; ++r) {
        const auto& read = lane.read[std::size_t(r)];
        std::size_t next = 0;
        for (Pos p = 0; p <= e.begin + r / set.n_heads; ++p) {
          if (next < read.size() && read[next] == p) {
            ++next;
          } else if (in_span[std::size_t(p)]) {
            lost[r] += double(e.weights(p, row_of(r)));
          }
        }
      }
    } else {
      for (const auto& [token, missing_from] : lane.evicted) {
        if (!in_span[std::size_t(token)]) {
          continue;
        }
        const float* weights = e.weights.row(token).data();
        for (int r = std::max(0, missing_from - e.begin) * set.n_heads; r < n_rows; ++r) {
          lost[r] += double(weights[row_of(r)]);
        }
      }
    }
    for (int r = 0; r < n_rows; ++r) {
      series.at(lane.kv_head * layer_.group_size + lane.first_head + r % set.n_heads,
                e.begin - layer_.prompt_len + r / set.n_heads) = float(lost[r] / all[r]);
    }
  }
}

}  // namespace kvreplay
