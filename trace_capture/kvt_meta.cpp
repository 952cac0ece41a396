#include "trace_capture/kvt_meta.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "trace_capture/json.hpp"
#include "traces/schema.hpp"

namespace kvreplay {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
constexpr std::size_t kMaxTextBytes = std::size_t{16} << 20;

[[noreturn]] void refuse(const std::string& sentence) { throw ConfigError("meta_json: " + sentence); }

void check_text(const std::string& text, const std::string& name) {
  if (text.find('\0') != std::string::npos) {
    refuse(name + " holds a zero byte, which no text in a trace may have");
  }
  if (text.size() > kMaxTextBytes) {
    refuse(fmt::format("{} has {} bytes, but at most {} are allowed", name, text.size(), kMaxTextBytes));
  }
}

// One JSON object whose keys are all known. Every getter names the key and what is allowed.
class Fields {
 public:
  Fields(const Json& json, std::string where, const std::vector<std::string>& known)
      : json_(json), where_(std::move(where)) {
    if (!json_.is_object()) {
      refuse(fmt::format("{} is {}, but must be an object", where_.empty() ? "the description" : where_, shown(json_)));
    }
    for (const auto& item : json_.items()) {
      if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
        refuse(fmt::format("unknown key {}; the nearest is {}, and allowed are {}",
                           name_of_key(shown(Json(item.key()))), nearest(item.key(), known), fmt::join(known, ", ")));
      }
    }
  }

  // nullptr where it is missing; null counts as missing.
  const Json* find(const char* key) const {
    const auto at = json_.find(key);
    return at == json_.end() || at->is_null() ? nullptr : &*at;
  }

  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high,
                       std::optional<std::int64_t> otherwise = {}) const {
    const std::string allowed = fmt::format("an integer from {} to {}", low, high);
    const Json* value = get(key, allowed, otherwise.has_value());
    if (value == nullptr) {
      return *otherwise;
    }
    return to_integer(*value, name(key), allowed, low, high);
  }

  std::vector<std::int64_t> integers(const char* key, std::int64_t low, std::int64_t high) const {
    std::vector<std::int64_t> values;
    if (const Json* list = array(key)) {
      const std::string allowed = fmt::format("an integer from {} to {}", low, high);
      for (const Json& value : *list) {
        values.push_back(to_integer(value, fmt::format("{}[{}]", name(key), values.size()), allowed, low, high));
      }
    }
    return values;
  }

  double real(const char* key, const char* allowed, bool (*holds)(double), std::optional<double> otherwise = {}) const {
    const Json* value = get(key, allowed, otherwise.has_value());
    return value == nullptr ? *otherwise : to_real(*value, name(key), allowed, holds);
  }

  std::vector<double> reals(const char* key, const char* allowed, bool (*holds)(double)) const {
    std::vector<double> values;
    if (const Json* list = array(key)) {
      for (const Json& value : *list) {
        values.push_back(to_real(value, fmt::format("{}[{}]", name(key), values.size()), allowed, holds));
      }
    }
    return values;
  }

  bool flag(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_boolean()) {
      refuse(fmt::format("{} is {}, but must be true or false", name(key), shown(*value)));
    }
    return value == nullptr ? otherwise : value->get<bool>();
  }

  std::string text(const char* key, std::optional<std::string> otherwise = {}) const {
    const Json* value = get(key, "text", otherwise.has_value());
    if (value == nullptr) {
      return *otherwise;
    }
    if (!value->is_string()) {
      refuse(fmt::format("{} is {}, but must be text", name(key), shown(*value)));
    }
    std::string text = value->get<std::string>();
    check_text(text, name(key));
    return text;
  }

  // Text, or an object that is stored as the JSON it is.
  std::string document(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || value->is_string()) {
      return text(key, "");
    }
    if (!value->is_object()) {
      refuse(fmt::format("{} is {}, but must be text or an object", name(key), shown(*value)));
    }
    std::string text = value->dump();
    check_text(text, name(key));
    return text;
  }

  // nullptr where it is missing.
  const Json* array(const char* key) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_array()) {
      refuse(fmt::format("{} is {}, but must be a list", name(key), shown(*value)));
    }
    return value;
  }

  std::string name(const char* key) const { return name_of_key(key); }

 private:
  std::string name_of_key(const std::string& key) const { return where_.empty() ? key : where_ + "." + key; }

  const Json* get(const char* key, const std::string& allowed, bool optional) const {
    const Json* value = find(key);
    if (value == nullptr && !optional) {
      refuse(fmt::format("{} is missing; it is {}", name(key), allowed));
    }
    return value;
  }

  static std::int64_t to_integer(const Json& value, const std::string& name, const std::string& allowed,
                                 std::int64_t low, std::int64_t high) {
    const bool huge = value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{INT64_MAX};
    if (!value.is_number_integer() || huge || value.get<std::int64_t>() < low || value.get<std::int64_t>() > high) {
      refuse(fmt::format("{} is {}, but must be {}", name, shown(value), allowed));
    }
    return value.get<std::int64_t>();
  }

  static double to_real(const Json& value, const std::string& name, const char* allowed, bool (*holds)(double)) {
    if (!value.is_number() || !std::isfinite(value.get<double>()) || !holds(value.get<double>())) {
      refuse(fmt::format("{} is {}, but must be {}", name, shown(value), allowed));
    }
    return value.get<double>();
  }

  const Json& json_;
  std::string where_;
};

