// StreamingLLM: the first tokens, which soak up attention, and the latest ones.
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

class Streaming final : public Selector {
 public:
  struct Config {
    Tokens sink{4, false};
    Tokens window{0, false};
  };
  static constexpr std::string_view kName = "streaming";
  static constexpr std::string_view kSummary = "first tokens and the latest ones that the budget still holds";
  static constexpr std::string_view kPaper = "arXiv:2309.17453";
  static constexpr std::string_view kDeviation =
      "keys keep their positions (the paper numbers them by cache slot); presets streaming-scope, streaming-longflow "
      "and "
      "streaming-gkv are what other codes call StreamingLLM";
  static constexpr std::array kParams{
      number<&Config::sink>("sink", 0, kUnbounded, "first tokens, never evicted", Scale::log),
      number<&Config::window>(
          "window", 0, kUnbounded,
          "0: the latest tokens fill the budget; else so many latest stay and the first ones of the "
          "pool fill it, as in SCOPE's code",
          Scale::log),
  };

  Streaming(const Config& config, const SetShape& shape)
      : sink_(config.sink.of(shape.budget)), window_(config.window.of(shape.budget)) {}

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(window_ > 0 ? -view.pos[i] : view.pos[i]);
    }
    protect(view, sink_, window_, out);
  }

 private:
  int sink_, window_;
};

}  // namespace

extern const PartInfo streaming;
constinit const PartInfo streaming = describe<Streaming>();

}  // namespace kvreplay
