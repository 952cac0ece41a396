// KeyDiff: keep the keys that differ most from the mean direction of all resident keys.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class KeyDiff final : public Selector {
 public:
  struct Config {};
  static constexpr std::string_view kName = "keydiff";
  static constexpr std::string_view kSummary = "minus the cosine between a key and the mean of the unit keys";
  static constexpr std::string_view kPaper = "arXiv:2504.15364";
  static constexpr std::string_view kDeviation =
      "the prompt is cut once and then one token a step (the paper cuts blocks of 128)";
  static constexpr std::array<ParamInfo, 0> kParams{};

  KeyDiff(const Config&, const SetShape& shape) {
    for (int lane = 0; lane < shape.n_lanes; ++lane) {
      lanes_.push_back(
          {Eigen::VectorXd::Zero(shape.head_dim), std::vector<float>(static_cast<std::size_t>(shape.n_tokens), 0.0F)});
    }
  }

  void prefill(const View& view) override { meet(view); }
  void observe(const View& view) override {
    if (!view.rewritten.empty()) {  // some keys are not what the sums hold
      for (Lane& lane : lanes_) {
        lane.sum.setZero();
      }
      newest_ = -1;
    }
    meet(view);
  }

  void score(const View& view, std::span<float> out) override {
    meet(view);
    std::fill(out.begin(), out.end(), 0.0F);
    for (std::size_t l = 0; l < lanes_.size(); ++l) {
      const Eigen::VectorXf anchor = lanes_[l].sum.stableNormalized().cast<float>();
      for (std::size_t i = 0; i < out.size(); ++i) {
        const VecF key = view.key(static_cast<int>(l), static_cast<int>(i));
        out[i] -= key.dot(anchor) * lanes_[l].inverse_norm[static_cast<std::size_t>(view.pos[i])];
      }
    }
  }

  void evicted(const View& view, std::span<const int> slots) override {
    for (int slot : slots) {
      add(view, slot, -1);
    }
  }

 private:
  // Slots that arrived since the last call join the anchors.
  void meet(const View& view) {
    for (int i = static_cast<int>(view.pos.size()); i-- > 0 && at(view, i) > newest_;) {
      for (std::size_t l = 0; l < lanes_.size(); ++l) {
        const float norm = view.key(static_cast<int>(l), i).norm();
        lanes_[l].inverse_norm[static_cast<std::size_t>(at(view, i))] = norm > 0 ? 1 / norm : 0;
      }
      add(view, i, 1);
    }
    if (!view.pos.empty()) {
      newest_ = view.pos.back();
    }
  }
  void add(const View& view, int slot, double sign) {
    for (std::size_t l = 0; l < lanes_.size(); ++l) {
      const double scale = sign * static_cast<double>(lanes_[l].inverse_norm[static_cast<std::size_t>(at(view, slot))]);
      lanes_[l].sum += scale * view.key(static_cast<int>(l), slot).cast<double>();
    }
  }
  static Pos at(const View& view, int slot) { return view.pos[static_cast<std::size_t>(slot)]; }

  struct Lane {
    Eigen::VectorXd sum;              // (head_dim) of the unit keys that are resident
    std::vector<float> inverse_norm;  // (n_tokens)
  };
  std::vector<Lane> lanes_;
  Pos newest_ = -1;
};

}  // namespace

extern const PartInfo keydiff;
constinit const PartInfo keydiff = describe<KeyDiff>();

}  // namespace kvreplay