bool positive(double value) { return value > 0; }
bool not_negative(double value) { return value >= 0; }

void read_model(const Json& json, TraceInfo& info) {
  const Fields model(
      json, "model",
      {"name", "architecture", "n_layers", "n_heads", "n_kv_heads", "head_dim", "v_head_dim", "attention_scale",
       "qk_norm", "logit_softcap", "sliding_window", "dtype", "config_json", "weights_hash"});
  info.model_name = model.text("name");
  info.architecture = model.text("architecture", "");
  info.n_layers = static_cast<int>(model.integer("n_layers", 1, schema::kMaxLayers));
  info.n_heads = static_cast<int>(model.integer("n_heads", 1, schema::kMaxHeads));
  info.n_kv_heads = static_cast<int>(model.integer("n_kv_heads", 1, info.n_heads));
  if (info.n_heads % info.n_kv_heads != 0) {
    refuse(fmt::format("model.n_kv_heads is {}, but must divide n_heads = {}", info.n_kv_heads, info.n_heads));
  }
  info.group_size = info.n_heads / info.n_kv_heads;
  info.head_dim = static_cast<int>(model.integer("head_dim", 1, schema::kMaxHeadDim));
  info.v_head_dim = static_cast<int>(model.integer("v_head_dim", 1, schema::kMaxHeadDim, info.head_dim));
  info.attention_scale = model.real("attention_scale", "a positive number, as in logits = scale * q.k", positive);
  info.logit_softcap = model.real("logit_softcap", "0 (none) or a positive number", not_negative, 0.0);
  info.qk_norm = model.flag("qk_norm", false);
  info.dtype = model.text("dtype", "");
  info.config_json = model.document("config_json");
  info.weights_hash = model.text("weights_hash", "");

  const Json* windows = model.find("sliding_window");
  if (windows != nullptr && !windows->is_array()) {  // one for all layers
    info.sliding_window.assign(static_cast<std::size_t>(info.n_layers),
                               static_cast<int>(model.integer("sliding_window", 0, kInt32Max)));
  } else {
    for (const std::int64_t window : model.integers("sliding_window", 0, kInt32Max)) {
      info.sliding_window.push_back(static_cast<int>(window));
    }
    const auto n_layers = static_cast<std::size_t>(info.n_layers);
    if (windows != nullptr && info.sliding_window.size() != n_layers) {
      refuse(fmt::format("model.sliding_window has {} values, but must have one for each of the {} layers",
                         info.sliding_window.size(), n_layers));
    }
    info.sliding_window.resize(n_layers, 0);
  }
}

void read_rope(const Json& json, int head_dim, Rope& rope) {
  const Fields fields(json, "rope",
                      {"style", "rotary_dim", "inv_freq", "attention_factor", "theta", "scaling", "invertible"});
  rope.present = true;
  rope.style = fields.text("style", schema::kStyleHalf);
  if (rope.style != schema::kStyleHalf && rope.style != schema::kStyleInterleaved) {
    const std::vector<std::string> styles = {schema::kStyleHalf, schema::kStyleInterleaved};
    refuse(fmt::format("rope.style is {}, but must be half or interleaved; the nearest is {}", shown(Json(rope.style)),
                       nearest(rope.style, styles)));
  }
  rope.inv_freq = fields.reals("inv_freq", "a finite number from 0", not_negative);
  rope.rotary_dim =
      static_cast<int>(fields.integer("rotary_dim", 2, head_dim, static_cast<std::int64_t>(2 * rope.inv_freq.size())));
  if (rope.rotary_dim < 2 || rope.rotary_dim > head_dim || rope.rotary_dim % 2 != 0 ||
      rope.inv_freq.size() != static_cast<std::size_t>(rope.rotary_dim / 2)) {
    refuse(
        fmt::format("rope.inv_freq has {} values and rotary_dim is {}, but a rotation turns an even number of "
                    "channels, from 2 to head_dim = {}, with one frequency for each pair",
                    rope.inv_freq.size(), rope.rotary_dim, head_dim));
  }
  rope.attention_factor = fields.real("attention_factor", "a positive number", positive, 1.0);
  rope.theta = fields.real("theta", "a number from 0", not_negative, 0.0);
  rope.scaling_json = fields.document("scaling");
  rope.invertible = fields.flag("invertible", true);
}

