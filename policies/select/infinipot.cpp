// InfiniPot-V: a stream that meets its memory cap is compressed to the keys that differ most from the recent ones
// (TaR) and, for the rest of the target, to the values of largest norm (VaN). No query is asked.
#include <cmath>
#include <numeric>

#include "policies/last_queries.hpp"
#include "policies/part.hpp"
#include "policies/rotation.hpp"

namespace kvreplay {
namespace {

enum class Mapping { same_offset, best_match, nearest, centroid };
constexpr std::string_view kMappings[] = {"same_offset", "best_match", "nearest", "centroid"};
enum class Keys { rotated, raw };
constexpr std::string_view kKeys[] = {"rotated", "raw"};
enum class Width { none, kernel, layer, variation };
constexpr std::string_view kWidths[] = {"none", "kernel", "layer", "variation"};
enum class Prompt { stream, once };
constexpr std::string_view kPrompts[] = {"stream", "once"};

class InfiniPot final : public Selector {
 public:
  struct Config {
    Tokens sink{4, false}, delta{25, true};
    int block = 16;
    Mapping mapping = Mapping::same_offset;
    Keys keys = Keys::rotated;
    double tar_ratio = 0.5, query_ratio = 0.25;
    Width pooling = Width::none;
    int kernel = 7;
    double tau1 = 0, tau2 = 0, tau3 = 0;
    Prompt prompt = Prompt::stream;
  };
  static constexpr std::string_view kName = "infinipot";
  static constexpr std::string_view kSummary =
      "keys unlike the recent ones, then values of large norm, at a memory cap";
  static constexpr std::string_view kPaper = "arXiv:2506.15745";
  static constexpr std::string_view kDeviation =
      "the authors' code for video, carried over to text: a block of tokens is a frame and its offset a patch "
      "(mapping=same_offset; the other mappings, blocks of 16, and sinks for the system prompt are ours); budget is "
      "the "
      "cap M and budget - delta the target C, 24 of 32 frames as in their script; where recent blocks exceed TaR's "
      "share, which their code forbids, the latest of them fill it";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, never evicted", Scale::log),
      number<&Config::delta>("delta", 0, kUnbounded, "tokens that a compression frees below the budget", Scale::log),
      number<&Config::block>("block", 1, 1 << 20, "tokens that stand for a frame", Scale::log),
      choice<&Config::mapping>("mapping", kMappings,
                               "to what of the recent blocks a key is compared: same_offset, the token at its own "
                               "offset, as the code (on text a negative control); best_match, the most alike of each "
                               "block; nearest, the most alike of all; centroid, their mean direction"),
      choice<&Config::keys>("keys", kKeys, "rotated: as they enter attention, the code; raw: before RoPE"),
      number<&Config::tar_ratio>("tar_ratio", 0, 1, "share of the target that TaR keeps; the rest is VaN's"),
      number<&Config::query_ratio>("query_ratio", 0, 1, "share of the blocks that is recent, at least one if above 0"),
      choice<&Config::pooling>("pooling", kWidths,
                               "of value norms, zeros beyond the ends: kernel, as wide as it says; layer, 7, 5, 3, 1 "
                               "by quarter of the model as the code, where it is off; variation, 7, 5, 3, 1 for a "
                               "coefficient of variation below tau1, tau2, tau3, as the paper"),
      number<&Config::kernel>("kernel", 1, 1023, "tokens averaged by pooling=kernel, an odd number"),
      number<&Config::tau1>("tau1", 0, kUnbounded, "of pooling=variation; the paper's values are not known: 0, none"),
      number<&Config::tau2>("tau2", 0, kUnbounded, "of pooling=variation; the paper's values are not known: 0, none"),
      number<&Config::tau3>("tau3", 0, kUnbounded, "of pooling=variation; the paper's values are not known: 0, none"),
      choice<&Config::prompt>("prompt", kPrompts,
                              "stream: the prompt arrives token by token and meets the cap again and again; once: it "
                              "is compressed at its end"),
  };
  static Needs needs(const Config& c) { return {.pre_rope = c.keys == Keys::raw}; }
  static void check(const Config& c, int) { check_kernel(kName, c.kernel); }

