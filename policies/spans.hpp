// Named spans of a trace, as allocators over tokens use them.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

struct TokenRange {
  Pos begin, end;  // half-open
};

// "a:b" -> {"a", "b"}
std::vector<std::string> span_names(const std::string& text);
// ConfigError, which begins with `who`, if the trace has no span of such a name.
void check_span_names(const std::string& who, std::span<const TokenSpan> spans, const std::vector<std::string>& names);
// Their prompt tokens (all spans' where `names` is empty), as ascending ranges that do not touch.
std::vector<TokenRange> ranges_of(std::span<const TokenSpan> spans, const std::vector<std::string>& names,
                                  Pos prompt_len);

}  // namespace kvreplay
