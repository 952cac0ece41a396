#include "sim/set.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace kvreplay {
namespace {

constexpr double kUsableMass =
    1e-30;                       // of a row's largest weight: from this to its inverse floats hold what is attended
constexpr float kMostLead = 70;  // of a rewritten slot's logit over the row's largest: beyond, its mass is not usable
constexpr double kStaleMass = 1e-4;  // a running sum that shrank this far is summed anew

}  // namespace

int Set::count(Scope scope, int n_heads, int n_kv_heads) {
  return scope == Scope::layer ? 1 : scope == Scope::kv_head ? n_kv_heads : n_heads;
}

Set::Set(Shared& shared, const SetPlan& plan, int index)
    : traits(plan.traits), shared_(&shared), allocate_(plan.allocate) {
  const Layer& l = shared.layer;
  budget = plan.budget;
  prompt_len = l.prompt_len;
  logit_softcap = l.logit_softcap;
  head_dim = l.head_dim;
  v_head_dim = l.v_head_dim;
  group = traits.group;
  n_lanes = traits.scope == Scope::layer ? l.n_kv_heads : 1;
  n_heads = traits.scope == Scope::query_head ? 1 : l.group_size;
  lanes.resize(n_lanes);
  for (int i = 0; i < n_lanes; ++i) {
    const int head = traits.scope == Scope::query_head ? index : (index + i) * l.group_size;
    lanes[i].kv_head = head / l.group_size;
    lanes[i].first_head = head % l.group_size;
    if (traits.pool == Pool::decode) {
      lanes[i].bytes = l.prompt_len * layer().slot_bytes();
    }
  }

  SetShape shape = l.shape();
  shape.set = index;
  shape.kv_head = lanes[0].kv_head;
  shape.n_lanes = n_lanes;
  shape.n_heads = n_heads;
  shape.budget = budget;
  shape.seed = plan.seed;
  shape.exact_scores = plan.allocate != nullptr && plan.allocate->ranks_tokens();
  const auto config = [&](const PartUse& use) { return use.config(l.index, lanes[0].kv_head); };
  const auto select_config = config(*plan.select);
  const Needs needs = plan.select->info->needs(select_config.get());
  for (const auto& [name, per_head] : l.scores) {
    if (name != needs.scores) {
      continue;
    }
    for (const Lane& lane : lanes) {
      shape.scores.push_back(per_head[lane.kv_head]);
    }
  }
  if (plan.evicted_at) {
    shape.evicted_at = plan.evicted_at->at(index);
  }
  select_ = plan.select->info->select(select_config.get(), shape);
  if (plan.read) {
    read_ = plan.read->info->read(config(*plan.read).get(), shape);
  }
  if (plan.rewrite) {
    rewrite_ = plan.rewrite->info->rewrite(config(*plan.rewrite).get(), shape);
  }
  if (auto* oracle = dynamic_cast<OracleSelector*>(select_.get())) {
    oracle->reveal(*this);
  }
}

void Set::pin(int lane, const std::vector<Pos>& kept) {
  pinned_by_list_ = true;
  Lane& l = lanes[lane];
  l.pinned = kept;
  l.bytes = double(kept.size()) * layer().slot_bytes();
  std::size_t next = 0;
  for (Pos p = 0; p < prompt_len; ++p) {
    if (next < kept.size() && kept[next] == p) {
      ++next;
    } else {
      l.evicted.push_back({p, prompt_len});
    }
  }
}

// ---- what parts see ----
const Stored* Set::find(const Lane& lane, int slot) const {
  const auto it = lane.stored.find(positions_[slot]);
  return it == lane.stored.end() ? nullptr : &it->second;
}

