#include "trace_capture/job.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "trace_capture/json.hpp"

namespace kvreplay {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxFile = std::uint64_t{1} << 30;

[[noreturn]] void refuse(const std::string& where, const std::string& sentence) {
  throw ConfigError(where + ": " + sentence);
}

// `line`: of the text's first character.
json parse(std::string_view text, const std::string& file, std::size_t line) {
  try {
    return json::parse(text, depth_and_names(fmt::format("{}:{}", file, line), Names::unique));
  } catch (const json::parse_error& error) {
    const std::size_t at = std::min(error.byte > 0 ? error.byte - 1 : 0, text.size());
    const auto newlines = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n');
    refuse(fmt::format("{}:{}", file, line + static_cast<std::size_t>(newlines)),
           at >= text.size() ? "the JSON ends too early" : fmt::format("no JSON at {}", shown(text.substr(at, 20))));
  } catch (const json::exception& error) {
    refuse(fmt::format("{}:{}", file, line), "a number in it is too large");
  }
}

std::vector<std::int32_t> ids_of(const json& value, const std::string& where, const char* key) {
  if (!value.is_array()) {
    refuse(where, fmt::format("{} must be a list of token ids, found {}", key, shown(value)));
  }
  std::vector<std::int32_t> ids;
  ids.reserve(value.size());
  for (const json& id : value) {
    const bool whole = id.is_number_integer() && (!id.is_number_unsigned() || id.get<std::uint64_t>() <= 0x7fffffffU);
    if (!whole || id.get<std::int64_t>() < 0) {
      refuse(where,
             fmt::format("{}[{}] must be a token id (a whole number from 0), found {}", key, ids.size(), shown(id)));
    }
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

Pos bound_of(const json& value, const std::string& where, const std::string& name) {
  if (!value.is_number_integer() || value.is_number_float() || value < 0 || value > std::numeric_limits<Pos>::max()) {
    refuse(where,
           fmt::format("span '{}' must begin and end at tokens (whole numbers from 0), found {}", name, shown(value)));
  }
  return value.get<Pos>();
}

std::vector<Span> spans_of(const json& value, const std::string& where) {
  std::vector<Span> spans;
  const auto add = [&](const std::string& name, const json& begin, const json& end) {
    if (name.empty()) {
      refuse(where, "a span has an empty name");
    }
    if (std::any_of(spans.begin(), spans.end(), [&](const Span& other) { return other.name == name; })) {
      refuse(where, fmt::format("span '{}' is there twice", name));
    }
    spans.push_back({name, bound_of(begin, where, name), bound_of(end, where, name)});
  };
  const std::string expected = R"(spans must be {"NAME": [begin, end]} or [{"name": ..., "begin": ..., "end": ...}])";
  if (value.is_object()) {
    for (const auto& [name, range] : value.items()) {
      if (!range.is_array() || range.size() != 2) {
        refuse(where, fmt::format("{}, found {}", expected, shown(range)));
      }
      add(name, range[0], range[1]);
    }
  } else if (value.is_array()) {
    for (const json& span : value) {
      if (!span.is_object() || span.size() != 3 || !span.contains("name") || !span["name"].is_string() ||
          !span.contains("begin") || !span.contains("end")) {
        refuse(where, fmt::format("{}, found {}", expected, shown(span)));
      }
      add(span["name"].get<std::string>(), span["begin"], span["end"]);
    }
  } else {
    refuse(where, fmt::format("{}, found {}", expected, shown(value)));
  }
  return spans;
}

// Such a name becomes the name of a file.
std::string name_of_trace(const json& value, const std::string& where) {
  const std::string name = value.is_string() ? value.get<std::string>() : std::string();
  const bool good = !name.empty() && name.size() <= 200 && name[0] != '.' &&
                    std::none_of(name.begin(), name.end(),
                                 [](char c) { return c == '/' || c == '\\' || static_cast<unsigned char>(c) < ' '; });
  if (!good) {
    refuse(where, fmt::format("name must be the name of a file without its folder and ending, found {}", shown(value)));
  }
  return name;
}

// The members that both kinds of objects have, after an unknown one was refused.
void read_members(const json& object, const std::string& where, const std::vector<std::string>& known, Prompt& prompt) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      refuse(where, fmt::format("{} is unknown; the nearest of {} is '{}'", shown(std::string_view(key)),
                                fmt::join(known, ", "), nearest(key, known)));
    }
  }
  if (object.contains("decode")) {
    prompt.decode = ids_of(object["decode"], where, "decode");
  }
  if (object.contains("spans")) {
    prompt.spans = spans_of(object["spans"], where);
  }
  if (object.contains("name")) {
    prompt.name = name_of_trace(object["name"], where);
  }
}

void check_ids(const std::vector<std::int32_t>& ids, const std::string& where, const char* key, int vocab) {
  const auto bad = std::find_if(ids.begin(), ids.end(), [&](std::int32_t id) { return id < 0 || id >= vocab; });
  if (bad != ids.end()) {
    refuse(where, fmt::format("{}[{}] is {}, but the model's vocabulary has the ids 0 to {}", key, bad - ids.begin(),
                              *bad, vocab - 1));
  }
}

}  // namespace

Prompt read_tokens(const std::filesystem::path& path) {
  const json value = parse(read_text(path, kMaxFile), path.string(), 1);
  Prompt prompt;
  prompt.where = path.string();
  if (value.is_array()) {
    prompt.ids = ids_of(value, prompt.where, "the list");
    return prompt;
  }
  if (!value.is_object() || !value.contains("prompt")) {
    refuse(prompt.where,
           fmt::format(R"(a list of token ids or {{"prompt": [ids], "decode": [ids]}} is expected, found {})",
                       shown(value)));
  }
  read_members(value, prompt.where, {"prompt", "decode", "spans", "name"}, prompt);
  prompt.ids = ids_of(value["prompt"], prompt.where, "prompt");
  return prompt;
}

