// ZSMerge's selection: residual slots and the latest tokens stay, of the others those with the highest decayed
// attention.
#include "policies/part.hpp"
#include "policies/protect.hpp"
#include "policies/rewrite/zsmerge.hpp"

namespace kvreplay {
namespace {

class ZsMergeSlots final : public Selector {
 public:
  struct Config {
    Tokens residual{1, false};
    Tokens tail{10, true};
    double decay = 0.98;
  };
  static constexpr std::string_view kName = "zsmerge_slots";
  static constexpr std::string_view kSummary = "decayed attention, beside residual slots and a tail that never leave";
  static constexpr std::string_view kPaper = "arXiv:2503.10714";
  static constexpr std::string_view kDeviation =
      "defaults of the authors' code; a residual slot is lent by the token of its run with the highest score; the tail "
      "slides at once, where the code compares a token one step after it left the tail; the code's choice of how "
      "scores "
      "of merged slots add has no effect, since residual slots never compete";
  static constexpr std::array kParams{
      number<&Config::residual>("residual", 1, kUnbounded, "slots that take in what leaves", Scale::log),
      number<&Config::tail>("tail", 0, kUnbounded, "latest tokens, never evicted (the code: at least 2)", Scale::log),
      number<&Config::decay>("decay", 0.5, 1, "of scores per step; 1: a plain sum", Scale::one_minus),
  };
  static Needs needs(const Config& c) { return {.prompt_queries = ZsMergeCache::n_queries(c.decay)}; }

  ZsMergeSlots(const Config& config, const SetShape& shape)
      : cache_(shape, config.residual, config.tail, config.decay) {}

  void prefill(const View& view) override { cache_.meet(view); }
  void observe(const View& view) override { cache_.meet(view); }

  void score(const View& view, std::span<float> out) override {
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(cache_.score(view, static_cast<int>(i)));
    }
    if (residual_.empty() && view.at_prefill()) {
      for (const ZsMergeCache::Run& run : cache_.runs(view)) {
        for (const int slot : run.slots) {
          out[static_cast<std::size_t>(slot)] -= kBelow;  // ahead of scores that float32 cannot tell apart
        }
        residual_.push_back(view.pos[static_cast<std::size_t>(run.host)]);
      }
    } else if (residual_.empty()) {  // a prompt that needed no cut: the first tokens, as in the code
      residual_.assign(view.pos.begin(), view.pos.begin() + cache_.n_residual(view));
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (std::find(residual_.begin(), residual_.end(), view.pos[i]) != residual_.end()) {
        out[i] = std::numeric_limits<float>::infinity();
      }
    }
    protect(view, 0, cache_.n_tail(view), out);
  }

 private:
  static constexpr float kBelow = 1e6F;
  ZsMergeCache cache_;
  std::vector<Pos> residual_;
};

}  // namespace

extern const PartInfo zsmerge_slots;
constinit const PartInfo zsmerge_slots = describe<ZsMergeSlots>();

}  // namespace kvreplay
