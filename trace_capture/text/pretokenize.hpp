// The `pre_tokenizer` of tokenizer.json: cuts text into the words that BPE sees.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "trace_capture/text/node.hpp"
#include "trace_capture/text/regex.hpp"

namespace kvreplay::text {

class PreTokenizer {
 public:
  using Sink = std::function<void(std::string_view word)>;

  explicit PreTokenizer(const std::optional<Node>& node);  // null: the text is one word

  // at_start: text begins the whole input (no special token before it). Words are never empty.
  void split(std::string_view text, bool at_start, const Sink& sink) const { run(0, text, at_start, sink); }

 private:
  enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
  enum class Prefix { first, never, always };

  struct Split {
    std::variant<std::string, Regex> pattern;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
  };
  struct SpaceInFront {};  // unless there is one
  struct ByteLetters {};
  struct Metaspace {
    std::string space;  // what stands for a space: one character, U+2581 as a rule
    Prefix prefix = Prefix::always;
  };
  using Step = std::variant<Split, SpaceInFront, ByteLetters, Metaspace>;

  void add(const Node& node);
  void add_split(const Node& node);
  void add_byte_level(const Node& node);
  void add_metaspace(const Node& node);
  static std::vector<Range> cut(const Split& split, std::string_view text);
  void run(std::size_t step, std::string_view text, bool at_start, const Sink& sink) const;

  std::vector<Step> steps_;
};

}  // namespace kvreplay::text
