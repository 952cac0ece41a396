// Random: what any policy has to beat.
#include "policies/counter_rng.hpp"
#include "policies/part.hpp"

namespace kvreplay {
namespace {

enum class Draw { each, once };
constexpr std::string_view kDraws[] = {"each", "once"};

class Random final : public Selector {
 public:
  struct Config {
    Draw draw = Draw::each;
  };
  static constexpr std::string_view kName = "random";
  static constexpr std::string_view kSummary = "a random number for every token";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array kParams{
      choice<&Config::draw>("draw", kDraws,
                            "each: new numbers at every eviction, so that old tokens get rarer; once: "
                            "one number for life, so that what stays is a uniform sample of all tokens"),
  };

  Random(const Config& config, const SetShape& shape)
      : once_(config.draw == Draw::once), seed_(shape.seed), layer_(shape.layer), set_(shape.set) {}

  void score(const View& view, std::span<float> out) override {
    const Pos now = once_ ? 0 : view.now;
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(uniform_at(seed_, layer_, set_, now, view.pos[i]));
    }
  }

 private:
  bool once_;
  std::uint64_t seed_;
  int layer_, set_;
};

}  // namespace

extern const PartInfo random;
constinit const PartInfo random = describe<Random>();

}  // namespace kvreplay
