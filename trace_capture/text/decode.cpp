#include "trace_capture/text/decode.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

#include "trace_capture/text/byte_letters.hpp"
#include "trace_capture/text/normalize.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

using Tokens = std::vector<std::string>;

// The byte of a token such as "<0x0A>".
std::optional<char> fallback_byte(std::string_view token) {
  unsigned value = 0;
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>' ||
      std::from_chars(token.data() + 3, token.data() + 5, value, 16).ptr != token.data() + 5) {
    return std::nullopt;
  }
  return static_cast<char>(static_cast<unsigned char>(value));
}

Tokens join_bytes(const Tokens& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) {
    bytes += bytes_of_letters(token).value_or(token);
  }
  return {with_replacements(bytes)};
}

// Neighbouring bytes become their text together; U+FFFD for each if they are none.
Tokens join_fallback_bytes(Tokens tokens) {
  Tokens out;
  std::string bytes;
  const auto flush = [&] {
    if (valid_until(bytes) == bytes.size()) {
      out.push_back(bytes);
    } else {
      out.insert(out.end(), bytes.size(), "\uFFFD");
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    if (const std::optional<char> byte = fallback_byte(token)) {
      bytes += *byte;
      continue;
    }
    if (!bytes.empty()) {
      flush();
    }
    out.push_back(std::move(token));
  }
  if (!bytes.empty()) {
    flush();
  }
  return out;
}

Tokens fuse(const Tokens& tokens) {
  std::string text;
  for (const std::string& token : tokens) {
    text += token;
  }
  return {text};
}

std::string stripped(std::string_view token, std::string_view what, std::size_t front, std::size_t back) {
  for (std::size_t i = 0; i < front && token.starts_with(what); ++i) {
    token.remove_prefix(what.size());
  }
  for (std::size_t i = 0; i < back && token.ends_with(what); ++i) {
    token.remove_suffix(what.size());
  }
  return std::string(token);
}

std::size_t count(const Node& node) { return static_cast<std::size_t>(node.id()); }

}  // namespace

TokenDecoder::TokenDecoder(const std::optional<Node>& node) : none_(!node) {
  if (node) {
    add(*node);
  }
}

void TokenDecoder::add(const Node& node) {
  const std::string type = node.type();
  if (type == "Sequence") {
    node.only({"type", "decoders"});
    for (const Node& step : node.at("decoders").items()) {
      add(step);
    }
  } else if (type == "ByteLevel") {
    node.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    steps_.emplace_back(ByteLetters{});
  } else if (type == "Metaspace") {
    node.only({"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"});
    const std::optional<Node> scheme = node.find("prepend_scheme");
    steps_.emplace_back(Metaspace{node.at("replacement").one_character(), !scheme || scheme->text() != "never"});
  } else if (type == "Replace") {
    node.only({"type", "pattern", "content"});
    steps_.emplace_back(Replace{literal_pattern(node.at("pattern")), node.at("content").text()});
  } else if (type == "ByteFallback") {
    node.only({"type"});
    steps_.emplace_back(ByteFallback{});
  } else if (type == "Fuse") {
    node.only({"type"});
    steps_.emplace_back(Fuse{});
  } else if (type == "Strip") {
    node.only({"type", "content", "start", "stop"});
    steps_.emplace_back(Strip{node.at("content").one_character(), count(node.at("start")), count(node.at("stop"))});
  } else {
    node.refuse(
        fmt::format("type {} is not supported (Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip are)",
                    in_quotes(type)));
  }
}

std::string TokenDecoder::join(std::vector<std::string> tokens) const {
  if (none_) {
    return fmt::format("{}", fmt::join(tokens, " "));
  }
  std::size_t bytes = 0;
  for (const std::string& token : tokens) {
    bytes += token.size();
  }
  const std::size_t most = most_bytes(bytes);
  for (const Step& step : steps_) {
    if (std::holds_alternative<ByteLetters>(step)) {
      tokens = join_bytes(tokens);
    } else if (const auto* metaspace = std::get_if<Metaspace>(&step)) {
      bool first = true;
      for (std::string& token : tokens) {
        token = replace_all(token, metaspace->space, first && metaspace->strip ? "" : " ");
        first = false;
      }
    } else if (const auto* replace = std::get_if<Replace>(&step)) {
      std::size_t left = most;
      for (std::string& token : tokens) {
        token = replace_all(token, replace->what, replace->with, left);
        left -= std::min(token.size(), left);
      }
    } else if (std::holds_alternative<ByteFallback>(step)) {
      tokens = join_fallback_bytes(std::move(tokens));
    } else if (std::holds_alternative<Fuse>(step)) {
      tokens = fuse(tokens);
    } else {
      const auto& strip = std::get<Strip>(step);
      for (std::string& token : tokens) {
        token = stripped(token, strip.what, strip.front, strip.back);
      }
    }
  }
  return fuse(tokens).front();
}

std::string TokenDecoder::bytes(std::string_view token) const {
  std::string bytes(token);
  const std::size_t most = most_bytes(token.size());
  for (const Step& step : steps_) {
    if (std::holds_alternative<ByteLetters>(step)) {
      bytes = bytes_of_letters(bytes).value_or(bytes);
    } else if (const auto* metaspace = std::get_if<Metaspace>(&step)) {
      bytes = replace_all(bytes, metaspace->space, " ");
    } else if (const auto* replace = std::get_if<Replace>(&step)) {
      bytes = replace_all(bytes, replace->what, replace->with, most);
    } else if (std::holds_alternative<ByteFallback>(step)) {
      if (const std::optional<char> byte = fallback_byte(bytes)) {
        return std::string(1, *byte);
      }
    }
  }
  return bytes;
}

}  // namespace kvreplay::text
