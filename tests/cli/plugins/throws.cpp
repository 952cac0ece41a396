// Parts that throw on purpose, where and what their keys say.
#include <stdexcept>

#include "policies/plugin.hpp"

namespace kvreplay {
namespace {

enum class Where { nowhere, check, constructor, prefill, observe, score, evicted };
constexpr std::string_view kWheres[] = {"nowhere", "check", "constructor", "prefill", "observe", "score", "evicted"};
enum class Kind { config, standard, silent, number };
constexpr std::string_view kKinds[] = {"config", "standard", "silent", "number"};

struct Throw {
  Where where = Where::nowhere;
  Kind kind = Kind::standard;

  void at(Where here) const {
    if (where != here) {
      return;
    }
    switch (kind) {
      case Kind::config:
        throw ConfigError("thrown on purpose, as a configuration");
      case Kind::standard:
        throw std::runtime_error("thrown on purpose");
      case Kind::silent:
        throw std::runtime_error("");
      case Kind::number:
        throw 42;
    }
  }
};

class ThrowingSelector final : public Selector {
 public:
  using Config = Throw;
  static constexpr std::string_view kName = "throws";
  static constexpr std::string_view kSummary = "a selector that throws on purpose";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array kParams{
      choice<&Throw::where>("where", kWheres, "where it throws"),
      choice<&Throw::kind>("kind", kKinds, "what it throws"),
  };
  static void check(const Throw& config, int) { config.at(Where::check); }

  ThrowingSelector(const Throw& config, const SetShape&) : throw_(config) { throw_.at(Where::constructor); }
  void prefill(const View&) override { throw_.at(Where::prefill); }
  void observe(const View&) override { throw_.at(Where::observe); }
  void score(const View& view, std::span<float> out) override {
    if (!view.at_prefill()) {
      throw_.at(Where::score);
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(i);
    }
  }
  void evicted(const View&, std::span<const int>) override { throw_.at(Where::evicted); }

 private:
  Throw throw_;
};

class ThrowingRewriter final : public Rewriter {
 public:
  struct Config {};
  static constexpr std::string_view kName = "throws_when_rewriting";
  static constexpr std::string_view kSummary = "a rewriter that throws at every decode step";
  static constexpr std::string_view kPaper = "";
  static constexpr std::string_view kDeviation = "";
  static constexpr std::array<ParamInfo, 0> kParams{};

  ThrowingRewriter(const Config&, const SetShape&) {}
  void step(Cache& cache) override {
    if (!cache.at_prefill()) {
      throw std::runtime_error("thrown on purpose");
    }
  }
};

}  // namespace
}  // namespace kvreplay

KVREPLAY_PLUGIN(kvreplay::ThrowingSelector, kvreplay::ThrowingRewriter);
