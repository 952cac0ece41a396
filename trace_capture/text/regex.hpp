// Regular expressions as tokenizer.json writes them, matched by PCRE2.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay::text {

struct Range {
  std::size_t begin, end;  // bytes, half-open
};

class Regex {
 public:
  // pattern: Oniguruma's Ruby syntax, the part of it that means the same in every engine: literals, classes, general
  // categories (\p{L}), \s \S \d \D, groups, look-around, alternation, quantifiers. Throws std::invalid_argument whose
  // text says what of it is not supported.
  explicit Regex(std::string_view pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // All matches in text (UTF-8, checked by the caller), left to right, without overlap. Throws ConfigError if PCRE2
  // gives up on the text.
  std::vector<Range> matches(std::string_view text) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

// Inside of a class: the general category, with what PCRE2's tables do not know yet.
std::string category_items(std::string_view category);

}  // namespace kvreplay::text
