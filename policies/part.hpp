// One part as the catalogue knows it, and how a part's file describes itself.
#pragma once
#include <functional>

#include "policies/errors.hpp"
#include "policies/params.hpp"

namespace kvreplay {

enum class Role { select, read, allocate, rewrite, compensate };
enum class Foresight { none, oracle };
// What a rewriter does: stores kept tokens differently, takes tokens in as they leave, or makes up for those that left.
enum class Rewriting { encoding, merging, correction };

struct PartInfo {
  std::string_view name, summary, paper, deviation;
  Role role;
  Foresight foresight;
  Rewriting rewriting;  // of a rewriter
  bool is_default;      // says in words what happens without a part of its role
  bool across_heads;    // joins the KV heads of a layer, so that scope=layer is all it can work with
  std::span<const ParamInfo> params;

  // A Config, type-erased: default values, then the user's through ParamInfo::set.
  std::shared_ptr<void> (*config)();
  // Selectors: the engine keys' defaults, and whether a budget applies (full has none).
  Traits (*traits)(const void* config);
  bool (*budgeted)(const void* config);
  Needs (*needs)(const void* config);
  // Combinations of values that cannot be; throws ConfigError.
  void (*check)(const void* config, int budget);

  // Exactly the one of the part's role is set.
  std::unique_ptr<Selector> (*select)(const void* config, const SetShape&);
  std::unique_ptr<Reader> (*read)(const void* config, const SetShape&);
  std::unique_ptr<Allocator> (*allocate)(const void* config);
  std::unique_ptr<Rewriter> (*rewrite)(const void* config, const SetShape&);
  std::unique_ptr<Compensator> (*compensate)(const void* config, const SetShape&);
};

// Builds a PartInfo from a class P with a nested Config and statics kName, kSummary, kPaper, kDeviation, kParams, and
// optionally traits(Config), needs(Config), budgeted(Config), check(Config, budget), kForesight, kIsDefault,
// kAcrossHeads, kCorrects.
template <class P>
constexpr PartInfo describe() {
  using Config = typename P::Config;
  PartInfo info{};
  info.name = P::kName;
  info.summary = P::kSummary;
  info.paper = P::kPaper;
  info.deviation = P::kDeviation;
  info.params = P::kParams;
  if constexpr (requires { P::kIsDefault; }) {
    info.is_default = P::kIsDefault;
  }
  if constexpr (requires { P::kAcrossHeads; }) {
    info.across_heads = P::kAcrossHeads;
  }
  info.foresight = Foresight::none;
  if constexpr (requires { P::kForesight; }) {
    info.foresight = P::kForesight;
  }
  info.config = [] { return std::shared_ptr<void>(std::make_shared<Config>()); };
  info.traits = [](const void* c) {
    if constexpr (requires(const Config& x) { P::traits(x); }) {
      return P::traits(*static_cast<const Config*>(c));
    } else {
      return Traits{};
    }
  };
  info.budgeted = [](const void* c) {
    if constexpr (requires(const Config& x) { P::budgeted(x); }) {
      return P::budgeted(*static_cast<const Config*>(c));
    } else {
      return true;
    }
  };
  info.needs = [](const void* c) {
    if constexpr (requires(const Config& x) { P::needs(x); }) {
      return P::needs(*static_cast<const Config*>(c));
    } else {
      return Needs{};
    }
  };
  info.check = [](const void* c, int budget) {
    if constexpr (requires(const Config& x) { P::check(x, 1); }) {
      P::check(*static_cast<const Config*>(c), budget);
    }
  };
  if constexpr (std::is_base_of_v<Selector, P>) {
    info.role = Role::select;
    info.select = [](const void* c, const SetShape& s) -> std::unique_ptr<Selector> {
      return std::make_unique<P>(*static_cast<const Config*>(c), s);
    };
  } else if constexpr (std::is_base_of_v<Reader, P>) {
    info.role = Role::read;
    info.read = [](const void* c, const SetShape& s) -> std::unique_ptr<Reader> {
      return std::make_unique<P>(*static_cast<const Config*>(c), s);
    };
  } else if constexpr (std::is_base_of_v<Allocator, P>) {
    info.role = Role::allocate;
    info.allocate = [](const void* c) -> std::unique_ptr<Allocator> {
      return std::make_unique<P>(*static_cast<const Config*>(c));
    };
  } else if constexpr (std::is_base_of_v<Rewriter, P>) {
    info.role = Role::rewrite;
    constexpr bool takes_in = !std::is_same_v<decltype(&P::evicted), decltype(&Rewriter::evicted)>;
    info.rewriting = takes_in ? Rewriting::merging : Rewriting::encoding;
    if constexpr (requires { P::kCorrects; }) {
      info.rewriting = P::kCorrects ? Rewriting::correction : info.rewriting;
    }
    info.rewrite = [](const void* c, const SetShape& s) -> std::unique_ptr<Rewriter> {
      return std::make_unique<P>(*static_cast<const Config*>(c), s);
    };
  } else {
    info.role = Role::compensate;
    info.compensate = [](const void* c, const SetShape& s) -> std::unique_ptr<Compensator> {
      return std::make_unique<P>(*static_cast<const Config*>(c), s);
    };
  }
  return info;
}

}  // namespace kvreplay
