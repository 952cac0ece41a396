// The `decoder` of tokenizer.json: the texts of tokens, put together again.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "trace_capture/text/node.hpp"

namespace kvreplay::text {

class TokenDecoder {
 public:
  explicit TokenDecoder(const std::optional<Node>& node);  // null: tokens with spaces between them

  std::string join(std::vector<std::string> tokens) const;

  // The bytes of one token, wherever it stands: nothing is stripped.
  std::string bytes(std::string_view token) const;

 private:
  struct ByteLetters {};
  struct Metaspace {
    std::string space;
    bool strip = true;  // no space at the very front
  };
  struct Replace {
    std::string what, with;
  };
  struct ByteFallback {};
  struct Fuse {};
  struct Strip {
    std::string what;
    std::size_t front = 0, back = 0;  // how often at most
  };
  using Step = std::variant<ByteLetters, Metaspace, Replace, ByteFallback, Fuse, Strip>;

  void add(const Node& node);

  bool none_ = false;
  std::vector<Step> steps_;
};

}  // namespace kvreplay::text
