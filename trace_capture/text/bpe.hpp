// Byte-pair encoding (Sennrich et al., arXiv:1508.07909) of one word: the `model` of tokenizer.json.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "trace_capture/text/node.hpp"

namespace kvreplay::text {

class Bpe {
 public:
  explicit Bpe(const Node& node);

  // Appends the ids of a word: well-formed UTF-8. Time O(n log n) in its length.
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;

  std::optional<std::int32_t> id(std::string_view token) const;
  const std::string* token(std::int32_t id) const;  // nullptr: no token has this id
  std::int32_t n_tokens() const { return static_cast<std::int32_t>(ids_.size()); }
  std::int32_t largest_id() const { return static_cast<std::int32_t>(tokens_.size()) - 1; }

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  struct Merge {
    std::uint32_t rank;
    std::int32_t id;
  };
  struct Symbol {
    std::int32_t id;
    std::int32_t before, after;  // indices of the neighbours, -1 = none
    bool merged;                 // into the one before
  };

  void read_vocab(const Node& vocab);
  void read_merges(const Node& merges);
  const Merge* find_merge(std::int32_t left, std::int32_t right) const;
  std::vector<Symbol> characters(std::string_view word) const;
  void merge(std::vector<Symbol>& symbols) const;

  std::unordered_map<std::string, std::int32_t, Hash, std::equal_to<>> ids_;
  std::vector<const std::string*> tokens_;           // (largest id + 1), keys of ids_; nullptr where there is none
  std::unordered_map<std::uint64_t, Merge> merges_;  // by (left id, right id)
  std::array<std::int32_t, 256> byte_ids_;           // of "<0x00>" and so on, -1 = none
  std::optional<std::int32_t> unknown_;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

}  // namespace kvreplay::text
