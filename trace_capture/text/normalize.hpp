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

// How long a text of so many bytes may become: steps that a file gives in any number can double it each.
constexpr std::size_t most_bytes(std::size_t text) { return 64 * (text + 1024); }
constexpr std::size_t kMaxSteps = 64;  // of a normalizer or a pre-tokenizer; real ones have fewer than ten

// text with every what as with; what is not empty. ConfigError if that has more than `most` bytes.
std::string replace_all(std::string_view text, std::string_view what, std::string_view with,
                        std::size_t most = std::string::npos);

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
