// TOVA: drop what the current query attends least, one set for all heads of a layer.
#include "policies/part.hpp"
#include "policies/protect.hpp"

namespace kvreplay {
namespace {

class Tova final : public Selector {
 public:
  struct Config {
    bool pin_newest = false;
  };
  static constexpr std::string_view kName = "tova";
  static constexpr std::string_view kSummary = "attention of the current query, averaged over the layer's heads";
  static constexpr std::string_view kPaper = "arXiv:2401.06104";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array kParams{
      flag<&Config::pin_newest>("pin_newest", "never evict the newest token, as kvpress; the authors let it go"),
  };
  static Traits traits(const Config&) { return {.scope = Scope::layer}; }
  static Needs needs(const Config&) { return {.prompt_queries = 1}; }

  Tova(const Config& config, const SetShape&) : window_(config.pin_newest ? 1 : 0) {}

  void score(const View& view, std::span<float> out) override {
    view.attention(out);
    protect(view, 0, window_, out);
  }

 private:
  int window_;
};

}  // namespace

extern const PartInfo tova;
constinit const PartInfo tova = describe<Tova>();

}  // namespace kvreplay
