#include "trace_capture/tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "trace_capture/json.hpp"
#include "trace_capture/text/added_tokens.hpp"
#include "trace_capture/text/bpe.hpp"
#include "trace_capture/text/decode.hpp"
#include "trace_capture/text/node.hpp"
#include "trace_capture/text/normalize.hpp"
#include "trace_capture/text/pretokenize.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay {
namespace {

using text::Node;

nlohmann::json read_json(const std::filesystem::path& path) {
  constexpr std::uint64_t kLargest = std::uint64_t{256} << 20;  // the largest public ones have 40 MB
  try {
    return parse_object(read_text(path, kLargest), path.string());
  } catch (const ConfigError& error) {
    throw ConfigError(fmt::format("{}; pass token ids with --tokens instead", error.what()));
  }
}

// What the post-processor puts around the ids of a text.
struct Template {
  std::vector<std::int32_t> front, back;
};

void read_single(const Node& node, Template& ids) {
  node.only({"type", "single", "pair", "special_tokens"});
  std::vector<std::int32_t> front, back;
  bool text_seen = false;
  for (const Node& piece : node.at("single").items()) {
    piece.only({"Sequence", "SpecialToken"});
    if (const std::optional<Node> sequence = piece.find("Sequence")) {
      if (text_seen || sequence->at("id").text() != "A") {
        piece.refuse("the template must have the sequence A once and no other");
      }
      text_seen = true;
      continue;
    }
    const std::string name = piece.at("SpecialToken").at("id").text();
    const std::optional<Node> special = node.at("special_tokens").find(name.c_str());
    if (!special) {
      piece.refuse(fmt::format("{} is not among its special_tokens", text::in_quotes(name)));
    }
    for (const Node& id : special->at("ids").items()) {
      (text_seen ? back : front).push_back(id.id());
    }
  }
  if (!text_seen) {
    node.refuse("the template must have the sequence A once");
  }
  ids.front.insert(ids.front.begin(), front.begin(), front.end());
  ids.back.insert(ids.back.end(), back.begin(), back.end());
}

void read_template(const Node& node, Template& ids) {
  const std::string type = node.type();
  if (type == "Sequence") {
    node.only({"type", "processors"});
    for (const Node& step : node.at("processors").items()) {
      read_template(step, ids);
    }
  } else if (type == "TemplateProcessing") {
    read_single(node, ids);
  } else if (type != "ByteLevel") {  // which touches offsets into the text only
    node.refuse(
        fmt::format("type {} is not supported (Sequence, TemplateProcessing, ByteLevel are)", text::in_quotes(type)));
  }
}

}  // namespace

struct Tokenizer::State {
  explicit State(const Node& file)
      : normalizer(file.find("normalizer")),
        pre_tokenizer(file.find("pre_tokenizer")),
        bpe(file.at("model")),
        added(file.find("added_tokens"), bpe, normalizer),
        decoder(file.find("decoder")) {
    if (const std::optional<Node> version = file.find("version")) {
      if (version->text() != "1.0") {
        version->refuse(fmt::format("{} is not supported (\"1.0\" is)", text::in_quotes(version->text())));
      }
    }
    if (const std::optional<Node> node = file.find("post_processor")) {
      read_template(*node, around);
      for (const auto* ids : {&around.front, &around.back}) {
        for (const std::int32_t id : *ids) {
          if (token(id) == nullptr) {
            node->refuse(fmt::format("no token has the id {}", id));
          }
        }
      }
    }
  }

  // What the decoder is given; nullptr: no such id.
  const std::string* token(std::int32_t id) const {
    const text::AddedToken* found = added.token(id);
    return found != nullptr ? &found->pattern : bpe.token(id);
  }

  text::Normalizer normalizer;
  text::PreTokenizer pre_tokenizer;
  text::Bpe bpe;
  text::AddedTokens added;
  text::TokenDecoder decoder;
  Template around;
};

Tokenizer::Tokenizer(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer.json";
  const nlohmann::json json = read_json(path);
  state_ = std::make_unique<State>(Node(json, path.string(), ""));
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  constexpr std::size_t kLongest = std::size_t{1} << 30;  // characters are counted in 32 bits
  if (text.size() > kLongest) {
    throw ConfigError(fmt::format("the text has {} bytes, at most {} are allowed", text.size(), kLongest));
  }
  if (const std::size_t valid = text::valid_until(text); valid < text.size()) {
    throw ConfigError(
        fmt::format("the text is not UTF-8 at byte {} (0x{:02X}); save it as UTF-8, or pass token ids with --tokens",
                    valid, static_cast<unsigned>(static_cast<unsigned char>(text[valid]))));
  }
  std::vector<std::int32_t> ids;
  if (add_special) {
    ids = state_->around.front;
  }
  for (const auto& raw : state_->added.find(text, false)) {
    if (raw.token != nullptr) {
      ids.push_back(raw.token->id);
      continue;
    }
    const std::string normalized = state_->normalizer(text.substr(raw.range.begin, raw.range.end - raw.range.begin));
    for (const auto& piece : state_->added.find(normalized, true)) {
      if (piece.token != nullptr) {
        ids.push_back(piece.token->id);
        continue;
      }
      state_->pre_tokenizer.split(
          std::string_view(normalized).substr(piece.range.begin, piece.range.end - piece.range.begin),
          raw.range.begin + piece.range.begin == 0, [&](std::string_view word) { state_->bpe.encode(word, ids); });
    }
  }
  if (add_special) {
    ids.insert(ids.end(), state_->around.back.begin(), state_->around.back.end());
  }
  return ids;
}

std::string Tokenizer::piece(std::int32_t id) const {
  const text::AddedToken* added = state_->added.token(id);
  const std::string* token = added != nullptr ? &added->content : state_->bpe.token(id);
  if (token == nullptr) {
    return "";
  }
  const std::string bytes = added != nullptr ? *token : state_->decoder.bytes(*token);
  std::string shown;
  for (std::string_view rest = bytes; !rest.empty();) {
    const std::size_t size = text::character_size(rest);
    if (size > 0 && rest[0] != '\0') {
      shown += rest.substr(0, size);
      rest.remove_prefix(size);
    } else {
      shown += fmt::format("<0x{:02X}>", static_cast<unsigned>(static_cast<unsigned char>(rest[0])));
      rest.remove_prefix(1);
    }
  }
  return shown;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const std::int32_t id : ids) {
    if (const std::string* token = state_->token(id)) {
      tokens.push_back(*token);
    }
  }
  return state_->decoder.join(std::move(tokens));
}

std::int32_t Tokenizer::vocab_size() const {
  return std::max(state_->bpe.largest_id(), state_->added.largest_id()) + 1;
}

}  // namespace kvreplay
