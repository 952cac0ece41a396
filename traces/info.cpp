#include "traces/info.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "traces/schema.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {
namespace {

using Json = nlohmann::ordered_json;

// JSON inside an attribute is shown as JSON where it is valid, and not nested so deeply that showing it (which the JSON
// library does by recursion) would need a stack of the text's choosing; else as the text that it is.
Json embedded(const std::string& text) {
  constexpr int kMaxDepth = 64;
  bool too_deep = false;
  const Json parsed = Json::parse(
      text,
      [&](int depth, Json::parse_event_t, Json&) {
        too_deep = too_deep || depth > kMaxDepth;
        return !too_deep;
      },
      false);
  return too_deep || parsed.is_discarded() ? Json(text) : parsed;
}

std::string queries_text(std::span<const Pos> index, Pos n_tokens) {
  if (index.empty()) {
    return "none";
  }
  if (index.size() == static_cast<std::size_t>(n_tokens)) {
    return "all";
  }
  const bool tail = index.back() == n_tokens - 1 && index.size() == static_cast<std::size_t>(n_tokens - index.front());
  return tail ? fmt::format("from token {}", index.front())
              : fmt::format("{} tokens from {} to {}", index.size(), index.front(), index.back());
}

Json describe(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  Json json;
  json["path"] = info.path.string();
  json["format"] = fmt::format("{} {}", schema::kFormat, schema::kVersion);
  json["uuid"] = info.uuid;
  json["created_utc"] = info.created_utc;
  json["generator"] = embedded(info.generator);
  json["provenance"] = info.provenance;
  json["content_hash"] = info.content_hash;
  json["complete"] = info.complete;
  Json& model = json["model"];
  model["name"] = info.model_name;
  model["architecture"] = info.architecture;
  model["n_layers"] = info.n_layers;
  model["n_heads"] = info.n_heads;
  model["n_kv_heads"] = info.n_kv_heads;
  model["group_size"] = info.group_size;
  model["head_dim"] = info.head_dim;
  model["v_head_dim"] = info.v_head_dim;
  model["attention_scale"] = info.attention_scale;
  model["logit_softcap"] = info.logit_softcap;
  model["qk_norm"] = info.qk_norm;
  model["dtype"] = info.dtype;
  model["weights_hash"] = info.weights_hash;
  model["sliding_window"] = info.sliding_window;
  if (!info.config_json.empty()) {
    model["config"] = embedded(info.config_json);
  }
  if (info.rope.present) {
    json["rope"] = {{"style", info.rope.style},
                    {"rotary_dim", info.rope.rotary_dim},
                    {"theta", info.rope.theta},
                    {"attention_factor", info.rope.attention_factor},
                    {"invertible", info.rope.invertible}};
    if (!info.rope.scaling_json.empty()) {
      json["rope"]["scaling"] = embedded(info.rope.scaling_json);
    }
  } else {
    json["rope"] = nullptr;
  }
  json["n_tokens"] = info.n_tokens;
  json["prompt_len"] = info.prompt_len;
  json["n_steps"] = info.n_tokens - info.prompt_len;
  json["element"] = name_of(info.element);
  json["pieces"] = !info.pieces.empty();
  json["logprob"] = !info.logprob.empty();
  json["spans"] = Json::array();
  for (const Span& span : info.spans) {
    json["spans"].push_back({{"name", span.name}, {"begin", span.begin}, {"end", span.end}});
  }
  std::uint64_t bytes = 0, stored = 0;
  bool chunked = false;
  json["layers"] = Json::array();
  for (const int layer : info.layers) {
    Json one = {{"layer", layer},
                {"queries", queries_text(trace.q_index(layer), info.n_tokens)},
                {"n_queries", trace.q_index(layer).size()},
                {"n_outputs", trace.out_index(layer).size()},
                {"hidden", trace.hidden(layer)},
                {"scores", trace.score_names(layer)}};
    for (const std::string& name : trace.array_names(layer)) {
      const StoredArray& array = trace.array(layer, name);
      bytes += array.n_heads() * array.n_rows() * array.row_bytes();
      stored += array.stored_bytes();
      chunked = chunked || array.chunked();
    }
    json["layers"].push_back(std::move(one));
  }
  json["profile"] = chunked ? "archive" : "working";
  json["bytes"] = bytes;
  json["stored_bytes"] = stored;
  return json;
}

}  // namespace

std::string info_json(const TraceReader& trace) {
  return describe(trace).dump(2, ' ', false, Json::error_handler_t::replace);
}

std::string info_text(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  const Json json = describe(trace);
  std::string text;
  const auto line = [&](const char* name, const std::string& value) {
    if (!value.empty()) {
      text += fmt::format("{:<17}{}\n", name, value);
    }
  };
  const std::string architecture = info.architecture.empty() ? "" : " (" + info.architecture + ")";
  line("trace", info.path.string() + (info.complete ? "" : "  (interrupted: see kvreplay recover)"));
  line("model", info.model_name + architecture);
  line("layers", fmt::format("{} of {}: {}", info.layers.size(), info.n_layers, fmt::join(info.layers, ", ")));
  line("heads", fmt::format("{} query, {} KV (group_size {}), head_dim {}{}", info.n_heads, info.n_kv_heads,
                            info.group_size, info.head_dim,
                            info.v_head_dim == info.head_dim ? "" : fmt::format(", v_head_dim {}", info.v_head_dim)));
  line("tokens",
       fmt::format("{} ({} prompt, {} decode)", info.n_tokens, info.prompt_len, info.n_tokens - info.prompt_len));
  line("elements", fmt::format("{}, {} profile, {:.1f} MB stored as {:.1f} MB", name_of(info.element),
                               json["profile"].get<std::string>(), json["bytes"].get<double>() / 1e6,
                               json["stored_bytes"].get<double>() / 1e6));
  line("attention_scale", fmt::format("{}", info.attention_scale));
  line("logit_softcap", info.logit_softcap > 0 ? fmt::format("{}", info.logit_softcap) : "");
  line("qk_norm", info.qk_norm ? "yes" : "no");
  const auto windowed =
      std::count_if(info.sliding_window.begin(), info.sliding_window.end(), [](int w) { return w > 0; });
  line("sliding_window", windowed > 0 ? fmt::format("{} of {} model layers", windowed, info.n_layers) : "none");
  line("rope", !info.rope.present
                   ? "none"
                   : fmt::format("{}, {} of {} channels, theta {}{}", info.rope.style, info.rope.rotary_dim,
                                 info.head_dim, info.rope.theta, info.rope.invertible ? "" : ", not invertible"));
  const int first = info.layers.front();
  line("queries", queries_text(trace.q_index(first), info.n_tokens));
  line("outputs", trace.has_out(first) ? fmt::format("at {} tokens", trace.out_index(first).size()) : "none");
  line("w_o", trace.has_w_o(first) ? fmt::format("yes, hidden {}", trace.hidden(first)) : "no");
  line("scores", fmt::format("{}", fmt::join(trace.score_names(first), ", ")));
  for (const Span& span : info.spans) {
    line("span", fmt::format("{} [{}, {})", span.name, span.begin, span.end));
  }
  line("provenance", info.provenance);
  line("generator", info.generator);
  line("created", info.created_utc);
  line("uuid", info.uuid);
  line("content_hash", info.content_hash.empty() ? "none" : info.content_hash);
  // Names are what the file's writer put there, and a terminal obeys them.
  std::replace_if(
      text.begin(), text.end(), [](char c) { return (c >= 0 && c < ' ' && c != '\n') || c == '\x7f'; }, '?');
  return text;
}

}  // namespace kvreplay
