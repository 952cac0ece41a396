// A method as text and as resolved parts.
//
//   method = [prefill_select ["+" allocate] "/"] select {"+" part},  part = name[":" key=value {"," key=value}]
//
// "+" separates only before a letter, "/" only before the name of a selector or preset. Any number may be
// "@file.json": one value per layer, or per layer and KV head. Names of papers are presets that expand to such a text.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "policies/part.hpp"

namespace kvreplay {

// Values of one parameter per layer, or per layer and KV head: what "@file.json" stands for.
struct ValueTable {
  std::string path, hash;
  std::vector<int> layers;                  // model layer numbers
  std::vector<std::vector<double>> values;  // per layer: one value, or n_kv_heads of them
  double at(int layer, int kv_head) const;  // ConfigError if the layer or head is not there
};
using TableReader = std::function<ValueTable(const std::string& path)>;

// What the user asked a set to keep: "128" tokens, "0.25" or "25%" of the prompt, "64KiB" per KV head.
struct Budget {
  enum class Unit { none, tokens, fraction, bytes } unit = Unit::none;
  double value = 0;
  std::string text;                              // as written; empty for none
  static Budget parse(const std::string& text);  // ConfigError
  // Tokens per set. slot_bytes: of one token's key and value; state_bytes: what a set of that many tokens keeps beside
  // them, never less for more tokens; empty: nothing. sets_per_kv_head: group_size in query_head scope, else 1.
  int tokens(Pos prompt_len, double slot_bytes, const std::function<double(int)>& state_bytes,
             int sets_per_kv_head) const;
};

// A value that differs from the part's default, because the user wrote it or a preset did.
struct Setting {
  const ParamInfo* param;
  ParamValue value;
  std::shared_ptr<const ValueTable> table;  // instead of value
  bool from_preset = false;                 // gives way like a default where a budget is too small for it
};

struct PartUse {
  const PartInfo* info = nullptr;
  std::vector<Setting> settings;  // in table order, without those equal to the default
  // The part's Config for one layer and KV head; give it to info->select and so on.
  std::shared_ptr<void> config(int layer = 0, int kv_head = 0) const;
};

struct Method {
  std::string label;                        // as typed
  std::string name;                         // canonical: presets expanded, defaults omitted, keys in table order
  std::string preset;                       // empty if none
  std::optional<PartUse> prefill_select;    // cuts the prompt to prefill_budget (none: the run's), then stands
  std::optional<PartUse> prefill_allocate;  // spreads prefill_budget
  Traits prefill_traits;
  Budget prefill_budget;
  PartUse select;
  Traits traits;  // of `select`: its defaults, overridden by the user's engine keys
  std::optional<PartUse> read, allocate, rewrite, compensate;

  std::vector<const PartUse*> parts() const;  // those there are, in the order of the text
  bool budgeted() const;                      // full without a reader is not
  Foresight foresight() const;
  // Union over the parts and what is measured beside them; none of the prompt's queries where the prompt is pinned.
  Needs needs(std::span<const PartUse> compensators = {}) const;
  // Values the user wrote that do not fit this budget, and each part's own check; ConfigError. prompt_budget: the
  // prefill selector's, in tokens; 0 if it has none of its own.
  void check(int budget, int prompt_budget = 0) const;
};

// ConfigError names the offending piece, what is allowed and the nearest valid name.
Method parse_method(const std::string& text, const TableReader& read_table = {});

// The allocator of any of its layers and heads, to ask what does not depend on their values.
std::unique_ptr<Allocator> any_allocator(const PartUse&);
// True if what one layer gets depends on the other layers of the run: an allocator is not per_layer().
bool divides_over_layers(const Method&);
// Allocator::Layers::worth of these layers.
MatD head_worth(const PartUse& allocator, std::span<const int> layers, int n_kv_heads);

// One part by itself, as --compensators takes it; ConfigError if it does not play this role.
PartUse parse_part(const std::string& text, Role role, const TableReader& read_table = {});
// The part's canonical text: defaults omitted, keys in table order.
std::string canonical(const PartUse& use);

// "a,b:x=1,y=2,c" -> {"a", "b:x=1,y=2", "c"}: a piece with "=" and no ":" continues the element before it.
std::vector<std::string> split_methods(const std::string& list);

}  // namespace kvreplay
