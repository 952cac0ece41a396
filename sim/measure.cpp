#include "sim/measure.hpp"

#include <algorithm>
#include <cmath>

#include "sim/logit_sums.hpp"
#include "sim/product.hpp"

namespace kvreplay {
namespace {

constexpr int kChunk = 256;             // columns multiplied at once: operands stay in L2
constexpr double kFloatShare = 0.03;    // a difference of float products is good to 1e-4 while it is this share of them
constexpr double kLeastEvicted = 1e-6;  // evicted mass below which f_E is not looked at
constexpr double kLeastRetained = 6.06e-39;  // e^-88: retained mass below which there is no usable f_R
constexpr double kExactDifference = 1e-9;    // evicted mass down to which Z - Z_R is good to 1e-5

}  // namespace

// One lane's rows of the block: row = step * heads + head of the lane.
struct Meter::Rows {
  int steps, heads, group, first_head, dim;
  int size() const { return steps * heads; }
  int exact(int r) const { return (r / heads) * group + first_head + r % heads; }  // row of the exact block
  template <class Array>
  auto pick(const Array& all) const {  // from rows of the exact block
    typename Array::PlainObject picked(size(), all.cols());
    if (heads == group) {
      picked = all.topRows(size());
    } else {
      for (int r = 0; r < size(); ++r) {
        picked.row(r) = all.row(exact(r));
      }
    }
    return picked;
  }
  // Calls use(array) with the weights of one column, steps [lo, hi), own heads only.
  template <class Use>
  void own(const float* weights, int lo, int hi, Use use) const {
    const int n = (hi - lo) * heads;
    if (heads == group) {
      use(VecF(weights + lo * heads, n).array());
    } else {
      use(Eigen::Map<const Eigen::ArrayXf, 0, Eigen::InnerStride<>>(weights + lo * group + first_head, n,
                                                                    Eigen::InnerStride<>(group)));
    }
  }
};

// Sums over some tokens, by row of the lane: of weight * value, and of weight.
struct Meter::Sums {
  MatD num;          // (rows, v_head_dim)
  Eigen::ArrayXd z;  // (rows)

  // The one product per block and method: adds weight * value to rows `only` (empty: all of them).
  // for_each calls back with (weights, value, first step, end step) of each column.
  template <class T, class ForEach>
  static void add_products(const Rows& rows, const std::vector<int>& only, ForEach for_each, MatD& num) {
    using Mat = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    static thread_local Mat w, v, part;  // kept: allocating 512 KiB per block costs page faults
    w.resize(kChunk, only.empty() ? rows.size() : int(only.size()));
    v.resize(kChunk, rows.dim);
    int filled = 0;
    const auto flush = [&] {
      part.noalias() = w.topRows(filled).transpose() * v.topRows(filled);
      num += part.template cast<double>();
      filled = 0;
    };
    for_each([&](const float* weights, const float* value, int lo, int hi) {
      if (lo >= hi) {
        return;
      }
      auto row = w.row(filled);
      if (only.empty()) {
        row.head(lo * rows.heads).setZero();
        row.tail((rows.steps - hi) * rows.heads).setZero();
        rows.own(weights, lo, hi,
                 [&](const auto& x) { row.segment(lo * rows.heads, x.size()) = x.template cast<T>(); });
      } else {
        for (std::size_t i = 0; i < only.size(); ++i) {
          const int step = only[i] / rows.heads;
          row[Eigen::Index(i)] = lo <= step && step < hi ? T(weights[rows.exact(only[i])]) : T(0);
        }
      }
      v.row(filled) = VecF(value, rows.dim).transpose().cast<T>();
      if (++filled == kChunk) {
        flush();
      }
    });
    if (filled > 0) {
      flush();
    }
  }

  // The same for all rows in float, where weights and values lie.
  template <class ForEach>
  static void add_in_place(const Rows& rows, ForEach for_each, MatD& num) {
    static thread_local std::vector<const float*> weights, values;
    static thread_local std::vector<std::unique_ptr<Eigen::ArrayXf>> partial;  // columns that are there for some steps
    weights.clear();
    values.clear();
    std::size_t n_partial = 0;
    for_each([&](const float* column, const float* value, int lo, int hi) {
      if (lo >= hi) {
        return;
      }
      if (lo > 0 || hi < rows.steps) {
        if (n_partial == partial.size()) {
          partial.push_back(std::make_unique<Eigen::ArrayXf>());
        }
        Eigen::ArrayXf& part = *partial[n_partial++];
        part.setZero(rows.size());
        const int from = lo * rows.heads, n = (hi - lo) * rows.heads;
        part.segment(from, n) = VecF(column + from, n).array();
        column = part.data();
      }
      weights.push_back(column);
      values.push_back(value);
    });
    add_products_in_place(weights, values, num);
  }

