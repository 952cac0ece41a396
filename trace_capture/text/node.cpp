#include "trace_capture/text/node.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "policies/errors.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {

Node::Node(const nlohmann::json& value, const std::string& file, std::string place)
    : value_(&value), file_(&file), place_(std::move(place)) {}

std::string Node::inside(const std::string& key) const { return place_.empty() ? key : place_ + "." + key; }

std::optional<Node> Node::find(const char* key) const {
  if (!value_->is_object()) {
    refuse(fmt::format("must be an object, found {}", value_->type_name()));
  }
  const auto found = value_->find(key);
  if (found == value_->end() || found->is_null()) {
    return std::nullopt;
  }
  return Node(*found, *file_, inside(key));
}

Node Node::at(const char* key) const {
  std::optional<Node> node = find(key);
  if (!node) {
    refuse(fmt::format("has no '{}'", key));
  }
  return *node;
}

std::vector<Node> Node::items() const {
  if (!value_->is_array()) {
    refuse(fmt::format("must be a list, found {}", value_->type_name()));
  }
  std::vector<Node> nodes;
  for (std::size_t i = 0; i < value_->size(); ++i) {
    nodes.emplace_back((*value_)[i], *file_, fmt::format("{}[{}]", place_, i));
  }
  return nodes;
}

std::string Node::text() const {
  if (!value_->is_string()) {
    refuse(fmt::format("must be text, found {}", value_->type_name()));
  }
  return value_->get<std::string>();
}

bool Node::flag(const char* key, bool otherwise) const {
  const std::optional<Node> node = find(key);
  if (!node) {
    return otherwise;
  }
  if (!node->value_->is_boolean()) {
    node->refuse(fmt::format("must be true or false, found {}", node->value_->type_name()));
  }
  return node->value_->get<bool>();
}

std::int32_t Node::id() const {
  if (!value_->is_number_integer()) {
    refuse(fmt::format("must be a token id, found {}", value_->type_name()));
  }
  if (!is_id(*value_)) {
    refuse(fmt::format("token id {} is outside [0, {}]", value_->dump(), kMaxId));
  }
  return value_->get<std::int32_t>();
}

std::string Node::one_character() const {
  std::string character = text();
  if (character.empty() || character_size(character) != character.size()) {
    refuse(fmt::format("must be one character, found {}", in_quotes(character)));
  }
  return character;
}

void Node::only(std::initializer_list<std::string_view> keys) const {
  if (!value_->is_object()) {
    refuse(fmt::format("must be an object, found {}", value_->type_name()));
  }
  for (const auto& [key, value] : value_->items()) {
    if (!value.is_null() && std::find(keys.begin(), keys.end(), key) == keys.end()) {
      refuse(fmt::format("option {} is not supported ({} are)", in_quotes(key), fmt::join(keys, ", ")));
    }
  }
}

void Node::refuse(const std::string& what) const {
  std::string sentence = with_replacements(
      fmt::format("{}{}{}; pass token ids with --tokens instead", place_, place_.empty() ? "" : ": ", what));
  // Parts of an expression are shown as they are, and may hold anything.
  std::replace_if(
      sentence.begin(), sentence.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }, '?');
  throw ConfigError(fmt::format("{}: {}", *file_, sentence));
}

bool is_id(const nlohmann::json& value) {
  return value.is_number_unsigned() && value.get<std::uint64_t>() <= static_cast<std::uint64_t>(kMaxId);
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kLongest = 48;
  std::string shown(text);
  if (shown.size() > kLongest) {
    shown.resize(kLongest);
    shown.resize(valid_until(shown));
    shown += "...";
  }
  return nlohmann::json(shown).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace kvreplay::text