  InfiniPot(const Config& config, const SetShape& shape)
      : config_(config),
        sink_(config.sink.of(shape.budget)),
        rotation_(config.keys == Keys::raw ? shape.rotation : nullptr),
        quarter_(std::min(3, shape.layer / std::max(1, shape.n_model_layers / 4))) {}

  int surplus(const View& view) const override {
    const int n = static_cast<int>(view.pos.size());
    if (n <= view.budget) {
      return 0;
    }
    if (!view.at_prefill() || config_.prompt == Prompt::once) {
      return n - target(view);
    }
    return n - target(view) - (n - view.budget - 1) % (view.budget + 1 - target(view));
  }

  void score(const View& view, std::span<float> out) override {
    read(view);
    const int n = static_cast<int>(out.size());
    int n_sinks = 0;
    while (n_sinks < std::min(n, target(view)) && view.pos[at(n_sinks)] < sink_) {
      out[at(n_sinks++)] = std::numeric_limits<float>::infinity();
    }
    const int n_keep = target(view) - n_sinks;
    std::vector<int> slots;
    if (!view.at_prefill() || config_.prompt == Prompt::once) {
      slots.resize(at(n - n_sinks));
      std::iota(slots.begin(), slots.end(), n_sinks);
      const std::vector<double> scores = judge(slots, n_keep);
      std::transform(scores.begin(), scores.end(), out.begin() + n_sinks,
                     [](double x) { return static_cast<float>(x); });
      return;
    }
    // Those that the stream lost earlier leave first; what it holds at the prompt's end stays.
    int n_events = 0;
    for (int i = n_sinks; i < n; ++i) {
      slots.push_back(i);
      if (static_cast<int>(slots.size()) + n_sinks > view.budget) {
        const std::vector<double> scores = judge(slots, n_keep);
        const std::vector<bool> stays = highest(scores, n_keep);
        std::vector<int> left;
        for (std::size_t j = 0; j < slots.size(); ++j) {
          if (stays[j]) {
            left.push_back(slots[j]);
          } else {
            out[at(slots[j])] = static_cast<float>(n_events);
          }
        }
        slots = left;
        ++n_events;
      }
    }
    for (const int slot : slots) {
      out[at(slot)] = static_cast<float>(n_events);
    }
  }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  int target(const View& view) const { return std::max(1, view.budget - config_.delta.of(view.budget)); }

  // Unit keys and value norms of all slots.
  void read(const View& view) {
    const auto n = static_cast<Eigen::Index>(view.pos.size());
    units_.assign(at(view.n_lanes), MatD(n, view.head_dim));
    norms_.setZero(n);
    Eigen::VectorXf key;
    for (int lane = 0; lane < view.n_lanes; ++lane) {
      for (Eigen::Index i = 0; i < n; ++i) {
        const int slot = static_cast<int>(i);
        key = view.key(lane, slot);
        if (rotation_ != nullptr) {
          rotation_->undo(view.pos[at(slot)], std::span(key.data(), at(view.head_dim)));
        }
        const Eigen::VectorXd k = key.cast<double>();
        units_[at(lane)].row(i) = k / (k.norm() + 1e-9);
        norms_[i] += view.value(lane, slot).cast<double>().norm() / view.n_lanes;
      }
    }
  }

  // Pooled norms; what TaR keeps stands above all of them.
  std::vector<double> judge(const std::vector<int>& slots, int n_keep) const {
    const int n = static_cast<int>(slots.size()), n_blocks = n / config_.block;
    if (n <= n_keep) {
      return std::vector<double>(slots.size(), 0.0);  // nothing has to go
    }
    const int n_van = static_cast<int>(std::nearbyint((1 - config_.tar_ratio) * n_keep));  // half to even
    const int n_tar = n_keep - n_van;
    int recent_blocks = static_cast<int>(std::floor(config_.query_ratio * n_blocks + 1e-9));
    if (config_.query_ratio > 0) {
      recent_blocks = std::max(recent_blocks, std::min(1, n_blocks));
    }
    const int first_recent = (n_blocks - recent_blocks) * config_.block;  // blocks and the rest beyond the last
    const int n_recent = std::min(n - first_recent, n_tar), n_past = std::min(n_tar - n_recent, first_recent);

    const Eigen::RowVectorXd norms = norms_(slots);
    const Eigen::RowVectorXd pooled = pool_neighbours(norms, Pooling::avg, pool_width(norms));
    std::vector<double> out(pooled.begin(), pooled.end());
    const double above = *std::max_element(out.begin(), out.end()) + 1;
    std::fill(out.end() - n_recent, out.end(), above);
    if (n_past > 0) {
      const std::vector<bool> unlike = highest(unlikeness(slots, first_recent), n_past);
      for (int i = 0; i < first_recent; ++i) {
        out[at(i)] = unlike[at(i)] ? above : out[at(i)];
      }
    }
    return out;
  }