// Where all that is resident weighs next to nothing beside what was evicted, weights have underflowed, and where merged
// slots outshine the trace they were capped: logits anew.
void Set::resident_logits(const Lane& l, int lane, int head, std::span<double> out) const {
  const auto q = layer().queries(l.kv_head, now, 1).row(l.first_head + head);
  const auto logit = [&](const auto& k) {
    double x = q.template cast<double>().dot(k.template cast<double>());
    if (layer().logit_softcap > 0) {
      x = layer().logit_softcap * std::tanh(x / layer().logit_softcap);
    }
    return x;
  };
  const int n = int(positions_.size());
  for (int i = 0; i < n; ++i) {
    out[i] = logit(key(lane, i).transpose()) + double(bias(lane, i));
  }
  double top = *std::max_element(out.begin(), out.begin() + n), sum = 0;
  std::vector<double> pinned;
  const MatF& k = layer().k[l.kv_head];
  if (prompt_by_prefix()) {
    for (Pos p = 0; p < prompt_len; ++p) {
      pinned.push_back(logit(k.row(p)));
    }
  }
  for (Pos p : l.pinned) {
    pinned.push_back(logit(k.row(p)));
  }
  for (double x : pinned) {
    top = std::max(top, x);
  }
  for (double x : pinned) {
    sum += std::exp(x - top);
  }
  for (int i = 0; i < n; ++i) {
    sum += out[i] = std::exp(out[i] - top);
  }
  for (int i = 0; i < n; ++i) {
    out[i] /= sum;
  }
}

void Set::head_weights(int lane, int head, std::span<float> out) const {
  const Lane& l = lanes[lane];
  const int row = step_ * group_size() + l.first_head + head;
  if (kUsableMass < l.z[row] && l.z[row] < 1 / kUsableMass) {
    const float inv_z = float(1 / l.z[row]);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = l.slots[i].weights[row] * inv_z;
    }
  } else {
    std::vector<double> attn(out.size());
    resident_logits(l, lane, head, attn);
    std::copy(attn.begin(), attn.end(), out.begin());
  }
}

void Set::head_attention(int lane, int head, std::span<float> out) const { head_weights(lane, head, out); }

void Set::attention(std::span<float> out) const {
  std::fill(out.begin(), out.end(), 0.0F);
  std::vector<float> one(out.size());
  for (int li = 0; li < n_lanes; ++li) {
    const Lane& lane = lanes[li];
    const int row = step_ * group_size() + lane.first_head;
    const auto z = lane.z.segment(row, n_heads);
    if (group == Reduce::max || !(z > kUsableMass && z < 1 / kUsableMass).all()) {
      for (int g = 0; g < n_heads; ++g) {
        head_weights(li, g, one);
        for (std::size_t i = 0; i < out.size(); ++i) {
          out[i] = group == Reduce::max ? std::max(out[i], one[i]) : out[i] + one[i];
        }
      }
      continue;
    }
    constexpr std::size_t kAhead = 12;  // slots lie a kilobyte and more apart: fetch early
    const Eigen::ArrayXf inv_z = z.inverse().cast<float>();
    const std::size_t n = out.size();
    const auto sum = [&](auto heads) {
      for (std::size_t i = 0; i < n; ++i) {
        __builtin_prefetch(lane.slots[std::min(i + kAhead, n - 1)].weights + row);
        const float* w = lane.slots[i].weights + row;
        float x = 0;
        for (int g = 0; g < heads(); ++g) {
          x += w[g] * inv_z[g];
        }
        out[i] += x;
      }
    };
    if (n_heads == 4) {
      sum([] { return 4; });
    } else {
      sum([this] { return n_heads; });
    }
  }
  if (group == Reduce::mean) {
    const float share = 1.0F / float(n_heads * n_lanes);
    for (float& a : out) {
      a *= share;
    }
  }
}

VecF Set::key(int lane, int slot) const {
  const Stored* own = lanes[lane].stored.empty() ? nullptr : find(lanes[lane], slot);
  return {own ? own->k.data() : layer().k[lanes[lane].kv_head].row(positions_[slot]).data(), head_dim};
}

VecF Set::value(int lane, int slot) const {
  const Stored* own = lanes[lane].stored.empty() ? nullptr : find(lanes[lane], slot);
  return {own ? own->v.data() : layer().v[lanes[lane].kv_head].row(positions_[slot]).data(), v_head_dim};
}

float Set::bias(int lane, int slot) const {
  const Stored* own = lanes[lane].stored.empty() ? nullptr : find(lanes[lane], slot);
  return own ? own->bias : 0;
}

double Set::bytes(int lane, int slot) const {
  const Stored* own = lanes[lane].stored.empty() ? nullptr : find(lanes[lane], slot);
  return own ? own->bytes : layer().slot_bytes();
}

