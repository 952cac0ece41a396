#include "tests/support/reference_span_fair.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvreplay::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Wrapped : public ReferenceSelector {
 public:
  explicit Wrapped(std::unique_ptr<ReferenceSelector> inner) : inner_(std::move(inner)) {}
  void prefill(const SetState& s) override { inner_->prefill(s); }
  void observe(const SetState& s) override { inner_->observe(s); }
  void evicted(const SetState& s, const std::vector<Pos>& gone) override { inner_->evicted(s, gone); }

 protected:
  std::unique_ptr<ReferenceSelector> inner_;
};

class Whitelist : public Wrapped {
 public:
  Whitelist(std::unique_ptr<ReferenceSelector> inner, Pos begin, Pos end)
      : Wrapped(std::move(inner)), begin_(begin), end_(end) {}
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out = inner_->score(s);
    for (std::size_t i = 0; i < out.size(); ++i) {
      const bool listed = s.slots[i] >= begin_ && s.slots[i] < std::min(end_, s.layer->options.prompt_len);
      out[i] = listed ? kInfinity : std::min(out[i], 1e300);
    }
    return out;
  }

 private:
  Pos begin_, end_;
};

class Fair : public Wrapped {
 public:
  Fair(std::unique_ptr<ReferenceSelector> inner, std::vector<Pos> borders)
      : Wrapped(std::move(inner)), borders_(std::move(borders)) {}
  std::vector<double> score(const SetState& s) override {
    std::vector<double> out = inner_->score(s);
    const int n_kept = std::min(s.budget, static_cast<int>(s.slots.size()));
    std::vector<Pos> begin{0}, end;
    for (const Pos b : borders_) {
      if (b > 0 && b < s.layer->options.prompt_len) {
        begin.push_back(b);
      }
    }
    if (!s.at_prefill()) {
      begin.push_back(s.layer->options.prompt_len);
    }
    end.assign(begin.begin() + 1, begin.end());
    end.push_back(s.now + 1);
    std::vector<std::vector<std::size_t>> members(begin.size());  // of each span, the best first
    for (std::size_t i = 0; i < out.size(); ++i) {
      for (std::size_t r = 0; r < begin.size(); ++r) {
        if (s.slots[i] >= begin[r] && s.slots[i] < end[r]) {
          members[r].push_back(i);
        }
      }
    }
    for (auto& m : members) {
      std::sort(m.begin(), m.end(), [&](auto a, auto b) { return out[a] != out[b] ? out[a] > out[b] : a > b; });
    }
    // Quotas: full spans first, the others share what is left by length.
    std::vector<double> quota(begin.size(), -1);
    for (bool again = true; again;) {
      again = false;
      double length = 0, left = n_kept;
      for (std::size_t r = 0; r < begin.size(); ++r) {
        (quota[r] < 0 ? length : left) += quota[r] < 0 ? end[r] - begin[r] : -quota[r];
      }
      std::vector<std::size_t> full;
      for (std::size_t r = 0; r < begin.size(); ++r) {
        const auto have = static_cast<double>(members[r].size());
        if (quota[r] < 0 && left * (end[r] - begin[r]) / length >= have) {
          full.push_back(r);
        }
      }
      for (const std::size_t r : full) {
        quota[r] = static_cast<double>(members[r].size());
        again = true;
      }
      if (!again) {
        std::vector<std::pair<double, std::size_t>> remainders;
        double given = 0;
        for (std::size_t r = 0; r < begin.size(); ++r) {
          if (quota[r] < 0) {
            const double exact = left * (end[r] - begin[r]) / length;
            quota[r] = std::floor(exact + 1e-9);
            given += quota[r];
            remainders.emplace_back(std::round((quota[r] - exact) * 1e9),
                                    r);  // largest remainder first, then the earlier
          }
        }
        std::sort(remainders.begin(), remainders.end());
        for (int i = 0; i < std::lround(left - given); ++i) {
          quota[remainders[static_cast<std::size_t>(i)].second] += 1;
        }
      }
    }
    for (std::size_t r = 0; r < begin.size(); ++r) {
      for (std::size_t i = static_cast<std::size_t>(quota[r]); i < members[r].size(); ++i) {
        out[members[r][i]] = -kInfinity;
      }
    }
    return out;
  }

 private:
  std::vector<Pos> borders_;
};

}  // namespace

MakeSelector reference_whitelist(MakeSelector select, Pos begin, Pos end) {
  return [=](const ToyLayer& layer) { return std::make_unique<Whitelist>(select(layer), begin, end); };
}

MakeSelector reference_fair(MakeSelector select, std::vector<Pos> borders) {
  return [=](const ToyLayer& layer) { return std::make_unique<Fair>(select(layer), borders); };
}

}  // namespace kvreplay::testing
