#include "trace_capture/text/pretokenize.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "trace_capture/text/byte_letters.hpp"
#include "trace_capture/text/normalize.hpp"

namespace kvreplay::text {
namespace {

// How GPT-2 splits: ByteLevel with use_regex.
constexpr std::string_view kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Digits asks Rust's own tables, which are those of Unicode 17.0: two more groups of digits than expressions know.
constexpr std::string_view kDigit = "[\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6]";

std::vector<Range> occurrences(std::string_view text, std::string_view what) {
  std::vector<Range> found;
  for (std::size_t i = 0; (i = text.find(what, i)) != std::string_view::npos; i += what.size()) {
    found.push_back({i, i + what.size()});
  }
  return found;
}

Regex read_regex(const Node& node) {
  const std::string pattern = node.text();
  try {
    return Regex(pattern);
  } catch (const std::invalid_argument& error) {
    node.refuse(error.what());
  }
}

}  // namespace

PreTokenizer::PreTokenizer(const std::optional<Node>& node) {
  if (node) {
    add(*node);
  }
}

void PreTokenizer::add(const Node& node) {
  if (steps_.size() >= kMaxSteps) {
    node.refuse(fmt::format("more than {} steps are not supported", kMaxSteps));
  }
  const std::string type = node.type();
  if (type == "Sequence") {
    node.only({"type", "pretokenizers"});
    for (const Node& step : node.at("pretokenizers").items()) {
      add(step);
    }
  } else if (type == "Split") {
    add_split(node);
  } else if (type == "ByteLevel") {
    add_byte_level(node);
  } else if (type == "Digits") {
    node.only({"type", "individual_digits"});
    const bool alone = node.flag("individual_digits", false);
    steps_.emplace_back(Split{Regex(kDigit), alone ? Behavior::isolated : Behavior::contiguous, false});
  } else if (type == "Metaspace") {
    add_metaspace(node);
  } else {
    node.refuse(
        fmt::format("type {} is not supported (Sequence, Split, Digits, ByteLevel, Metaspace are)", in_quotes(type)));
  }
}

void PreTokenizer::add_split(const Node& node) {
  node.only({"type", "pattern", "behavior", "invert"});
  Split split;
  const Node pattern = node.at("pattern");
  if (const std::optional<Node> regex = pattern.find("Regex")) {
    pattern.only({"Regex"});
    split.pattern = read_regex(*regex);
  } else {
    split.pattern = literal_pattern(pattern);
  }
  const Node behavior = node.at("behavior");
  const std::string name = behavior.text();
  if (name == "Removed") {
    split.behavior = Behavior::removed;
  } else if (name == "Isolated") {
    split.behavior = Behavior::isolated;
  } else if (name == "MergedWithPrevious") {
    split.behavior = Behavior::merged_with_previous;
  } else if (name == "MergedWithNext") {
    split.behavior = Behavior::merged_with_next;
  } else if (name == "Contiguous") {
    split.behavior = Behavior::contiguous;
  } else {
    behavior.refuse(
        fmt::format("{} is not supported (Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous are)",
                    in_quotes(name)));
  }
  split.invert = node.flag("invert", false);
  steps_.emplace_back(std::move(split));
}

void PreTokenizer::add_byte_level(const Node& node) {
  if (std::any_of(steps_.begin(), steps_.end(), [](const auto& s) { return std::holds_alternative<ByteLetters>(s); })) {
    node.refuse("ByteLevel is there twice, which is not supported");  // each doubles the text
  }
  node.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  if (node.flag("add_prefix_space", true)) {
    steps_.emplace_back(SpaceInFront{});
  }
  if (node.flag("use_regex", true)) {
    steps_.emplace_back(Split{Regex(kGpt2), Behavior::isolated, false});
  }
  steps_.emplace_back(ByteLetters{});
}

void PreTokenizer::add_metaspace(const Node& node) {
  node.only({"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"});
  Metaspace metaspace;
  metaspace.space = node.at("replacement").one_character();
  if (const std::optional<Node> scheme = node.find("prepend_scheme")) {
    const std::string name = scheme->text();
    if (name == "first") {
      metaspace.prefix = Prefix::first;
    } else if (name == "never") {
      metaspace.prefix = Prefix::never;
    } else if (name != "always") {
      scheme->refuse(fmt::format("{} is not supported (first, never, always are)", in_quotes(name)));
    }
  }
  if (!node.flag("add_prefix_space", true) && metaspace.prefix != Prefix::never) {
    node.refuse("'add_prefix_space' is false and 'prepend_scheme' is not \"never\"");
  }
  steps_.emplace_back(metaspace);
  if (node.flag("split", true)) {
    steps_.emplace_back(Split{metaspace.space, Behavior::merged_with_next, false});
  }
}

std::vector<Range> PreTokenizer::cut(const Split& split, std::string_view text) {
  struct Part {
    Range range;
    bool match;
  };
  const std::vector<Range> matches = std::holds_alternative<Regex>(split.pattern)
                                         ? std::get<Regex>(split.pattern).matches(text)
                                         : occurrences(text, std::get<std::string>(split.pattern));
  std::vector<Part> parts;  // matches and what lies between them: the whole text
  std::size_t end = 0;
  for (const Range& match : matches) {
    if (end < match.begin) {
      parts.push_back({{end, match.begin}, split.invert});
    }
    parts.push_back({match, !split.invert});
    end = match.end;
  }
  if (end < text.size()) {
    parts.push_back({{end, text.size()}, split.invert});
  }

  std::vector<Range> words;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const bool match = parts[i].match;
    const bool match_before = i > 0 && parts[i - 1].match;
    bool joins = false;  // the word before it
    switch (split.behavior) {
      case Behavior::removed:
        if (match) {
          continue;
        }
        break;
      case Behavior::isolated:
        break;
      case Behavior::merged_with_previous:  // of several matches in a row only the first is merged
        joins = i > 0 && match && !match_before;
        break;
      case Behavior::merged_with_next:  // of several matches in a row only the last is merged
        joins = match_before && !match;
        break;
      case Behavior::contiguous:
        joins = i > 0 && match == match_before;
        break;
    }
    if (joins) {
      words.back().end = parts[i].range.end;
    } else {
      words.push_back(parts[i].range);
    }
  }
  return words;
}

void PreTokenizer::run(std::size_t step, std::string_view text, bool at_start, const Sink& sink) const {
  if (text.empty()) {
    return;
  }
  if (step == steps_.size()) {
    sink(text);
    return;
  }
  if (const auto* split = std::get_if<Split>(&steps_[step])) {
    for (const Range& word : cut(*split, text)) {
      run(step + 1, text.substr(word.begin, word.end - word.begin), at_start && word.begin == 0, sink);
    }
  } else if (std::holds_alternative<SpaceInFront>(steps_[step])) {
    run(step + 1, text.starts_with(' ') ? std::string(text) : " " + std::string(text), at_start, sink);
  } else if (std::holds_alternative<ByteLetters>(steps_[step])) {
    run(step + 1, byte_letters(text), at_start, sink);
  } else {
    const auto& [space, prefix] = std::get<Metaspace>(steps_[step]);
    std::string spaced = replace_all(text, " ", space);
    const bool wanted = prefix == Prefix::always || (prefix == Prefix::first && at_start);
    if (wanted && !spaced.starts_with(space)) {
      spaced.insert(0, space);
    }
    run(step + 1, spaced, at_start, sink);
  }
}

}  // namespace kvreplay::text