MatF Set::queries(int lane, int last) const {
  const Lane& l = lanes[lane];
  last = std::min(last, now + 1 - layer().first_query);
  const auto all = layer().queries(l.kv_head, now + 1 - last, last);
  if (n_heads == group_size()) {
    return all;
  }
  MatF q(last * n_heads, head_dim);
  for (int i = 0; i < last; ++i) {
    q.middleRows(i * n_heads, n_heads) = all.middleRows(i * group_size() + l.first_head, n_heads);
  }
  return q;
}

MatD Set::column_mass(int lane, int last) const {
  const int n = shared_->n_votes(last), kv_head = lanes[lane].kv_head;
  const std::lock_guard lock(shared_->mass_mutex);
  MatD& mass = shared_->mass[{kv_head, n}];
  if (mass.size() == 0) {
    mass = kvreplay::column_mass(layer(), kv_head, prompt_len - n, prompt_len);
  }
  return mass.middleRows(lanes[lane].first_head, n_heads);
}

void Set::attention_to_come(const View&, std::span<float> out) const {
  std::fill(out.begin(), out.end(), 0.0F);
  for (const Lane& lane : lanes) {
    const ExactBlock& e = exact(lane);
    const int from = (step_ + 1) * group_size();  // the rest of this block, then the later ones
    Eigen::VectorXf inv_z = e.z.tail(e.rows - from).inverse().cast<float>();
    for (int r = 0; r < inv_z.size(); ++r) {
      const int g = r % group_size() - lane.first_head;
      if (g < 0 || g >= n_heads) {
        inv_z[r] = 0;
      }
    }
    const MatD& later = shared_->future[lane.kv_head];
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] += VecF(e.weights.row(positions_[i]).data() + from, inv_z.size()).dot(inv_z) +
                float(later.col(positions_[i]).segment(lane.first_head, n_heads).sum());
    }
  }
}

Future::Horizon Set::horizon(const View&, int lane, int steps) const {
  const Lane& l = lanes[lane];
  const Layer& layer_ = layer();
  Horizon h;
  h.steps = std::min(steps, layer_.n_tokens - 1 - now);
  const int n = int(positions_.size()), m = n + h.steps, rows = h.steps * n_heads;
  MatF keys(m, head_dim), q(rows, head_dim);
  for (int i = 0; i < n; ++i) {
    keys.row(i) = key(lane, i).transpose();
  }
  keys.bottomRows(h.steps) = layer_.k[l.kv_head].middleRows(now + 1, h.steps);
  h.arrivals = layer_.v[l.kv_head].middleRows(now + 1, h.steps);
  h.full.resize(rows, v_head_dim);
  const Eigen::Index first = Eigen::Index(now + 1 - prompt_len) * group_size();
  for (int r = 0; r < rows; ++r) {
    const Eigen::Index offset = Eigen::Index(r / n_heads) * group_size() + l.first_head + r % n_heads;
    q.row(r) = layer_.queries(l.kv_head, now + 1, h.steps).row(offset);
    h.full.row(r) = shared_->full[l.kv_head].row(first + offset);
  }
  MatF logits = q * keys.transpose();
  soft_cap(layer_.logit_softcap, logits.array());
  for (int i = 0; i < n; ++i) {
    logits.col(i).array() += bias(lane, i);
  }
  constexpr float kNever = -1e30F;
  for (int r = 0; r < rows; ++r) {
    logits.row(r).tail(h.steps - 1 - r / n_heads).setConstant(kNever);
  }

  std::vector<Pos> pinned = l.pinned;
  if (prompt_by_prefix()) {
    pinned.resize(prompt_len);
    std::iota(pinned.begin(), pinned.end(), 0);
  }
  MatF pinned_logits(rows, pinned.size());
  MatD pinned_v(pinned.size(), v_head_dim);
  for (std::size_t i = 0; i < pinned.size(); ++i) {
    pinned_logits.col(i) = q * layer_.k[l.kv_head].row(pinned[i]).transpose();
    pinned_v.row(i) = layer_.v[l.kv_head].row(pinned[i]).cast<double>();
  }
  soft_cap(layer_.logit_softcap, pinned_logits.array());
  Eigen::ArrayXf top = logits.rowwise().maxCoeff();
  if (!pinned.empty()) {
    top = top.max(pinned_logits.rowwise().maxCoeff().array());
  }
  h.weights = weight_of((logits.colwise() - top.matrix()).array());
  const MatF w = weight_of((pinned_logits.colwise() - top.matrix()).array());
  if (!pinned.empty()) {
    h.pinned_mass = w.cast<double>().rowwise().sum();
    h.pinned_sum = w.cast<double>() * pinned_v;
  }
  return h;
}

