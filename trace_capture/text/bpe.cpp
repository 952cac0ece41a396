#include "trace_capture/text/bpe.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <queue>

#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

// An optional text that must be absent or empty.
void refuse_affix(const Node& node, const char* key) {
  if (const std::optional<Node> affix = node.find(key)) {
    if (!affix->text().empty()) {
      affix->refuse(fmt::format("{} is not supported (only none is)", in_quotes(affix->text())));
    }
  }
}

}  // namespace

Bpe::Bpe(const Node& node) {
  if (const std::optional<Node> type = node.find("type")) {
    if (type->text() != "BPE") {
      type->refuse(fmt::format("{} is not supported (BPE is)", in_quotes(type->text())));
    }
  }
  node.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
             "byte_fallback", "ignore_merges", "vocab", "merges"});
  if (const std::optional<Node> dropout = node.find("dropout")) {
    if (!dropout->json().is_number() || dropout->json().get<double>() != 0) {
      dropout->refuse(fmt::format("{} is not supported (0 is)", in_quotes(dropout->json().dump())));
    }
  }
  refuse_affix(node, "continuing_subword_prefix");
  refuse_affix(node, "end_of_word_suffix");
  fuse_unknown_ = node.flag("fuse_unk", false);
  byte_fallback_ = node.flag("byte_fallback", false);
  ignore_merges_ = node.flag("ignore_merges", false);

  read_vocab(node.at("vocab"));
  read_merges(node.at("merges"));
  if (const std::optional<Node> unknown = node.find("unk_token")) {
    unknown_ = id(unknown->text());
    if (!unknown_) {
      unknown->refuse(fmt::format("{} is not in the vocabulary", in_quotes(unknown->text())));
    }
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    byte_ids_[byte] = id(fmt::format("<0x{:02X}>", byte)).value_or(-1);
  }
}

void Bpe::read_vocab(const Node& vocab) {
  if (!vocab.json().is_object() || vocab.json().empty()) {
    vocab.refuse("must be an object of tokens and their ids");
  }
  ids_.reserve(vocab.json().size());
  for (const auto& [token, value] : vocab.json().items()) {
    if (!is_id(value)) {
      Node(value, vocab.file(), vocab.inside(in_quotes(token))).id();  // refuses it
    }
    const auto id = value.get<std::int32_t>();
    const auto index = static_cast<std::size_t>(id);
    if (index >= tokens_.size()) {
      tokens_.resize(index + 1, nullptr);
    }
    if (tokens_[index] != nullptr) {
      vocab.refuse(fmt::format("{} and {} have the same id {}", in_quotes(*tokens_[index]), in_quotes(token), id));
    }
    tokens_[index] = &ids_.emplace(token, id).first->first;
  }
}

void Bpe::read_merges(const Node& merges) {
  const nlohmann::json& list = merges.json();
  if (!list.is_array()) {
    merges.refuse(fmt::format("must be a list, found {}", list.type_name()));
  }
  merges_.reserve(list.size());
  std::uint32_t rank = 0;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto place = [&] { return Node(list[i], merges.file(), fmt::format("{}[{}]", merges.place(), i)); };
    std::string left, right;
    if (list[i].is_string()) {  // "a b"; older files begin with a version
      const std::string& line = list[i].get_ref<const std::string&>();
      if (line.starts_with("#version")) {
        continue;
      }
      const std::size_t space = line.find(' ');
      if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
        place().refuse(fmt::format("must be two tokens with a space between them, found {}", in_quotes(line)));
      }
      left = line.substr(0, space);
      right = line.substr(space + 1);
    } else if (list[i].is_array() && list[i].size() == 2 && list[i][0].is_string() && list[i][1].is_string()) {
      left = list[i][0].get<std::string>();
      right = list[i][1].get<std::string>();
    } else {
      place().refuse("must be two tokens");
    }
    const auto required = [&](const std::string& token) {
      const std::optional<std::int32_t> found = id(token);
      if (!found) {
        place().refuse(fmt::format("{} is not in the vocabulary", in_quotes(token)));
      }
      return *found;
    };
    const std::int32_t left_id = required(left), right_id = required(right);
    merges_[pair_key(left_id, right_id)] = {rank++, required(left + right)};
  }
}

std::optional<std::int32_t> Bpe::id(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? std::nullopt : std::optional(found->second);
}

const std::string* Bpe::token(std::int32_t id) const {
  return id >= 0 && id <= largest_id() ? tokens_[static_cast<std::size_t>(id)] : nullptr;
}

const Bpe::Merge* Bpe::find_merge(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    if (const std::optional<std::int32_t> whole = id(word)) {
      ids.push_back(*whole);
      return;
    }
  }
  std::vector<Symbol> symbols = characters(word);
  merge(symbols);
  for (const Symbol& symbol : symbols) {
    if (!symbol.merged) {
      ids.push_back(symbol.id);
    }
  }
}

// A character without a token becomes its bytes, where they all have one, else the unknown token; without an unknown
// token it is dropped. As in Hugging Face's tokenizers an unknown character waits until the next known one, so that it
// comes behind bytes between them.
std::vector<Bpe::Symbol> Bpe::characters(std::string_view word) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  const auto push = [&symbols](std::int32_t id) {
    const auto at = static_cast<std::int32_t>(symbols.size());
    if (at > 0) {
      symbols.back().after = at;
    }
    symbols.push_back({id, at - 1, -1, false});
  };
  bool waiting = false;
  while (!word.empty()) {
    const std::string_view character = word.substr(0, character_size(word));
    word.remove_prefix(character.size());
    if (const std::optional<std::int32_t> known = id(character)) {
      if (waiting) {
        push(*unknown_);
        waiting = false;
      }
      push(*known);
      continue;
    }
    const auto byte_id = [this](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
    if (byte_fallback_ &&
        std::all_of(character.begin(), character.end(), [&](char byte) { return byte_id(byte) >= 0; })) {
      for (const char byte : character) {
        push(byte_id(byte));
      }
    } else if (unknown_) {
      if (waiting && !fuse_unknown_) {
        push(*unknown_);
      }
      waiting = true;
    }
  }
  if (waiting) {
    push(*unknown_);
  }
  return symbols;
}

// The pair of lowest rank is merged first, the leftmost of equal ones; a heap holds the candidates. A candidate whose
// symbols have changed since is dropped when its turn comes, unless the new pair makes the same token.
void Bpe::merge(std::vector<Symbol>& symbols) const {
  struct Candidate {
    std::uint32_t rank;
    std::int32_t left, id;
    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
  };
  std::vector<Candidate> heap;
  heap.reserve(symbols.size());
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates(std::greater<>(), std::move(heap));
  const auto at = [&symbols](std::int32_t i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };
  const auto consider = [&](std::int32_t left) {
    if (left >= 0 && at(left).after >= 0) {
      if (const Merge* found = find_merge(at(left).id, at(at(left).after).id)) {
        candidates.push({found->rank, left, found->id});
      }
    }
  };
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(symbols.size()); ++i) {
    consider(i);
  }
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = at(best.left);
    if (left.merged || left.after < 0) {
      continue;
    }
    Symbol& right = at(left.after);
    const Merge* current = find_merge(left.id, right.id);
    if (current == nullptr || current->id != best.id) {
      continue;
    }
    left.id = best.id;
    left.after = right.after;
    right.merged = true;
    if (left.after >= 0) {
      at(left.after).before = best.left;
    }
    consider(left.before);
    consider(best.left);
  }
}

}  // namespace kvreplay::text