std::vector<int> read_layers(const Fields& fields, int n_layers) {
  std::vector<int> layers;
  if (fields.find("layers") == nullptr) {
    layers.resize(static_cast<std::size_t>(n_layers));
    std::iota(layers.begin(), layers.end(), 0);
    return layers;
  }
  for (const std::int64_t layer : fields.integers("layers", 0, n_layers - 1)) {
    layers.push_back(static_cast<int>(layer));
  }
  std::sort(layers.begin(), layers.end());
  if (layers.empty() || std::adjacent_find(layers.begin(), layers.end()) != layers.end()) {
    refuse("layers must name at least one layer, and none of them twice");
  }
  return layers;
}

std::vector<Pos> read_queries(const std::string& text, Pos prompt_len, Pos capacity) {
  if (text == "all") {
    return queries_all(capacity);
  }
  if (text == "decode") {
    return queries_decode(prompt_len, capacity);
  }
  constexpr std::string_view kWindow = "window:";
  if (text.starts_with(kWindow)) {
    std::int64_t window = 0;
    const std::string_view digits = std::string_view(text).substr(kWindow.size());
    for (const char digit : digits) {
      window = digit >= '0' && digit <= '9' && window <= kInt32Max ? 10 * window + (digit - '0') : kInt32Max + 1;
    }
    if (!digits.empty() && window <= kInt32Max) {
      return queries_window(static_cast<Pos>(window), prompt_len, capacity);
    }
  }
  const std::vector<std::string> allowed = {"all", "decode", "window:N"};
  refuse(fmt::format("queries is {}, but must be all, decode or window:N with N from 0 to {}; the nearest is {}",
                     shown(Json(text)), kInt32Max, nearest(text, allowed)));
}

std::vector<Pos> read_outputs(const Fields& fields, Pos capacity) {
  std::vector<Pos> outputs;
  for (const std::int64_t pos : fields.integers("outputs", 0, capacity - 1)) {
    outputs.push_back(static_cast<Pos>(pos));
  }
  std::sort(outputs.begin(), outputs.end());
  if (const auto twice = std::adjacent_find(outputs.begin(), outputs.end()); twice != outputs.end()) {
    refuse(fmt::format("outputs names token {} twice", *twice));
  }
  return outputs;
}

std::vector<Span> read_spans(const Fields& fields, Pos capacity) {
  std::vector<Span> spans;
  if (const Json* list = fields.array("spans")) {
    for (const Json& one : *list) {
      const std::string where = fmt::format("spans[{}]", spans.size());
      const Fields span(one, where, {"name", "begin", "end"});
      const std::int64_t begin = span.integer("begin", 0, capacity);
      const std::int64_t end = span.integer("end", begin, capacity);
      spans.push_back({span.text("name"), static_cast<Pos>(begin), static_cast<Pos>(end)});
      if (spans.back().name.empty()) {
        refuse(where + ".name is empty, but results name a span by it");
      }
    }
  }
  return spans;
}

}  // namespace

TraceRequest read_meta(std::string_view json) {
  const Json parsed = parse_object(json, "meta_json", Names::unique);
  const Fields fields(parsed, "",
                      {"model", "rope", "prompt_len", "capacity", "layers", "element", "queries", "outputs", "logprobs",
                       "spans", "generator", "provenance"});
  TraceRequest request;
  TraceInfo& info = request.info;
  const Json* model = fields.find("model");
  if (model == nullptr) {
    refuse("model is missing; it is an object that describes the model");
  }
  read_model(*model, info);
  if (const Json* rope = fields.find("rope")) {
    read_rope(*rope, info.head_dim, info.rope);
  }
  request.capacity = static_cast<Pos>(fields.integer("capacity", 1, schema::kMaxTokens));
  info.prompt_len = static_cast<Pos>(fields.integer("prompt_len", 1, request.capacity));
  info.layers = read_layers(fields, info.n_layers);
  const std::string element = fields.text("element");
  try {
    info.element = element_type_of(element);
  } catch (const std::invalid_argument&) {
    const std::vector<std::string> allowed = {"f16", "bf16", "f32"};
    refuse(fmt::format("element is {}, but must be f16, bf16 or f32; the nearest is {}", shown(Json(element)),
                       nearest(element, allowed)));
  }
  info.spans = read_spans(fields, request.capacity);
  info.generator = fields.document("generator");
  info.provenance = fields.document("provenance");
  request.options.queries = read_queries(fields.text("queries", "all"), info.prompt_len, request.capacity);
  request.options.outputs = read_outputs(fields, request.capacity);
  request.options.logprob = fields.flag("logprobs", false);
  return request;
}

}  // namespace kvreplay
