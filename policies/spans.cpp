#include "policies/spans.hpp"

#include <algorithm>

#include "policies/errors.hpp"

namespace kvreplay {

std::vector<std::string> span_names(const std::string& text) {
  std::vector<std::string> names;
  for (std::size_t begin = 0; begin <= text.size() && !text.empty();) {
    const std::size_t end = std::min(text.find(':', begin), text.size());
    names.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

void check_span_names(const std::string& who, std::span<const TokenSpan> spans, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (std::any_of(spans.begin(), spans.end(), [&](const TokenSpan& s) { return s.name == name; })) {
      continue;
    }
    std::vector<std::string> have;
    std::string all;
    for (const TokenSpan& s : spans) {
      if (std::find(have.begin(), have.end(), s.name) == have.end()) {
        have.push_back(s.name);
        all += (all.empty() ? "" : ", ") + s.name;
      }
    }
    throw ConfigError(who + ": the trace has no span '" + name + "'; it has " + (all.empty() ? "none" : all));
  }
}

std::vector<TokenRange> ranges_of(std::span<const TokenSpan> spans, const std::vector<std::string>& names,
                                  Pos prompt_len) {
  std::vector<TokenRange> ranges;
  for (const TokenSpan& s : spans) {
    const bool wanted = names.empty() || std::find(names.begin(), names.end(), s.name) != names.end();
    if (wanted && s.begin < std::min(s.end, prompt_len)) {
      ranges.push_back({s.begin, std::min(s.end, prompt_len)});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  std::vector<TokenRange> apart;
  for (const TokenRange& r : ranges) {
    if (!apart.empty() && r.begin <= apart.back().end) {
      apart.back().end = std::max(apart.back().end, r.end);
    } else {
      apart.push_back(r);
    }
  }
  return apart;
}

}  // namespace kvreplay
