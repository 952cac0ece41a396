// Oracle top-k: read the tokens that this very step attends most.
#include <numeric>

#include "policies/column_mass.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Per { kv_head, query_head };
constexpr std::string_view kPers[] = {"kv_head", "query_head"};

class TopK final : public Reader {
 public:
  struct Config {
    Per per = Per::kv_head;
    Tokens budget{100, true};
  };
  static constexpr std::string_view kName = "topk";
  static constexpr std::string_view kSummary =
      "the tokens of highest attention at this step, known before they are read";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr Foresight kForesight = Foresight::oracle;
  static constexpr std::array kParams{
      choice<&Config::per>("per", kPers,
                           "kv_head: its query heads share one choice, by their attention as group reduces it; "
                           "query_head: each has its own, which no choice can beat in evicted_mass"),
      number<&Config::budget>("budget", 1, kUnbounded, "tokens read", Scale::log),
  };
  static Needs needs(const Config&) { return {}; }

  TopK(const Config& config, const SetShape& shape)
      : per_(config.per),
        n_read_(std::max(1, config.budget.of(shape.budget))),
        key_bytes_(1.0 * shape.head_dim * shape.element_bytes) {}

  void choose(const View& view, int lane, int head, std::vector<int>& slots) override {
    const int n = static_cast<int>(view.pos.size());
    slots.resize(static_cast<std::size_t>(n));
    std::iota(slots.begin(), slots.end(), 0);
    if (n <= n_read_) {
      return;
    }
    const bool shared = per_ == Per::kv_head || view.n_heads == 1;
    if (!shared || lane != lane_ || view.now != now_) {
      attend(view, lane, shared ? -1 : head);
    }
    const auto a = [&](int i) { return attn_[static_cast<std::size_t>(i)]; };
    std::nth_element(slots.begin(), slots.begin() + n_read_, slots.end(),
                     [&](int i, int j) { return a(i) != a(j) ? a(i) > a(j) : i > j; });
    slots.resize(static_cast<std::size_t>(n_read_));
  }

  double scoring_bytes(int n_slots) const override { return key_bytes_ * n_slots; }  // every key

 private:
  // head < 0: all of the lane's heads, reduced.
  void attend(const View& view, int lane, int head) {
    const Eigen::Index n = static_cast<Eigen::Index>(view.pos.size());
    attn_.resize(view.pos.size());
    lane_ = lane;
    now_ = view.now;
    if (head < 0 && view.n_lanes == 1) {
      view.attention(attn_);
      return;
    }
    if (head >= 0) {
      view.head_attention(lane, head, attn_);
      return;
    }
    MatF attn(view.n_heads, n);  // a lane of a layer-wide set
    for (int h = 0; h < view.n_heads; ++h) {
      view.head_attention(lane, h, {attn.row(h).data(), attn_.size()});
    }
    Eigen::RowVectorXf::Map(attn_.data(), n) = reduce_heads(view.group, attn.cast<double>()).cast<float>();
  }

  Per per_;
  int n_read_;
  double key_bytes_;
  int lane_ = -1;
  Pos now_ = -1;
  std::vector<float> attn_;  // (n_slots) of lane_ at now_
};

}  // namespace

extern const PartInfo topk;
constinit const PartInfo topk = describe<TopK>();

}  // namespace kvreplay