// ---- columns ----
int Set::add_column(Lane& lane, Column c) {
  const int from = c.begin * group_size(), n = c.end * group_size() - from;
  if (n > 0) {
    lane.z.segment(from, n) += VecF(c.weights + from, n).array().cast<double>();
  }
  lane.columns.push_back(c);
  return int(lane.columns.size()) - 1;
}

void Set::end_column(Lane& lane, int column) {
  Column& c = lane.columns[column];
  const int from = std::max(c.begin, effect_) * group_size(), n = c.end * group_size() - from;
  c.end = std::min(c.end, effect_);
  if (n > 0) {
    auto z = lane.z.segment(from, n);
    const VecF w(c.weights + from, n);
    // What is left after a dominant weight was taken off is rounding noise.
    const bool stale = (z - w.array().cast<double>() < kStaleMass * z).any();
    z -= w.array().cast<double>();
    if (stale) {
      repair_z(lane, from);
    }
  }
}

void Set::repair_z(Lane& lane, int from) {
  auto z = lane.z.tail(lane.z.size() - from);
  if (prompt_by_prefix()) {
    z = exact(lane).z_prompt.tail(z.size());
  } else {
    z.setZero();
  }
  for (const Column& c : lane.columns) {
    const int lo = std::max(c.begin * group_size(), from), n = c.end * group_size() - lo;
    if (n > 0) {
      lane.z.segment(lo, n) += VecF(c.weights + lo, n).array().cast<double>();
    }
  }
}

Column Set::as_in_trace(const Lane& lane, Pos p) const {
  return {exact(lane).weights.row(p).data(),
          layer().v[lane.kv_head].row(p).data(),
          0,
          n_steps,
          n_steps,
          p,
          layer().k[lane.kv_head].row(p).data(),
          0};
}

void Set::append(Pos p) {
  for (Lane& lane : lanes) {
    const int c = add_column(lane, as_in_trace(lane, p));
    lane.slots.push_back({lane.columns[c].weights, c, c});
  }
}

void Set::rewrite(int lane_index, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v, float new_bias,
                  double new_bytes) {
  Lane& lane = lanes[lane_index];
  const ExactBlock& e = exact(lane);
  const Pos p = positions_[slot];
  rewritten_.push_back(p);
  lane.bytes += new_bytes - bytes(lane_index, slot);
  Stored& own = lane.stored[p];
  if (own.k.size() != 0) {
    lane.retired.push_back(std::move(own));
  }
  own = {k, v, new_bias, new_bias != 0 || k.transpose() != layer().k[lane.kv_head].row(p), false, new_bytes};
  if (effect_ >= n_steps) {
    return;
  }  // the next block starts from `stored`
  const float* weights = e.weights.row(p).data();
  if (own.own_logits) {
    const int from = effect_ * group_size(), n = e.rows - from;
    MatF& w = lane.own_weights.emplace_back(1, e.rows);
    w.setZero();
    Eigen::Map<Eigen::ArrayXf> tail(w.data() + from, n);
    tail = (layer().queries(lane.kv_head, e.begin + effect_, n_steps - effect_) * k).array();
    soft_cap(layer().logit_softcap, tail);
    tail = weight_of((tail + new_bias - e.max_logit.tail(n)).min(kMostLead));
    weights = w.data();
  }
  end_column(lane, lane.slots[slot].column);
  lane.slots[slot].column = add_column(lane, {weights, own.v.data(), effect_, n_steps, 0, p, own.k.data(), own.bias});
  lane.slots[slot].weights = weights;
}

