// The `added_tokens` of tokenizer.json: tokens that are cut out of the text before anything else is done to it.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "trace_capture/text/bpe.hpp"
#include "trace_capture/text/node.hpp"
#include "trace_capture/text/normalize.hpp"
#include "trace_capture/text/regex.hpp"

namespace kvreplay::text {

struct AddedToken {
  std::string content;
  std::string pattern;  // what is looked for: content, or its normalized form
  std::int32_t id = 0;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false;
};

class AddedTokens {
 public:
  // Throws ConfigError if a token's id is not the one that Hugging Face's tokenizers would give it: the id of the same
  // text in the vocabulary, else the next one behind all others.
  AddedTokens(const std::optional<Node>& node, const Bpe& bpe, const Normalizer& normalizer);

  // Cuts text into tokens and what lies between them. normalized: text has been normalized, and tokens are looked for
  // that say so; otherwise it is as it came, and the other tokens are looked for.
  struct Piece {
    Range range;
    const AddedToken* token;  // nullptr = text
  };
  std::vector<Piece> find(std::string_view text, bool normalized) const;

  const AddedToken* token(std::int32_t id) const;  // nullptr: none has this id
  std::int32_t largest_id() const { return largest_id_; }

 private:
  // Tokens to look for, ascending by pattern, so that those that begin alike are neighbours.
  using Set = std::vector<const AddedToken*>;
  static const AddedToken* longest_at_front(const Set& set, std::string_view text);
  bool is_word_character(std::string_view character) const;

  std::unordered_map<std::int32_t, AddedToken> tokens_;  // by id
  Set raw_, normalized_;
  Regex word_character_;
  std::int32_t largest_id_ = -1;
};

}  // namespace kvreplay::text