  // Adds the weights of all columns to z.
  template <class ForEach>
  static void add_weights(const Rows& rows, ForEach for_each, Eigen::ArrayXd& z) {
    for_each([&](const float* weights, const float*, int lo, int hi) {
      if (lo >= hi) {
        return;
      }
      rows.own(weights, lo, hi,
               [&](const auto& x) { z.segment(lo * rows.heads, x.size()) += x.template cast<double>(); });
    });
  }

  // Adds weight * value of all columns to num, whose z is known. With `all_z` the caller wants all - sum: in double for
  // the rows where floats could not tell.
  template <class ForEach>
  void multiply(const Rows& rows, ForEach for_each, const Eigen::ArrayXd* all_z) {
    std::vector<int> fine;
    for (int r = 0; all_z && r < rows.size(); ++r) {
      if ((*all_z)[r] - z[r] <= kFloatShare * (*all_z)[r]) {
        fine.push_back(r);
      }
    }
    if (int(fine.size()) > rows.size() / 4) {
      add_products<double>(rows, {}, for_each, num);
      return;
    }
    MatD fine_num = num(fine, Eigen::all);
    if (rows.heads == rows.group && multiplies_in_place(rows.dim)) {
      add_in_place(rows, for_each, num);
    } else {
      add_products<float>(rows, {}, for_each, num);
    }
    if (!fine.empty()) {
      add_products<double>(rows, fine, for_each, fine_num);
      num(fine, Eigen::all) = fine_num;
    }
  }
};

Meter::Meter(const Layer& layer, const ReplayOptions& options, const CellCompensators& compensators, CellResult& cell,
             Checkpoints& checkpoints, const FullAttention& full, const Set& set, int lane)
    : layer_(layer),
      options_(options),
      cell_(cell),
      checkpoints_(checkpoints),
      acting_(compensators.acting),
      span_evicted_(layer.spans.size(), 0) {
  const Lane& l = set.lanes[std::size_t(lane)];
  const bool per_query_head = set.traits.scope == Scope::query_head;
  row_ = per_query_head ? l.kv_head * layer.group_size + l.first_head : l.kv_head;
  if (Diagnostics::asked(layer, options.metrics)) {
    diagnostics_ = std::make_unique<Diagnostics>(layer, options.metrics, full, cell, row_, set.n_heads);
  }
  MomentNeeds needs;
  SetShape shape = layer.shape();
  shape.kv_head = l.kv_head;
  shape.n_heads = set.n_heads;
  shape.budget = set.budget;
  shape.seed = options.seed;
  for (const PartUse* part : compensators.parts) {
    const auto config = part->config(layer.index, l.kv_head);
    compensators_.push_back(part->info->compensate(config.get(), shape));
    needs = needs | compensators_.back()->needs();
    prompt_queries_.push_back(part->info->needs(config.get()).prompt_queries);
    sees_retained_ = sees_retained_ || compensators_.back()->sees_retained();
  }
  if (!compensators_.empty()) {
    moments_ = std::make_unique<MomentTrack>(layer.head_dim, layer.v_head_dim, needs);
  }
}

float* Meter::out(Metric metric, int row, int compensator) {
  for (Series& s : cell_.series) {
    if (s.metric == metric && s.compensator == compensator) {
      return &s.at(row, begin_ - layer_.prompt_len);
    }
  }
  return nullptr;
}

void Meter::block(const Set& set, Lane& lane, HeadErrors* errors) {
  begin_ = set.exact(lane).begin;
  if (begin_ == layer_.prompt_len && !set.prompt_by_prefix()) {
    show_prompt(set, lane);
  }
  const Rows rows{set.n_steps, set.n_heads, layer_.group_size, lane.first_head, layer_.v_head_dim};
  query_heads(set, lane, rows, errors);
  kv_head(set, lane);
  lane.n_measured = lane.evicted.size();
}

// The largest weight that each row attends: (rows). Of tokens that a reader chose, as they are in the trace.
template <class ForEach>
Eigen::ArrayXd Meter::top_weights(const Set& set, const Lane& lane, const Rows& rows, ForEach attended) const {
  const ExactBlock& e = set.exact(lane);
  Eigen::ArrayXd top = Eigen::ArrayXd::Zero(rows.size());
  if (set.reads()) {
    for (int r = 0; r < rows.size(); ++r) {
      for (Pos p : lane.read[std::size_t(r)]) {
        top[r] = std::max(top[r], double(e.weights(p, rows.exact(r))));
      }
    }
    return top;
  }
  const auto raise = [&](const float* weights, const float*, int lo, int hi) {
    if (lo < hi) {
      rows.own(weights, lo, hi, [&](const auto& x) {
        auto t = top.segment(lo * rows.heads, x.size());
        t = t.max(x.template cast<double>());
      });
    }
  };
  if (set.prompt_by_prefix()) {
    for (Pos p = 0; p < layer_.prompt_len; ++p) {
      raise(e.weights.row(p).data(), nullptr, 0, rows.steps);
    }
  }
  attended(raise);
  return top;
}

// What compensators that ask for it learn of the prompt.
void Meter::show_prompt(const Set& set, const Lane& lane) {
  const auto rows_of = [](const MatF& all, const std::vector<Pos>& tokens) { return MatF(all(tokens, Eigen::all)); };
  for (std::size_t c = 0; c < compensators_.size(); ++c) {
    if (prompt_queries_[c] == 0) {
      continue;
    }
    const int available = layer_.prompt_len - layer_.first_query;
    const int n = prompt_queries_[c] == Needs::kAll ? available : std::min(prompt_queries_[c], available);
    std::vector<Pos> retained, evicted;
    for (const Eviction& e : lane.evicted) {
      if (e.token < layer_.prompt_len && e.missing_from <= layer_.prompt_len) {
        evicted.push_back(e.token);
      }
    }
    std::sort(evicted.begin(), evicted.end());
    for (Pos p = 0; p < layer_.prompt_len; ++p) {
      if (!std::binary_search(evicted.begin(), evicted.end(), p)) {
        retained.push_back(p);
      }
    }
    const auto queries = layer_.queries(lane.kv_head, layer_.prompt_len - n, n);
    PromptCut cut{.q = MatF(Eigen::Index(n) * set.n_heads, layer_.head_dim),
                  .n_heads = set.n_heads,
                  .retained_k = rows_of(layer_.k[std::size_t(lane.kv_head)], retained),
                  .evicted_k = rows_of(layer_.k[std::size_t(lane.kv_head)], evicted),
                  .retained_v = rows_of(layer_.v[std::size_t(lane.kv_head)], retained),
                  .evicted_v = rows_of(layer_.v[std::size_t(lane.kv_head)], evicted),
                  .evicted = evicted};
    for (Eigen::Index r = 0; r < cut.q.rows(); ++r) {
      cut.q.row(r) = queries.row(r / set.n_heads * layer_.group_size + lane.first_head + r % set.n_heads);
    }
    compensators_[c]->prompt(cut);
  }
}

void Meter::query_heads(const Set& set, Lane& lane, const Rows& rows, HeadErrors* errors) {
  const ExactBlock& e = set.exact(lane);
  const int n_rows = rows.size();
  MatD picked;
  if (rows.heads != rows.group) {
    picked = rows.pick(e.num);
  }
  const MatD& all_num = rows.heads != rows.group ? picked : e.num;  // (rows, v_head_dim) over all tokens
  const Eigen::ArrayXd all_z = rows.pick(e.z);
  const Eigen::ArrayXf max_logit = rows.pick(e.max_logit);
  // Where sums over what is attended begin: a prompt pinned by prefix is in them already.
  const auto start = [&] {
    return set.prompt_by_prefix() ? Sums{rows.pick(e.num_prompt), rows.pick(e.z_prompt)}
                                  : Sums{MatD::Zero(n_rows, rows.dim), Eigen::ArrayXd::Zero(n_rows)};
  };
  const bool with_f_e = options_.metrics.needs_evicted_output();

  const auto evicted_tokens = [&](auto use) {
    for (const auto& [token, missing_from] : lane.evicted) {
      const int from = std::max(0, missing_from - e.begin);
      use(e.weights.row(token).data(), layer_.v[lane.kv_head].row(token).data(), from, rows.steps);
    }
  };
  const auto retained_tokens = [&](auto use) {
    for (const Column& c : lane.columns) {
      use(c.weights, c.value, 0, c.plain_end);
    }
  };
  const auto attended_columns = [&](auto use) {
    for (const Column& c : lane.columns) {
      use(c.weights, c.value, c.begin, c.end);
    }
  };

  // Retained and evicted tokens: one side is summed, the smaller one, and the other is what is left of all.
  Sums direct;
  bool retained_is_direct = true;
  Eigen::ArrayXd retained_z, evicted_z;
  if (set.reads()) {
    direct = set.rewrites() ? Sums{lane.read_plain_num, lane.read_plain_z} : Sums{lane.read_num, lane.read_z};
  } else {
    Eigen::ArrayXd z;
    if (set.rewrites()) {
      z = start().z;
      Sums::add_weights(rows, retained_tokens, z);
    } else {
      z = rows.pick(lane.z);
    }
    retained_is_direct =
        lane.evicted.size() >= lane.slots.size() + lane.pinned.size() || (!with_f_e && (z < kFloatShare * all_z).any());
    if (retained_is_direct) {
      direct = start();
      direct.z = z;
      direct.multiply(rows, retained_tokens, with_f_e ? &all_z : nullptr);
    } else {
      direct = {MatD::Zero(n_rows, rows.dim), Eigen::ArrayXd::Zero(n_rows)};
      Sums::add_weights(rows, evicted_tokens, direct.z);
      direct.multiply(rows, evicted_tokens, with_f_e ? &all_z : nullptr);
    }
  }
  (retained_is_direct ? retained_z : evicted_z) = direct.z;
  (retained_is_direct ? evicted_z : retained_z) = (all_z - direct.z).max(0.0);
  if (retained_is_direct && !set.reads() && options_.metrics.has(Metric::log_mass_ratio) && !compensators_.empty() &&
      !lane.evicted.empty() && (evicted_z < kExactDifference * all_z).any()) {
    evicted_z.setZero();
    Sums::add_weights(rows, evicted_tokens, evicted_z);
  }
  if (diagnostics_) {
    diagnostics_->block(set, lane, all_z, evicted_z);
  }
  // Writes one row's output over the retained, or over the evicted tokens.
  const auto side = [&](bool retained, int r, Eigen::RowVectorXd& out) {
    const double z = retained ? retained_z[r] : evicted_z[r];
    if (retained == retained_is_direct) {
      out = direct.num.row(r) / z;
    } else {
      out = (all_num.row(r) - direct.num.row(r)) / z;
    }
  };
  // What the method itself returns, where it is not the retained tokens as they were.
  Sums output;
  if (set.rewrites() && set.reads()) {
    output = {lane.read_num, lane.read_z};
  } else if (set.rewrites()) {
    output = start();
    output.z = rows.pick(lane.z);
    output.multiply(rows, attended_columns, nullptr);
  }
  const Eigen::ArrayXd& own_z = set.rewrites() ? output.z : retained_z;

  std::vector<int> n_missing(std::size_t(rows.steps), 0);  // evicted tokens that each step misses
  {
    std::size_t seen = 0;
    for (int s = 0; s < rows.steps; ++s) {
      while (seen < lane.evicted.size() && lane.evicted[seen].missing_from <= e.begin + s) {
        ++seen;
      }
      n_missing[std::size_t(s)] = int(seen);
    }
  }

  std::vector<Loss> losses;
  for (std::size_t i = lane.n_measured; i < lane.evicted.size(); ++i) {
    const auto [token, missing_from] = lane.evicted[i];
    losses.push_back({std::max(0, missing_from - e.begin), layer_.k[lane.kv_head].row(token).data(),
                      layer_.v[lane.kv_head].row(token).data(), token});
  }
  std::vector<Estimate> estimates(compensators_.size());
  if (moments_) {
    const MatF q = rows.pick(MatF(layer_.queries(lane.kv_head, e.begin, rows.steps)));
    const MomentRows& moments = moments_->block(q, rows.heads, losses);
    EvictedBlock block{q, rows.heads, losses, moments};
    if (sees_retained_) {
      block.log_retained = own_z.log() + max_logit.cast<double>();
      block.top_retained = top_weights(set, lane, rows, attended_columns).log() + max_logit.cast<double>();
    }
    for (std::size_t c = 0; c < compensators_.size(); ++c) {
      compensators_[c]->estimate(block, estimates[c]);
    }
  }
  Eigen::ArrayXd variance, spread;
  if (options_.metrics.has(Metric::logit_variance) || options_.metrics.has(Metric::logit_spread)) {
    logits(set, lane, rows, n_missing, variance, spread);
  }

  // Where the series of this block begin, by head of the lane.
  struct Out {
    float *evicted_mass, *error, *error_output, *cos, *mismatch, *norm_ratio, *parallel, *orthogonal, *variance,
        *spread;
    std::vector<float*> corrected, cos_estimate, log_ratio, exact_mass, exact_direction;
  };
  std::vector<Out> outs;
  for (int h = 0; h < rows.heads; ++h) {
    const int head = lane.kv_head * layer_.group_size + lane.first_head + h;
    Out& o = outs.emplace_back();
    o = {out(Metric::evicted_mass, head),
         out(Metric::error, head),
         out(Metric::error_output, head),
         out(Metric::cos_retained_evicted, head),
         out(Metric::directional_mismatch, head),
         out(Metric::norm_ratio_evicted, head),
         out(Metric::error_parallel, head),
         out(Metric::error_orthogonal, head),
         out(Metric::logit_variance, head),
         out(Metric::logit_spread, head),
         {},
         {},
         {},
         {},
         {}};
    for (int c = 0; c < int(compensators_.size()); ++c) {
      o.corrected.push_back(out(Metric::error_corrected, head, c));
      o.cos_estimate.push_back(out(Metric::cos_estimate, head, c));
      o.log_ratio.push_back(out(Metric::log_mass_ratio, head, c));
      o.exact_mass.push_back(out(Metric::error_exact_mass, head, c));
      o.exact_direction.push_back(out(Metric::error_exact_direction, head, c));
    }
  }
  // Keeps one row's output if its step is among those asked for.
  const auto keep = [&](std::vector<float>& to, int head, int step, const auto& x) {
    const auto& steps = options_.output_steps;
    const auto it = std::find(steps.begin(), steps.end(), e.begin - layer_.prompt_len + step);
    if (it == steps.end()) {
      return;
    }
    const auto at = (std::size_t(head) * steps.size() + std::size_t(it - steps.begin())) * std::size_t(rows.dim);
    for (int i = 0; i < rows.dim; ++i) {
      to[at + std::size_t(i)] = float(x[i]);
    }
  };
  const bool keeps = !options_.output_steps.empty();
  const auto put = [](float* series, int step, double x) {
    if (series) {
      series[step] = float(x);
    }
  };

  Eigen::RowVectorXd f, f_r, f_e, f_own, correction, difference;
  for (int r = 0; r < n_rows; ++r) {
    const int step = r / rows.heads;
    Out& o = outs[std::size_t(r % rows.heads)];
    const int head = lane.kv_head * layer_.group_size + lane.first_head + r % rows.heads;
    f = all_num.row(r) / all_z[r];
    const double norm_f = f.norm();
    if (keeps) {
      keep(cell_.outputs.full, head, step, f);
    }
    if (errors) {
      errors->full.row(step).segment(head * rows.dim, rows.dim) = f.cast<float>();
    }
    const auto keep_error = [&](MatF& where, const auto& x) {
      where.row(step).segment(head * rows.dim, rows.dim) = x.template cast<float>();
    };
    const int n_seen = e.begin + step + 1;
    const bool complete =
        set.reads() ? int(lane.read[std::size_t(r)].size()) == n_seen : n_missing[std::size_t(step)] == 0;
    const double w_e = complete ? 0 : std::min(1.0, evicted_z[r] / all_z[r]);
    put(o.evicted_mass, step, w_e);
    if (complete && keeps) {
      keep(cell_.outputs.retained, head, step, f);
    }
    if (complete && !set.rewrites()) {  // nothing is missing and nothing was changed
      put(o.error, step, 0);
      put(o.error_output, step, 0);
      for (float* c : o.corrected) {
        put(c, step, 0);
      }
      continue;
    }
    const bool usable = (complete || retained_z[r] >= kLeastRetained) && own_z[r] >= kLeastRetained && norm_f > 0;
    if (!usable) {
      if (errors) {
        const auto nan = Eigen::RowVectorXf::Constant(rows.dim, kSkipped);
        keep_error(errors->plain, nan);
        keep_error(errors->output, nan);
        for (MatF& m : errors->corrected) {
          keep_error(m, nan);
        }
      }
      continue;
    }

    if (complete) {
      f_r = f;
    } else {
      side(true, r, f_r);
    }
    if (keeps) {
      keep(cell_.outputs.retained, head, step, f_r);
      if (!complete && evicted_z[r] > 0) {
        side(false, r, f_e);
        keep(cell_.outputs.evicted, head, step, f_e);
      }
      for (std::size_t c = 0; c < estimates.size(); ++c) {
        keep(cell_.outputs.estimate[c], head, step, estimates[c].value.row(r));
      }
    }
    difference = f - f_r;
    put(o.error, step, complete ? 0 : difference.norm() / norm_f);
    if (errors) {
      keep_error(errors->plain, difference);
    }
    if (set.rewrites()) {
      f_own = output.num.row(r) / own_z[r];
    } else {
      f_own = f_r;
    }
    difference = f - f_own;
    double error_output = difference.norm() / norm_f;
    if (errors && acting_ < 0) {
      keep_error(errors->output, difference);
    }

    const double ln_z_own = std::log(own_z[r]) + double(max_logit[r]);
    const double ln_z_e = std::log(evicted_z[r]) + double(max_logit[r]);
    const bool sees_f_e = !complete && with_f_e && w_e >= kLeastEvicted;
    double norm_e = 0;
    if (sees_f_e) {
      side(false, r, f_e);
      norm_e = f_e.norm();
      const double norm_r = f_r.norm();
      if (norm_e > 0 && norm_r > 0) {
        const double cosine = f_r.dot(f_e) / (norm_r * norm_e);
        put(o.cos, step, cosine);
        put(o.mismatch, step, 1 - cosine);
        put(o.norm_ratio, step, std::log(norm_e / norm_r));
        // |f_E sin| without cancellation: what is left of f_E beside its part along f_R.
        const double along = f_r.dot(f_e) / norm_r;
        put(o.parallel, step, w_e * std::abs(along - norm_r) / norm_f);
        put(o.orthogonal, step, w_e * (f_e - f_r * (along / norm_r)).norm() / norm_f);
      }
    }
    if (!complete && variance.size() > 0) {
      put(o.variance, step, variance[r]);
      put(o.spread, step, spread[r]);
    }

    for (std::size_t c = 0; c < estimates.size(); ++c) {
      const double ln_z_hat = estimates[c].log_mass[r];
      const auto value = estimates[c].value.row(r);
      const bool any = ln_z_hat > -std::numeric_limits<double>::infinity();
      // The share that the estimate gets of the whole; exp of the difference alone, never of a logit.
      const double w_hat = any ? 1 / (1 + std::exp(std::clamp(ln_z_own - ln_z_hat, -700.0, 700.0))) : 0;
      if (any) {
        correction = value - f_own;
      } else {
        correction.setZero(rows.dim);
      }
      difference = f - f_own - w_hat * correction;
      const double corrected = difference.norm() / norm_f;
      put(o.corrected[c], step, corrected);
      if (errors) {
        keep_error(errors->corrected[c], difference);
      }
      if (int(c) == acting_) {
        error_output = corrected;
        if (errors) {
          keep_error(errors->output, difference);
        }
      }
      if (complete || !any) {
        continue;
      }
      if (evicted_z[r] > 0) {
        put(o.log_ratio[c], step, ln_z_e - ln_z_hat);
      }
      if (o.exact_mass[c]) {
        put(o.exact_mass[c], step, (f - f_own - w_e * correction).norm() / norm_f);
      }
      if (sees_f_e) {
        const double norm_hat = value.norm();
        if (norm_e > 0 && norm_hat > 0) {
          put(o.cos_estimate[c], step, f_e.dot(value) / (norm_e * norm_hat));
        }
        if (o.exact_direction[c]) {
          put(o.exact_direction[c], step, (f - f_own - w_hat * (f_e - f_own)).norm() / norm_f);
        }
      }
    }
    put(o.error_output, step, error_output);
  }
}

// Variance of the evicted logits, and their extremes against their mean.
void Meter::logits(const Set& set, const Lane& lane, const Rows& rows, std::span<const int> n_missing,
                   Eigen::ArrayXd& variance, Eigen::ArrayXd& spread) const {
  const ExactBlock& e = set.exact(lane);
  const int n_rows = rows.size();
  spread.setZero(n_rows);
  if (set.reads()) {
    variance.setZero(n_rows);
    for (int r = 0; r < n_rows; ++r) {
      const auto& read = lane.read[std::size_t(r)];
      const int row = rows.exact(r), n_seen = e.begin + r / rows.heads + 1;
      const auto left_out = [&](auto use) {
        std::size_t next = 0;
        for (Pos p = 0; p < n_seen; ++p) {
          if (next < read.size() && read[next] == p) {
            ++next;
          } else {
            use(double(e.logits(p, row)));
          }
        }
      };
      double n = 0, sum = 0, squares = 0, far = 0;
      left_out([&](double x) { sum += x, ++n; });
      left_out([&](double x) { squares += (x - sum / n) * (x - sum / n), far = std::max(far, std::abs(x - sum / n)); });
      variance[r] = n > 0 ? squares / n : 0;
      spread[r] = far;
    }
    return;
  }
  // Calls use(first row that misses the token, its logits: (rows)) for the first n evicted tokens.
  const auto evicted = [&](std::size_t n, auto use) {
    Eigen::ArrayXf own;
    for (std::size_t i = 0; i < n; ++i) {
      const auto [token, missing_from] = lane.evicted[i];
      const int lo = std::max(0, missing_from - e.begin);
      if (lo >= rows.steps) {
        return;
      }
      const float* logits = e.logits.row(token).data();
      if (rows.heads != rows.group) {
        own.resize(n_rows);
        rows.own(logits, lo, rows.steps, [&](const auto& x) { own.segment(lo * rows.heads, x.size()) = x; });
        logits = own.data();
      }
      use(lo * rows.heads, logits);
    }
  };
  constexpr std::size_t kTypical = 64;  // tokens whose mean tells what a typical logit is
  Eigen::ArrayXd n = Eigen::ArrayXd::Zero(n_rows), typical = n;
  evicted(std::min(kTypical, lane.evicted.size()), [&](int from, const float* x) {
    n.tail(n_rows - from) += 1;
    typical.tail(n_rows - from) += VecF(x + from, n_rows - from).array().cast<double>();
  });
  LogitSums sums((typical / n.max(1.0)).cast<float>());
  std::vector<const float*> whole;
  evicted(lane.evicted.size(), [&](int from, const float* x) {
    if (from == 0 && rows.heads == rows.group) {
      whole.push_back(x);
    } else {
      sums.add(x, from);
    }
  });
  sums.add(whole);
  for (int r = 0; r < n_rows; ++r) {
    n[r] = n_missing[std::size_t(r / rows.heads)];
  }
  sums.finish(n, variance, spread);
}

void Meter::kv_head(const Set& set, const Lane& lane) {
  float* resident = out(Metric::resident, row_);
  float* attended = out(Metric::attended, row_);
  float* bytes = out(Metric::bytes, row_);
  float* bytes_read = out(Metric::bytes_read, row_);
  // What the method's own text remembers of the evicted is kept and read too.
  const double state = acting_ >= 0 ? compensators_[std::size_t(acting_)]->state_bytes() : 0;
  for (int s = 0; s < set.n_steps; ++s) {
    const auto i = std::size_t(s);
    if (resident) {
      resident[s] = float(lane.n_resident[i]);
    }
    if (bytes) {
      bytes[s] = float(lane.step_bytes[i] + state);
    }
    if (bytes_read) {
      bytes_read[s] = float(lane.step_bytes_read[i] + state);
    }
    if (!attended) {
      continue;
    }
    double sum = lane.n_resident[i];
    if (set.reads()) {
      sum = 0;
      for (int h = 0; h < set.n_heads; ++h) {
        sum += double(lane.read[i * std::size_t(set.n_heads) + std::size_t(h)].size());
      }
      sum /= set.n_heads;
    }
    attended[s] = float(sum);
  }
  keep_attended(set, lane);
  retention(set, lane);
  checkpoints(set, lane);
}

// One bit per query head, step and token.
void Meter::keep_attended(const Set& set, const Lane& lane) {
  if (cell_.attended.empty()) {
    return;
  }
  const std::size_t n_bytes = (std::size_t(layer_.n_tokens) + 7) / 8;
  for (int r = 0; r < set.n_steps * set.n_heads; ++r) {
    const int head = lane.kv_head * layer_.group_size + lane.first_head + r % set.n_heads;
    const std::size_t step = std::size_t(begin_ - layer_.prompt_len + r / set.n_heads);
    std::uint8_t* bits = &cell_.attended[(std::size_t(head) * std::size_t(layer_.n_steps()) + step) * n_bytes];
    for (Pos p : lane.read[std::size_t(r)]) {
      bits[p / 8] = std::uint8_t(bits[p / 8] | 1U << (p % 8));
    }
  }
}

void Meter::retention(const Set& set, const Lane& lane) {
  if (layer_.spans.empty()) {
    return;
  }
  const auto lose = [&](Pos p) {
    for (std::size_t i = 0; i < layer_.spans.size(); ++i) {
      span_evicted_[i] += layer_.spans[i].begin <= p && p < layer_.spans[i].end;
    }
  };
  std::size_t next = lane.n_measured;
  for (int s = 0; s < set.n_steps; ++s) {
    const Pos now = begin_ + s;
    for (; next < lane.evicted.size() && lane.evicted[next].missing_from <= now; ++next) {
      lose(lane.evicted[next].token);
    }
    for (Series& series : cell_.series) {
      if (series.metric != Metric::retention) {
        continue;
      }
      int born = 0, kept = 0;
      for (std::size_t i = 0; i < layer_.spans.size(); ++i) {  // ranges of one name count together
        const TokenSpan& span = layer_.spans[i];
        if (span.name != series.span) {
          continue;
        }
        const int here = std::clamp(now + 1 - span.begin, 0, span.end - span.begin);
        born += here;
        kept += here - span_evicted_[i];
      }
      if (born > 0) {
        series.at(row_, now - layer_.prompt_len) = float(kept) / float(born);
      }
    }
  }
  for (; next < lane.evicted.size(); ++next) {
    lose(lane.evicted[next].token);
  }  // the next block feels these
}

void Meter::checkpoints(const Set& set, const Lane& lane) {
  if (!options_.metrics.at_checkpoints()) {
    return;
  }
  const std::vector<int> steps = checkpoint_steps(layer_.n_steps(), options_.n_checkpoints);
  const int first = begin_ - layer_.prompt_len;
  const bool chance = options_.metrics.any([](const MetricInfo& i) { return i.name.ends_with("_chance"); });
  for (std::size_t c = 0; c < steps.size(); ++c) {
    const int s = steps[c] - first;
    if (s < 0 || s >= set.n_steps) {
      continue;
    }
    const Pos now = begin_ + s;
    std::vector<char> kept(std::size_t(now) + 1, 1);
    if (set.reads()) {  // what any head of the group attends
      std::fill(kept.begin(), kept.end(), 0);
      for (int h = 0; h < set.n_heads; ++h) {
        for (Pos p : lane.read[std::size_t(s * set.n_heads + h)]) {
          kept[std::size_t(p)] = 1;
        }
      }
    } else {
      for (const auto& [token, missing_from] : lane.evicted) {
        if (missing_from <= now) {
          kept[std::size_t(token)] = 0;
        }
      }
    }
    std::vector<Pos> retained;
    for (Pos p = 0; p <= now; ++p) {
      if (kept[std::size_t(p)]) {
        retained.push_back(p);
      }
    }
    if (int(retained.size()) < Checkpoints::kLeast || now + 1 - Pos(retained.size()) < Checkpoints::kLeast) {
      continue;
    }
    const Checkpoints::Answer a = checkpoints_.measure(lane.kv_head, now, retained, chance);
    const auto put = [&](Metric metric, double x) {
      for (Series& series : cell_.series) {
        if (series.metric == metric) {
          series.at(row_, int(c)) = float(x);
        }
      }
    };
    put(Metric::outside_energy_k, a.k.outside_energy);
    put(Metric::outside_energy_v, a.v.outside_energy);
    put(Metric::subspace_cos_k, a.k.subspace_cos);
    put(Metric::subspace_cos_v, a.v.subspace_cos);
    put(Metric::centroid_cos_k, a.k.centroid_cos);
    put(Metric::centroid_cos_v, a.v.centroid_cos);
    if (!chance) {
      continue;
    }
    put(Metric::outside_energy_k_chance, a.k_chance.outside_energy);
    put(Metric::outside_energy_v_chance, a.v_chance.outside_energy);
    put(Metric::subspace_cos_k_chance, a.k_chance.subspace_cos);
    put(Metric::subspace_cos_v_chance, a.v_chance.subspace_cos);
  }
}

std::vector<int> checkpoint_steps(int n_steps, int n_checkpoints) {
  std::vector<int> steps;
  for (int i = 1; i <= n_checkpoints; ++i) {
    const int s = int(std::int64_t(i) * n_steps / n_checkpoints) - 1;
    if (s >= 0 && (steps.empty() || steps.back() != s)) {
      steps.push_back(s);
    }
  }
  return steps;
}

void add_series(CellResult& cell, const Layer& layer, const ReplayOptions& options, int kv_rows) {
  cell.n_steps = layer.n_steps();
  const std::vector<int> checkpoints = checkpoint_steps(cell.n_steps, options.n_checkpoints);
  for (const MetricInfo& info : all_metrics()) {
    if (!options.metrics.has(info.metric) || (info.level == Level::layer && layer.w_o.size() == 0)) {
      continue;
    }
    const auto add = [&](int compensator, const std::string& span) {
      Series s{.metric = info.metric,
               .compensator = compensator,
               .span = span,
               .rows = 1,
               .steps = {},
               .n_steps = cell.n_steps,
               .values = {}};
      if (info.level == Level::query_head) {
        s.rows = layer.n_heads;
      }
      if (info.level == Level::kv_head) {
        s.rows = kv_rows;
      }
      if (info.at_checkpoints) {
        s.steps = checkpoints;
        s.n_steps = int(checkpoints.size());
      }
      if (info.at_end) {
        s.steps = {cell.n_steps - 1};
        s.n_steps = 1;
      }
      s.values.assign(std::size_t(s.rows) * std::size_t(s.n_steps), kSkipped);
      cell.series.push_back(std::move(s));
    };
    if (info.per_compensator) {
      for (int c = 0; c < int(cell.compensators.size()); ++c) {
        add(c, "");
      }
    } else if (info.per_span) {
      std::vector<std::string> names;
      for (const TokenSpan& span : layer.spans) {
        if (std::find(names.begin(), names.end(), span.name) == names.end()) {
          names.push_back(span.name);
        }
      }
      for (const std::string& name : names) {
        add(-1, name);
      }
    } else {
      add(-1, "");
    }
  }
}

void fold_query_heads(CellResult& cell, const Layer& layer) {
  for (Series& s : cell.series) {
    if (info(s.metric).level != Level::kv_head) {
      continue;
    }
    const bool adds_up = s.metric == Metric::resident || s.metric == Metric::bytes || s.metric == Metric::bytes_read;
    Series folded = s;
    folded.rows = layer.n_kv_heads;
    folded.values.assign(std::size_t(folded.rows) * std::size_t(s.n_steps), kSkipped);
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      for (int i = 0; i < s.n_steps; ++i) {
        double sum = 0;
        int n = 0;
        for (int g = 0; g < layer.group_size; ++g) {
          const float x = s.at(h * layer.group_size + g, i);
          if (!std::isnan(x)) {
            sum += double(x), ++n;
          }
        }
        if (n > 0) {
          folded.at(h, i) = float(adds_up ? sum : sum / n);
        }
      }
    }
    s = std::move(folded);
  }
}

const Series* CellResult::find(Metric metric, int compensator) const {
  for (const Series& s : series) {
    if (s.metric == metric && s.compensator == compensator) {
      return &s;
    }
  }
  return nullptr;
}

}  // namespace kvreplay