std::vector<Prompt> read_prompts(const std::filesystem::path& path) {
  const std::string text = read_text(path, kMaxFile);
  std::vector<Prompt> prompts;
  std::map<std::string, std::string> names;  // of traces, and where each is
  std::size_t line = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view row = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++line;
    if (row.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    Prompt prompt;
    prompt.where = fmt::format("{}:{}", path.string(), line);
    const json value = parse(row, path.string(), line);
    if (!value.is_object() || value.contains("prompt") == value.contains("tokens")) {
      refuse(prompt.where,
             fmt::format("an object with either prompt (text) or tokens (ids) is expected, found {}", shown(value)));
    }
    read_members(value, prompt.where, {"prompt", "tokens", "decode", "spans", "name"}, prompt);
    if (value.contains("tokens")) {
      prompt.ids = ids_of(value["tokens"], prompt.where, "tokens");
    } else if (value["prompt"].is_string()) {
      prompt.text = value["prompt"].get<std::string>();
    } else {
      refuse(prompt.where,
             fmt::format("prompt must be text, found {}; token ids are given as tokens", shown(value["prompt"])));
    }
    if (prompt.name.empty()) {
      prompt.name = fmt::format("prompt-{:04}", line);
    }
    const auto [other, is_new] = names.emplace(prompt.name, prompt.where);
    if (!is_new) {
      refuse(prompt.where, fmt::format("the trace '{}' would replace that of {}; give each a name of its own",
                                       prompt.name, other->second));
    }
    prompts.push_back(std::move(prompt));
  }
  if (prompts.empty()) {
    refuse(path.string(), "there is no prompt in it; one JSON object per line is expected");
  }
  return prompts;
}

std::vector<Span> read_spans(const std::filesystem::path& path) {
  return spans_of(parse(read_text(path, kMaxFile), path.string(), 1), path.string());
}

std::string read_prompt_text(const std::filesystem::path& path) { return read_text(path, kMaxFile); }

Pos context_of(const ModelConfig& config) {
  double context = config.max_positions;
  const RopeConfig& rope = config.rope;
  // These types stretch what the model was trained with by their factor, and configurations often leave
  // max_position_embeddings at the value from before.
  if (rope.type == "linear" || rope.type == "dynamic" || rope.type == "yarn") {
    context = std::max(
        context, rope.factor * (rope.original_max_positions > 0 ? rope.original_max_positions : config.max_positions));
  }
  return static_cast<Pos>(std::min<double>(context, std::numeric_limits<Pos>::max()));
}

Sequence sequence_of(const Prompt& prompt, const ModelConfig& config, const Tokenizer* tokenizer,
                     const SequenceLimits& limits) {
  Sequence sequence;
  sequence.where = prompt.where;
  sequence.name = prompt.name;
  sequence.spans = prompt.spans;
  if (prompt.text) {
    KVREPLAY_CHECK(tokenizer != nullptr);
    try {
      sequence.prompt = tokenizer->encode(*prompt.text);
    } catch (const ConfigError& error) {
      refuse(prompt.where, error.what());
    }
  } else {
    sequence.prompt = prompt.ids;
  }
  const Pos context = context_of(config);
  if (sequence.prompt.empty()) {
    refuse(prompt.where, "the prompt is empty; it needs at least one token");
  }
  if (sequence.prompt.size() > static_cast<std::size_t>(context)) {
    refuse(prompt.where, fmt::format("the prompt has {} tokens, but the context of {} is {}", sequence.prompt.size(),
                                     config.name, context));
  }
  check_ids(sequence.prompt, prompt.where, prompt.text ? "the encoded prompt" : "the prompt", config.vocab);

  if (limits.teacher_forced != prompt.decode.has_value()) {
    refuse(prompt.where,
           limits.teacher_forced
               ? R"(--teacher-forced needs the tokens of the decode phase: {"prompt": [ids], "decode": [ids]})"
               : "there are decode tokens; add --teacher-forced to pass them, or leave them out");
  }
  if (prompt.decode) {
    sequence.decode = *prompt.decode;
    check_ids(sequence.decode, prompt.where, "decode", config.vocab);
    const Pos most = static_cast<Pos>(std::min<std::size_t>(sequence.decode.size(), std::numeric_limits<Pos>::max()));
    sequence.n_new = limits.max_new_tokens.value_or(most);
    if (sequence.n_new > most) {
      refuse(prompt.where, fmt::format("--max-new-tokens {} is more than the {} decode tokens that are given",
                                       sequence.n_new, sequence.decode.size()));
    }
    sequence.decode.resize(static_cast<std::size_t>(sequence.n_new));
  } else if (limits.max_new_tokens) {
    sequence.n_new = *limits.max_new_tokens;
  } else {
    throw ConfigError("--max-new-tokens is missing: how many tokens to decode after the prompt");
  }
  if (sequence.n_new > context - sequence.prompt_len()) {
    refuse(prompt.where, fmt::format("a prompt of {} tokens and {} new ones make {}, but the context of {} is {}",
                                     sequence.prompt_len(), sequence.n_new,
                                     std::int64_t{sequence.prompt_len()} + sequence.n_new, config.name, context));
  }
  for (const Span& span : sequence.spans) {
    if (span.begin >= span.end || span.end > sequence.n_tokens()) {
      refuse(prompt.where, fmt::format("span '{}' is [{}, {}), but it must begin before its end, and the sequence has "
                                       "{} tokens",
                                       span.name, span.begin, span.end, sequence.n_tokens()));
    }
  }
  return sequence;
}

}  // namespace kvreplay
