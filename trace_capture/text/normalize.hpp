// The `normalizer` of tokenizer.json: what is done to the text before it is split.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "trace_capture/text/node.hpp"

namespace kvreplay::text {

// Canonical composition as of Unicode 9.0, the version that Hugging Face's tokenizers composes by.
std::string nfc(std::string_view text);

// text with every what as with; what is not empty.
std::string replace_all(std::string_view text, std::string_view what, std::string_view with);

// The text to look for in a "pattern"; a pattern that is a regular expression is refused.
std::string literal_pattern(const Node& pattern);

class Normalizer {
 public:
  explicit Normalizer(const std::optional<Node>& node);  // null: the text stays as it is

  bool empty() const { return steps_.empty(); }
  std::string operator()(std::string_view text) const;

 private:
  struct Nfc {};
  struct Prepend {
    std::string prefix;
  };
  struct Replace {
    std::string what, with;
  };
  void add(const Node& node);

  std::vector<std::variant<Nfc, Prepend, Replace>> steps_;
};

}  // namespace kvreplay::text