// At the start of a block: slots that are not as in the trace, their logits as one product.
void Set::attach_stored(Lane& lane) {
  const ExactBlock& e = exact(lane);
  std::vector<std::pair<int, const Stored*>> changed;
  Eigen::Index n_logits = 0;
  for (int i = 0; i < int(positions_.size()); ++i) {
    if (const Stored* own = find(lane, i)) {
      changed.emplace_back(i, own);
      n_logits += own->own_logits;
    }
  }
  MatF keys(n_logits, head_dim);
  Eigen::Index j = 0;
  for (const auto& [i, own] : changed) {
    if (own->own_logits) {
      keys.row(j++) = own->k;
    }
  }
  MatF& w = lane.own_weights.emplace_back();
  w.noalias() = keys * layer().queries(lane.kv_head, e.begin, n_steps).transpose();
  soft_cap(layer().logit_softcap, w.array());
  j = 0;
  for (const auto& [i, own] : changed) {
    const float* weights = e.weights.row(positions_[i]).data();
    if (own->own_logits) {
      auto row = w.row(j++).transpose().array();
      row = weight_of((row + own->bias - e.max_logit).min(kMostLead));
      weights = row.data();
    }
    end_column(lane, lane.slots[i].column);
    lane.slots[i].column =
        add_column(lane, {weights, own->v.data(), 0, n_steps, 0, positions_[i], own->k.data(), own->bias});
    lane.slots[i].weights = weights;
  }
}

void Set::begin_block(int steps) {
  n_steps = steps;
  step_ = effect_ = 0;
  for (Lane& lane : lanes) {
    lane.slots.clear();
    lane.columns.clear();
    lane.retired.clear();
    lane.own_weights.clear();
    lane.n_resident.assign(steps, 0);
    lane.step_bytes.assign(steps, 0);
    lane.step_bytes_read.assign(steps, 0);
    if (prompt_by_prefix()) {
      lane.z = exact(lane).z_prompt;
    } else {
      lane.z.setZero(exact(lane).rows);
    }
    for (Pos p : lane.pinned) {
      add_column(lane, as_in_trace(lane, p));
    }
    if (read_) {
      lane.read_num.setZero(steps * n_heads, v_head_dim);
      lane.read_z.setZero(steps * n_heads);
      lane.read.assign(steps * n_heads, {});
      if (rewrite_) {
        lane.read_plain_num = lane.read_num;
        lane.read_plain_z = lane.read_z;
      }
    }
  }
  for (Pos p : positions_) {
    append(p);
  }
  for (Lane& lane : lanes) {
    if (!lane.stored.empty()) {
      attach_stored(lane);
    }
  }
}

// ---- steps ----
void Set::evict_scores(std::vector<float>& scores) {
  scores.clear();
  if (traits.decode == Decode::grow || (now - prompt_len + 1) % traits.interval != 0) {
    return;
  }
  effect_ = step_ + (evicts_before() ? 0 : 1);
  if (select_->surplus(*this) <= 0) {
    return;
  }
  scores.resize(pos.size());
  select_->score(*this, scores);
}

void Set::evict(std::vector<float>& scores) {
  if (scores.empty()) {
    return;
  }
  const int n_over = std::min(select_->surplus(*this), int(positions_.size()));
  if (n_over <= 0) {
    return;
  }
  if (allocate_) {
    allocate_->over_tokens(*this, layer().spans, n_over, scores);
  }
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (std::isnan(scores[i])) {
      throw std::runtime_error("the score of the token at position " + std::to_string(positions_[i]) +
                               " is not a number at position " + std::to_string(now));
    }
  }
  std::vector<int> victims;  // ties drop the older token, that is the lower slot
  if (n_over == 1) {
    victims = {int(std::min_element(scores.begin(), scores.end()) - scores.begin())};
  } else {
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    const auto lower = [&](int a, int b) { return scores[a] != scores[b] ? scores[a] < scores[b] : a < b; };
    if (n_over < int(order.size())) {
      std::nth_element(order.begin(), order.begin() + n_over, order.end(), lower);
    }
    victims.assign(order.begin(), order.begin() + n_over);
    std::sort(victims.begin(), victims.end());
  }
  select_->evicted(*this, victims);
  if (rewrite_) {
    rewrite_->evicted(*this, victims);
  }
  const auto remove = [&](auto& from) {
    std::size_t next = 0, kept = std::size_t(victims[0]);
    for (std::size_t i = kept; i < from.size(); ++i) {
      if (next < victims.size() && int(i) == victims[next]) {
        ++next;
      } else {
        from[kept++] = from[i];
      }
    }
    from.resize(kept);
  };
  for (int li = 0; li < n_lanes; ++li) {
    Lane& lane = lanes[li];
    for (int i : victims) {
      lane.bytes -= bytes(li, i);
      end_column(lane, lane.slots[i].column);
      Column& plain = lane.columns[lane.slots[i].plain_column];
      plain.plain_end = std::min(plain.plain_end, effect_);
      if (auto node = lane.stored.extract(positions_[i])) {
        lane.retired.push_back(std::move(node.mapped()));
      }
      lane.evicted.push_back({positions_[i], exact(lane).begin + effect_});
    }
    remove(lane.slots);
  }
  remove(positions_);
  pos = positions_;
}

void Set::run_reader() {
  std::vector<int> chosen, any;
  for (int li = 0; li < n_lanes; ++li) {
    Lane& lane = lanes[li];
    const ExactBlock& e = exact(lane);
    any.assign(positions_.size(), 0);
    for (int g = 0; g < n_heads; ++g) {
      chosen.clear();
      read_->choose(*this, li, g, chosen);
      const int row = step_ * n_heads + g, exact_row = step_ * group_size() + lane.first_head + g;
      std::sort(chosen.begin(), chosen.end());
      auto num = lane.read_num.row(row);
      for (int i : chosen) {
        any[i] = 1;
        lane.read[row].push_back(positions_[i]);
        const Column& c = lane.columns[lane.slots[i].column];
        const double w = double(c.weights[exact_row]);
        lane.read_z[row] += w;
        num += w * VecF(c.value, v_head_dim).transpose().cast<double>();
        if (rewrite_) {
          const double plain = double(e.weights(positions_[i], exact_row));
          lane.read_plain_z[row] += plain;
          lane.read_plain_num.row(row) += plain * layer().v[lane.kv_head].row(positions_[i]).cast<double>();
        }
      }
    }
    double& read = lane.step_bytes_read[step_];
    read = read_->scoring_bytes(int(positions_.size()));
    for (std::size_t i = 0; i < any.size(); ++i) {
      if (any[i]) {
        read += bytes(li, int(i));
      }
    }
    lane.step_bytes[step_] += read_->metadata_bytes(int(positions_.size()));
  }
}

// The last prompt token is a step like any other, except that many tokens leave and an allocator may have its say.
void Set::prefill_scores(std::vector<float>& scores) {
  now = prompt_len - 1;
  scores.clear();
  if (traits.pool == Pool::all) {
    positions_.resize(prompt_len);
    std::iota(positions_.begin(), positions_.end(), 0);
    for (Lane& lane : lanes) {
      lane.bytes = prompt_len * layer().slot_bytes();
    }
  }
  begin_block(1);
  effect_ = 1;
  pos = positions_;
  if (traits.pool == Pool::decode) {
    return;
  }
  select_->prefill(*this);
  if (select_->surplus(*this) > 0) {
    scores.resize(pos.size());
    select_->score(*this, scores);
  }
}

void Set::prefill_evict(std::vector<float>& scores) {
  evict(scores);
  if (read_) {
    read_->prefill(*this);
  }
  if (rewrite_) {
    rewrite_->step(*this);
  }
}

void Set::arrive(int step) {
  step_ = step;
  std::swap(rewritten_, rewritten_before_);
  rewritten_.clear();
  rewritten = rewritten_before_;
  now = exact(lanes[0]).begin + step;
  positions_.push_back(now);
  append(now);
  for (Lane& lane : lanes) {
    lane.bytes += layer().slot_bytes();
  }
  pos = positions_;
  select_->observe(*this);
}

void Set::attend() {
  for (Lane& lane : lanes) {
    lane.n_resident[step_] = int(positions_.size() + lane.pinned.size()) + (prompt_by_prefix() ? prompt_len : 0);
    lane.step_bytes[step_] = lane.step_bytes_read[step_] = lane.bytes;
  }
  if (read_) {
    run_reader();
  }
}

void Set::finish() {
  effect_ = step_ + 1;
  if (rewrite_) {
    rewrite_->step(*this);
  }
}

}  // namespace kvreplay
