#include "trace_capture/text/added_tokens.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

// Unicode's White_Space, unchanged since 6.3.
bool is_space(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// The end of the spaces in front, the begin of those at the end.
std::size_t spaces_in_front(std::string_view text) {
  std::size_t i = 0;
  while (i < text.size() && is_space(code_point(text.substr(i)))) {
    i += character_size(text.substr(i));
  }
  return i;
}
std::size_t before_spaces_at_end(std::string_view text) {
  while (!text.empty()) {
    const std::size_t size = last_character_size(text);
    if (!is_space(code_point(text.substr(text.size() - size)))) {
      break;
    }
    text.remove_suffix(size);
  }
  return text.size();
}

}  // namespace

// A word character is one of \w in Unicode's own definition (Technical Standard 18, annex C): Alphabetic, of which
// letters, letter-numbers, marks and circled letters are the greater part, marks, decimal digits, connectors and
// joiners.
AddedTokens::AddedTokens(const std::optional<Node>& node, const Bpe& bpe, const Normalizer& normalizer)
    : word_character_(
          "[\\p{L}\\p{Nl}\\p{M}\\p{Nd}\\p{Pc}\u200C\u200D\u24B6-\u24E9\U0001F130-\U0001F149\U0001F150-\U0001F169"
          "\U0001F170-\U0001F189]") {
  std::unordered_map<std::string, std::int32_t> ids;  // of the added tokens so far
  std::int32_t next = bpe.n_tokens();
  const std::vector<Node> items = node ? node->items() : std::vector<Node>();
  for (const Node& item : items) {
    item.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token;
    token.content = item.at("content").text();
    token.id = item.at("id").id();
    token.single_word = item.flag("single_word", false);
    token.lstrip = item.flag("lstrip", false);
    token.rstrip = item.flag("rstrip", false);
    token.normalized = item.flag("normalized", !item.flag("special", false));
    if (token.content.empty()) {
      continue;
    }
    const auto again = ids.find(token.content);
    const std::optional<std::int32_t> known = again != ids.end() ? again->second : bpe.id(token.content);
    const std::int32_t expected = known.value_or(next);
    if (token.id != expected) {
      item.refuse(fmt::format("{} has the id {}, but the order of the file gives it {}", in_quotes(token.content),
                              token.id, expected));
    }
    next += known ? 0 : 1;
    token.pattern = token.normalized ? normalizer(token.content) : token.content;
    ids.emplace(token.content, token.id);
    largest_id_ = std::max(largest_id_, token.id);
    tokens_.insert_or_assign(token.id, std::move(token));
  }
  for (const auto& [id, token] : tokens_) {
    (token.normalized ? normalized_ : raw_).push_back(&token);
  }
  for (Set* set : {&raw_, &normalized_}) {
    std::sort(set->begin(), set->end(),
              [](const AddedToken* a, const AddedToken* b) { return a->pattern < b->pattern; });
    const auto twice = std::adjacent_find(
        set->begin(), set->end(), [](const AddedToken* a, const AddedToken* b) { return a->pattern == b->pattern; });
    if (twice != set->end()) {
      node->refuse(
          fmt::format("{} and {} are the same text", in_quotes((*twice)->content), in_quotes(twice[1]->content)));
    }
  }
}

const AddedToken* AddedTokens::longest_at_front(const Set& set, std::string_view text) {
  auto begin = set.begin(), end = set.end();  // those that begin with the first n bytes of text
  const AddedToken* longest = nullptr;
  for (std::size_t n = 0; begin != end; ++n) {
    if ((*begin)->pattern.size() == n) {
      longest = *begin++;
    }
    if (n == text.size()) {
      break;
    }
    const auto byte = static_cast<unsigned char>(text[n]);
    const auto byte_of = [n](const AddedToken* token) { return static_cast<unsigned char>(token->pattern[n]); };
    begin = std::partition_point(begin, end, [&](const AddedToken* token) { return byte_of(token) < byte; });
    end = std::partition_point(begin, end, [&](const AddedToken* token) { return byte_of(token) == byte; });
  }
  return longest;
}

bool AddedTokens::is_word_character(std::string_view character) const {
  return !word_character_.matches(character).empty();
}

std::vector<AddedTokens::Piece> AddedTokens::find(std::string_view text, bool normalized) const {
  const Set& set = normalized ? normalized_ : raw_;
  std::vector<Piece> pieces;
  std::size_t done = 0;  // text before it is in pieces
  for (std::size_t i = 0; i < text.size() && !set.empty();) {
    const AddedToken* token = longest_at_front(set, text.substr(i));
    if (token == nullptr) {
      ++i;
      continue;
    }
    std::size_t begin = i, end = i + token->pattern.size();
    i = end;
    if (token->single_word) {
      const std::string_view before = text.substr(0, begin), after = text.substr(end);
      if ((!before.empty() && is_word_character(before.substr(before.size() - last_character_size(before)))) ||
          (!after.empty() && is_word_character(after.substr(0, character_size(after))))) {
        continue;
      }
    }
    if (token->lstrip) {
      begin = std::max(before_spaces_at_end(text.substr(0, begin)), done);
    }
    if (token->rstrip) {
      end += spaces_in_front(text.substr(end));
    }
    if (done < begin) {
      pieces.push_back({{done, begin}, nullptr});
    }
    pieces.push_back({{begin, end}, token});
    done = end;
  }
  if (done < text.size()) {
    pieces.push_back({{done, text.size()}, nullptr});
  }
  return pieces;
}

const AddedToken* AddedTokens::token(std::int32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second;
}

}  // namespace kvreplay::text
