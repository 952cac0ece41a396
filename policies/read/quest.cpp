// Quest: each query head reads the pages of tokens whose bound on q . k is highest; nothing leaves.
#include <numeric>

#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Quest final : public Reader {
 public:
  struct Config {
    int page = 16;
    Tokens budget{100, true};
    int min_pages = 3;
    int dense_layers = 0;
  };
  static constexpr std::string_view kName = "quest";
  static constexpr std::string_view kSummary =
      "pages whose largest possible logit, by the bounds of their keys per channel, is highest";
  static constexpr std::string_view kPaper = "arXiv:2406.10774";
  static constexpr std::string_view kDeviation =
      "every layer chooses (the authors read layers 0 and 1 in full: dense_layers=2); the newest "
      "page is always read; "
      "pages are position ranges, and a bound stays when tokens of its page are evicted";
  static constexpr std::array kParams{
      number<&Config::page>("page", 1, 4096, "tokens of a page", Scale::log),
      number<&Config::budget>("budget", 1, kUnbounded, "tokens read per query head", Scale::log),
      number<&Config::min_pages>("min_pages", 1, 4096, "pages read at least, whatever the budget"),
      number<&Config::dense_layers>("dense_layers", 0, 4096, "first layers of the model, read in full"),
  };

  Quest(const Config& config, const SetShape& shape)
      : page_(config.page),
        n_read_(std::max(config.min_pages, config.budget.of(shape.budget) / config.page)),
        dense_(shape.layer < config.dense_layers),
        page_bytes_(2.0 * shape.head_dim * shape.element_bytes),
        lanes_(static_cast<std::size_t>(shape.n_lanes)) {}

  void choose(const View& view, int lane, int head, std::vector<int>& slots) override {
    const int n = static_cast<int>(view.pos.size());
    if (dense_) {
      slots.resize(static_cast<std::size_t>(n));
      std::iota(slots.begin(), slots.end(), 0);
      return;
    }
    Pages& pages = lanes_[static_cast<std::size_t>(lane)];
    pages.meet(view, lane, page_);
    const Eigen::VectorXf q = view.queries(lane, 1).row(head);
    const Eigen::Index rows = view.pos.back() / page_ + 1;
    const Eigen::VectorXf bound = pages.high.topRows(rows) * q.cwiseMax(0) + pages.low.topRows(rows) * q.cwiseMin(0);
    order_.resize(pages.resident.size() - 1);  // all but the newest page
    std::iota(order_.begin(), order_.end(), 0);
    const auto n_old = std::min(order_.size(), static_cast<std::size_t>(n_read_ - 1));
    const auto bound_of = [&](int r) { return bound[pages.resident[static_cast<std::size_t>(r)].page]; };
    std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(n_old), order_.end(),
                     [&](int a, int b) { return bound_of(a) != bound_of(b) ? bound_of(a) > bound_of(b) : a > b; });
    order_.resize(n_old);
    order_.push_back(static_cast<int>(pages.resident.size()) - 1);
    for (int r : order_) {
      const Resident& p = pages.resident[static_cast<std::size_t>(r)];
      for (int i = p.begin; i < p.end; ++i) {
        slots.push_back(i);
      }
    }
  }

  double metadata_bytes(int n_slots) const override {
    const int n_pages = (n_slots + page_ - 1) / page_;
    return dense_ ? 0 : page_bytes_ * n_pages;
  }
  double scoring_bytes(int n_slots) const override { return metadata_bytes(n_slots); }

 private:
  struct Resident {
    int page, begin, end;  // its slots
  };
  struct Pages {
    Pos now = -1, newest = -1;
    MatF low, high;                  // (pages, head_dim)
    std::vector<Resident> resident;  // pages with slots, in order

    void meet(const View& view, int lane, int page) {
      const int n = static_cast<int>(view.pos.size());
      const auto page_of = [&](int slot) { return view.pos[static_cast<std::size_t>(slot)] / page; };
      if (view.now == now) {
        return;
      }  // another head of the same step
      now = view.now;
      const Eigen::Index rows = page_of(n - 1) + 1, old = low.rows();
      if (rows > old) {
        constexpr float kInf = std::numeric_limits<float>::infinity();
        const Eigen::Index room = std::max(rows, 2 * old);
        low.conservativeResize(room, view.head_dim);
        high.conservativeResize(room, view.head_dim);
        low.bottomRows(room - old).setConstant(kInf);
        high.bottomRows(room - old).setConstant(-kInf);
      }
      for (int i = n; i-- > 0 && view.pos[static_cast<std::size_t>(i)] > newest;) {
        const auto k = view.key(lane, i).transpose();
        low.row(page_of(i)) = low.row(page_of(i)).cwiseMin(k);
        high.row(page_of(i)) = high.row(page_of(i)).cwiseMax(k);
      }
      newest = view.pos.back();
      for (Pos p : view.rewritten) {  // an encoded key may lie outside
        const auto it = std::lower_bound(view.pos.begin(), view.pos.end(), p);
        if (it == view.pos.end() || *it != p) {
          continue;
        }
        const auto k = view.key(lane, static_cast<int>(it - view.pos.begin())).transpose();
        low.row(p / page) = low.row(p / page).cwiseMin(k);
        high.row(p / page) = high.row(p / page).cwiseMax(k);
      }
      resident.clear();
      for (int i = 0; i < n; ++i) {
        if (i == 0 || page_of(i) != resident.back().page) {
          resident.push_back({page_of(i), i, i});
        }
        resident.back().end = i + 1;
      }
    }
  };

  int page_, n_read_;
  bool dense_;
  double page_bytes_;
  std::vector<Pages> lanes_;
  std::vector<int> order_;  // indices into Pages::resident
};

}  // namespace

extern const PartInfo quest;
constinit const PartInfo quest = describe<Quest>();

}  // namespace kvreplay
