// What is to be decoded: prompts as ids or text, the tokens that follow them where these are given, and named ranges.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "trace_capture/config.hpp"
#include "trace_capture/tokenizer.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

// A prompt as the user gave it.
struct Prompt {
  std::string where;                                // for errors: "prompts.jsonl:3"
  std::string name;                                 // of its trace, where there are many
  std::optional<std::string> text;                  // without it there are ids
  std::vector<std::int32_t> ids;                    //
  std::optional<std::vector<std::int32_t>> decode;  // the tokens of the decode phase, to be passed as they are
  std::vector<Span> spans;
};

// All three throw ConfigError naming file, line and what is expected.
// A list of ids, or an object with `prompt`, and `decode`, `spans` or `name` where wanted.
Prompt read_tokens(const std::filesystem::path& path);
// One object per line: `prompt` (text) or `tokens` (ids), and `decode`, `spans` or `name` where wanted. Names default
// to prompt-0001 and so on, by line; two traces of one name are refused. Empty lines are passed over.
std::vector<Prompt> read_prompts(const std::filesystem::path& path);
// {"NAME": [begin, end], ...} or [{"name": ..., "begin": ..., "end": ...}, ...]
std::vector<Span> read_spans(const std::filesystem::path& path);
std::string read_prompt_text(const std::filesystem::path& path);

// A prompt as the model will see it, checked.
struct Sequence {
  std::string where, name;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> decode;  // (n_new) where they are given, else empty
  Pos n_new = 0;                     // tokens after the prompt, at most
  std::vector<Span> spans;

  Pos prompt_len() const { return static_cast<Pos>(prompt.size()); }
  Pos n_tokens() const { return prompt_len() + n_new; }
};

struct SequenceLimits {
  std::optional<Pos> max_new_tokens;  // required unless teacher_forced, which then passes all given tokens
  bool teacher_forced = false;
};

// Tokens that the model can take: its max_position_embeddings, more where its RoPE scaling stretches that.
Pos context_of(const ModelConfig& config);

// `tokenizer` may be nullptr where all prompts are ids. Throws ConfigError: an empty prompt, an id outside the
// vocabulary, a sequence longer than the context, a span outside it, decode tokens missing or in excess.
Sequence sequence_of(const Prompt& prompt, const ModelConfig& config, const Tokenizer* tokenizer,
                     const SequenceLimits& limits);

}  // namespace kvreplay
