// A set of slots in memory: everything a part can ask for, computed the slow and obvious way.
#pragma once
#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "policies/policy.hpp"
#include "policies/rotation.hpp"

namespace kvreplay::test {

inline MatF random_matrix(Eigen::Index rows, Eigen::Index cols, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  MatF m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    m.data()[i] = normal(rng);
  }
  return m;
}

class FakeView final : public Cache {
 public:
  struct Lane {
    MatF k, v;  // (n_tokens, head_dim), (n_tokens, v_head_dim)
    MatF q;     // (n_tokens * n_heads, head_dim) softmax scale folded in
  };
  std::vector<Lane> lanes;
  Rotation rotation;  // what shape() points to: nothing turns, and token i has the position id i
  // Where it is not empty, what attention() gives at this step, by position.
  std::map<Pos, float> script;

  FakeView(int n_tokens, int the_prompt_len, int dim, int the_n_heads = 1, int the_n_lanes = 1, unsigned seed = 1) {
    prompt_len = the_prompt_len;
    head_dim = v_head_dim = dim;
    n_heads = the_n_heads;
    n_lanes = the_n_lanes;
    for (int l = 0; l < n_lanes; ++l) {
      const unsigned s = seed + 10 * static_cast<unsigned>(l);
      lanes.push_back({random_matrix(n_tokens, dim, s), random_matrix(n_tokens, dim, s + 1),
                       random_matrix(n_tokens * n_heads, dim, s + 2)});
    }
    now = prompt_len - 1;
    rotation.ids.resize(static_cast<std::size_t>(n_tokens));
    std::iota(rotation.ids.begin(), rotation.ids.end(), 0);
  }

  SetShape shape() const {
    SetShape s;
    s.n_lanes = n_lanes;
    s.n_heads = n_heads;
    s.head_dim = head_dim;
    s.v_head_dim = v_head_dim;
    s.n_tokens = static_cast<Pos>(lanes[0].k.rows());
    s.prompt_len = prompt_len;
    s.budget = budget;
    s.rotation = &rotation;
    return s;
  }

  void set_slots(std::vector<Pos> slots) {
    slots_ = std::move(slots);
    pos = slots_;
  }
  void whole_prompt() {
    std::vector<Pos> all(static_cast<std::size_t>(prompt_len));
    std::iota(all.begin(), all.end(), 0);
    now = prompt_len - 1;
    set_slots(all);
  }
  void append() {
    slots_.push_back(++now);
    pos = slots_;
  }

  // What the engine does when eviction is due; returns the positions that left.
  std::vector<Pos> evict(Selector& selector) {
    const int n = std::min(selector.surplus(*this), static_cast<int>(slots_.size()));
    if (n <= 0) {
      return {};
    }
    std::vector<float> scores(slots_.size());
    selector.score(*this, scores);
    std::vector<int> order(slots_.size());
    std::iota(order.begin(), order.end(), 0);
    const auto s = [&](int i) { return scores[static_cast<std::size_t>(i)]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return s(a) < s(b); });
    std::vector<int> victims(order.begin(), order.begin() + n);
    std::sort(victims.begin(), victims.end());
    selector.evicted(*this, victims);
    std::vector<Pos> left, kept;
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
      const bool gone = std::binary_search(victims.begin(), victims.end(), i);
      (gone ? left : kept).push_back(slots_[static_cast<std::size_t>(i)]);
    }
    set_slots(kept);
    return left;
  }

  void attention(std::span<float> out) const override {
    if (!script.empty()) {
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = script.at(pos[i]);
      }
      return;
    }
    std::vector<float> one(out.size());
    std::fill(out.begin(), out.end(), 0.0F);
    for (int l = 0; l < n_lanes; ++l) {
      for (int h = 0; h < n_heads; ++h) {
        head_attention(l, h, one);
        for (std::size_t i = 0; i < out.size(); ++i) {
          out[i] = group == Reduce::max ? std::max(out[i], one[i]) : out[i] + one[i];
        }
      }
    }
    if (group == Reduce::mean) {
      for (float& a : out) {
        a /= static_cast<float>(n_lanes * n_heads);
      }
    }
  }
  void head_attention(int lane, int head, std::span<float> out) const override {
    Eigen::VectorXd a(static_cast<Eigen::Index>(out.size()));
    for (int i = 0; i < static_cast<int>(out.size()); ++i) {  // of the slots as stored now
      a[i] = lanes[at(lane)].q.row(now * n_heads + head).cast<double>().dot(key(lane, i).cast<double>()) +
             static_cast<double>(bias(lane, i));
    }
    a = (a.array() - a.maxCoeff()).exp();
    a /= a.sum();
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(a[static_cast<Eigen::Index>(i)]);
    }
  }
  VecF key(int lane, int slot) const override {
    const Stored* own = find(lane, slot);
    return {own != nullptr ? own->k.data() : lanes[at(lane)].k.row(pos[at(slot)]).data(), head_dim};
  }
  VecF value(int lane, int slot) const override {
    const Stored* own = find(lane, slot);
    return {own != nullptr ? own->v.data() : lanes[at(lane)].v.row(pos[at(slot)]).data(), v_head_dim};
  }
  MatF queries(int lane, int last) const override {
    last = std::min(last, now + 1);
    return lanes[at(lane)].q.middleRows((now + 1 - last) * n_heads, last * n_heads);
  }
  MatD column_mass(int lane, int last) const override {
    last = last == Needs::kAll ? prompt_len : std::min(last, prompt_len);
    MatD mass = MatD::Zero(n_heads, prompt_len);
    for (Pos t = prompt_len - last; t < prompt_len; ++t) {
      std::vector<Pos> past(static_cast<std::size_t>(t) + 1);
      std::iota(past.begin(), past.end(), 0);
      for (int h = 0; h < n_heads; ++h) {
        mass.row(h).head(t + 1) += softmax(lane, t, h, past).transpose();
      }
    }
    return mass;
  }

  float bias(int lane, int slot) const override {
    const Stored* own = find(lane, slot);
    return own != nullptr ? own->bias : 0;
  }
  double bytes(int lane, int slot) const override {
    const Stored* own = find(lane, slot);
    return own != nullptr ? own->bytes : 2.0 * (head_dim + v_head_dim);
  }
  void rewrite(int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v, float new_bias,
               double new_bytes) override {
    stored_[{lane, pos[at(slot)]}] = {k, v, new_bias, new_bytes};
  }

 private:
  struct Stored {
    Eigen::VectorXf k, v;
    float bias;
    double bytes;
  };
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  const Stored* find(int lane, int slot) const {
    const auto it = stored_.find({lane, pos[at(slot)]});
    return it == stored_.end() ? nullptr : &it->second;
  }
  Eigen::VectorXd softmax(int lane, Pos t, int head, std::span<const Pos> over) const {
    const Lane& l = lanes[at(lane)];
    Eigen::VectorXd a(static_cast<Eigen::Index>(over.size()));
    for (std::size_t i = 0; i < over.size(); ++i) {
      a[static_cast<Eigen::Index>(i)] = l.q.row(t * n_heads + head).cast<double>().dot(l.k.row(over[i]).cast<double>());
    }
    a = (a.array() - a.maxCoeff()).exp();
    return a / a.sum();
  }

  std::vector<Pos> slots_;
  std::map<std::pair<int, Pos>, Stored> stored_;
};

}  // namespace kvreplay::test
