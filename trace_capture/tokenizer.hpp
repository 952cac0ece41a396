// Text to token ids and back, from a Hugging Face tokenizer.json: byte-level BPE of the Llama-3 and Qwen2/Qwen3 kind,
// and SentencePiece-style BPE with byte fallback of the Llama-2 and Mistral kind. Anything else is refused.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay {

class Tokenizer {
 public:
  // Reads folder/tokenizer.json. Throws ConfigError naming what is not supported, and how to pass ids instead.
  explicit Tokenizer(const std::filesystem::path& folder);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // As `tokenizers` encodes: added and special tokens in the text are recognised; add_special also applies the
  // post-processor's template (a BOS in front). Throws ConfigError for text that is not UTF-8, naming the byte.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special = true) const;
  // One token's text, for /tokens/piece: UTF-8; bytes that are no whole character appear as <0xNN>.
  std::string piece(std::int32_t id) const;
  std::string decode(std::span<const std::int32_t> ids) const;  // special tokens included, invalid UTF-8 as U+FFFD
  std::int32_t vocab_size() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay
