// RaaS: pages of decode tokens carry the time when they were last attended well; the page with the oldest leaves.
#include <algorithm>

#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class By { fraction, threshold };
constexpr std::string_view kBys[] = {"fraction", "threshold"};

class Raas final : public Selector {
 public:
  struct Config {
    int page = 16;
    By by = By::fraction;
    double fraction = 0.5;
    double threshold = 1e-4;
  };
  static constexpr std::string_view kName = "raas";
  static constexpr std::string_view kSummary = "pages that were attended well most lately, beside a pinned prompt";
  static constexpr std::string_view kPaper = "arXiv:2502.11147";
  static constexpr std::string_view kDeviation =
      "from second-hand descriptions, no code is known: a page is judged by the attention of its tokens, not by a "
      "representative key; pages are counted from the prompt's end; one set per layer; the budget counts decode tokens "
      "alone (the paper counts the prompt too); of equally old pages the one with older tokens leaves";
  static constexpr std::array kParams{
      number<&Config::page>("page", 1, 4096, "tokens of a page, which leave together; at most the budget", Scale::log),
      choice<&Config::by>("by", kBys, "which pages get the time of this step: the best, or all from a threshold"),
      number<&Config::fraction>("fraction", 0, 1, "by=fraction: that share of the pages, rounded up"),
      number<&Config::threshold>("threshold", 0, 1, "by=threshold: attention of a page", Scale::log),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer, .pool = Pool::decode}; }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }

  Raas(const Config& config, const SetShape& shape)
      : config_(config), page_(std::min(config.page, shape.budget)), shift_(page_ - shape.prompt_len % page_) {
    stamp_.assign(page_of(shape.n_tokens) + 1, -1);
  }

  void prefill(const View& view) override {
    if (!view.pos.empty()) {
      observe(view);
    }  // the prompt is not pinned
  }

  void observe(const View& view) override {
    attn_.resize(view.pos.size());
    view.attention(attn_);
    pages_.clear();
    for (std::size_t i = 0; i < attn_.size(); ++i) {
      const std::size_t id = page_of(view.pos[i]);
      if (pages_.empty() || pages_.back().id != id) {
        pages_.push_back({id, 0});
      }
      pages_.back().attention += static_cast<double>(attn_[i]);
    }
    auto end = pages_.end();
    if (config_.by == By::fraction) {
      const auto n =
          static_cast<std::ptrdiff_t>(std::ceil(config_.fraction * static_cast<double>(pages_.size()) - 1e-9));
      end = pages_.begin() + n;
      std::nth_element(pages_.begin(), end, pages_.end(), [](const Page& a, const Page& b) {
        return a.attention != b.attention ? a.attention > b.attention : a.id > b.id;
      });
    } else {
      end = std::partition(pages_.begin(), end, [&](const Page& p) { return p.attention >= config_.threshold; });
    }
    const int step = view.now - view.prompt_len + 1;
    for (auto p = pages_.begin(); p != end; ++p) {
      stamp_[p->id] = step;
    }
    stamp_[page_of(view.now)] = step;
  }

  // Whole pages, except that the newest gives no more than it must.
  int surplus(const View& view) const override {
    const int n = static_cast<int>(view.pos.size());
    if (n <= view.budget) {
      return 0;
    }
    struct Size {
      int stamp;
      std::size_t id;
      int tokens;
    };
    std::vector<Size> sizes;
    for (Pos pos : view.pos) {
      const std::size_t id = page_of(pos);
      if (sizes.empty() || sizes.back().id != id) {
        sizes.push_back({stamp_[id], id, 0});
      }
      ++sizes.back().tokens;
    }
    sizes.pop_back();
    std::sort(sizes.begin(), sizes.end(),
              [](const Size& a, const Size& b) { return a.stamp != b.stamp ? a.stamp < b.stamp : a.id < b.id; });
    int gone = 0;
    for (const Size& s : sizes) {
      gone += n - gone > view.budget ? s.tokens : 0;
    }
    return std::max(gone, n - view.budget);
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(stamp_[page_of(view.pos[i])]);
    }
    // The newest page goes last, whatever the others' time.
    for (std::size_t i = out.size(); i-- > 0 && page_of(view.pos[i]) == page_of(view.now);) {
      out[i] += 1;
    }
  }

 private:
  struct Page {
    std::size_t id;
    double attention;
  };
  std::size_t page_of(Pos pos) const { return static_cast<std::size_t>((pos + shift_) / page_); }

  Config config_;
  int page_, shift_;         // shift: a page begins at the prompt's end
  std::vector<int> stamp_;   // per page: step that last attended it well
  std::vector<float> attn_;  // (n_slots)
  std::vector<Page> pages_;  // resident ones
};

}  // namespace

extern const PartInfo raas;
constinit const PartInfo raas = describe<Raas>();

}  // namespace kvreplay
