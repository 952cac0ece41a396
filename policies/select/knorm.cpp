// Key norm: keys of small norm attract attention and stay.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Knorm final : public Selector {
 public:
  struct Config {};
  static constexpr std::string_view kName = "knorm";
  static constexpr std::string_view kSummary = "minus the norm of the key";
  static constexpr std::string_view kPaper = "arXiv:2406.11430";
  static constexpr std::string_view kDeviation = "every layer alike, as kvpress";
  static constexpr std::array<ParamInfo, 0> kParams{};

  Knorm(const Config&, const SetShape& shape) : norm_(static_cast<std::size_t>(shape.n_tokens), -1.0F) {}

  void observe(const View& view) override {
    for (Pos p : view.rewritten) {
      norm_[static_cast<std::size_t>(p)] = -1;
    }
  }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      float& norm = norm_[static_cast<std::size_t>(view.pos[i])];
      if (norm < 0) {
        norm = 0;
        for (int lane = 0; lane < view.n_lanes; ++lane) {
          norm += view.key(lane, static_cast<int>(i)).norm();
        }
      }
      out[i] = -norm;
    }
  }

 private:
  std::vector<float> norm_;  // (n_tokens) summed over the lanes when first seen; negative: not yet
};

}  // namespace

extern const PartInfo knorm;
constinit const PartInfo knorm = describe<Knorm>();

}  // namespace kvreplay