  // Of the n highest; of equals the later.
  static std::vector<bool> highest(const std::vector<double>& scores, int n) {
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int a, int b) {
      return scores[at(a)] != scores[at(b)] ? scores[at(a)] > scores[at(b)] : a > b;
    });
    std::vector<bool> out(scores.size(), false);
    for (int i = 0; i < n; ++i) {
      out[at(order[at(i)])] = true;
    }
    return out;
  }

  // Minus the likeness of each slot before the recent ones to these, mean over the lanes; 0 if there is none to
  // compare.
  std::vector<double> unlikeness(const std::vector<int>& slots, int first_recent) const {
    const int n = static_cast<int>(slots.size()), block = config_.block, n_recent = n - first_recent;
    std::vector<double> out(at(first_recent), 0.0);
    for (const MatD& unit : units_) {
      const MatD past = unit(std::vector<int>(slots.begin(), slots.begin() + first_recent), Eigen::all);
      const MatD recent = unit(std::vector<int>(slots.begin() + first_recent, slots.end()), Eigen::all);
      Eigen::VectorXd like = Eigen::VectorXd::Zero(first_recent);
      if (n_recent == 0) {
        break;
      }
      if (config_.mapping == Mapping::same_offset) {
        for (int offset = 0; offset < std::min(block, n_recent); ++offset) {
          const int count = (n_recent - offset + block - 1) / block;
          Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(recent.cols());
          for (int i = offset; i < n_recent; i += block) {
            sum += recent.row(i) / count;
          }
          for (int i = offset; i < first_recent; i += block) {
            like[i] = past.row(i).dot(sum);
          }
        }
      } else if (config_.mapping == Mapping::centroid) {
        like = past * recent.colwise().mean().stableNormalized().transpose();
      } else {
        const int width = config_.mapping == Mapping::nearest ? n_recent : block;
        for (int begin = 0; begin < n_recent; begin += width) {
          const MatD cos = past * recent.middleRows(begin, std::min(width, n_recent - begin)).transpose();
          like += cos.rowwise().maxCoeff();
        }
        const int n_means = (n_recent + width - 1) / width;
        like /= n_means;
      }
      for (int i = 0; i < first_recent; ++i) {
        out[at(i)] -= like[i] / static_cast<double>(units_.size());
      }
    }
    return out;
  }

  int pool_width(const Eigen::RowVectorXd& norms) const {
    constexpr int kByQuarter[] = {7, 5, 3, 1};
    switch (config_.pooling) {
      case Width::kernel:
        return config_.kernel;
      case Width::layer:
        return kByQuarter[quarter_];
      case Width::variation: {
        const double mean = norms.mean(), std = std::sqrt((norms.array() - mean).square().mean());
        const double variation = mean > 0 ? std / mean : 0;
        return variation < config_.tau1 ? 7 : variation < config_.tau2 ? 5 : variation < config_.tau3 ? 3 : 1;
      }
      case Width::none:
        break;
    }
    return 1;
  }

  Config config_;
  int sink_;
  const Rotation* rotation_;
  int quarter_;               // of the model's layers
  std::vector<MatD> units_;   // per lane (n_slots, head_dim)
  Eigen::RowVectorXd norms_;  // (n_slots) mean over the lanes
};

}  // namespace

extern const PartInfo infinipot;
constinit const PartInfo infinipot = describe<InfiniPot>();

}  // namespace kvreplay
