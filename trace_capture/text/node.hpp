// One value of tokenizer.json that knows its place in the file, so that every refusal can name it.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay::text {

// Ids are small numbers: the largest public vocabularies have about a million tokens.
constexpr std::int32_t kMaxId = (1 << 22) - 1;

class Node {
 public:
  // value and file (its path) must outlive the node; place is "" for the whole file.
  Node(const nlohmann::json& value, const std::string& file, std::string place);

  const nlohmann::json& json() const { return *value_; }
  const std::string& file() const { return *file_; }
  const std::string& place() const { return place_; }
  std::string inside(const std::string& key) const;  // the place of a member

  std::optional<Node> find(const char* key) const;  // nullopt if absent or null
  Node at(const char* key) const;
  std::vector<Node> items() const;  // of a list
  std::string text() const;
  std::string type() const { return at("type").text(); }
  bool flag(const char* key, bool otherwise) const;
  std::int32_t id() const;            // a number in [0, kMaxId]
  std::string one_character() const;  // a text of one character

  // Refuses a member that is not named, unless it is null: what we do not know may change the ids.
  void only(std::initializer_list<std::string_view> keys) const;

  // Throws ConfigError: file, place, what is wrong, and that ids can be passed instead.
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  const nlohmann::json* value_;
  const std::string* file_;
  std::string place_;
};

bool is_id(const nlohmann::json& value);

// Text of the file for a message: in quotation marks, escaped, cut if it is long.
std::string in_quotes(std::string_view text);

}  // namespace kvreplay::text
