#include "trace_capture/config.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "policies/errors.hpp"
#include "policies/nearest.hpp"
#include "trace_capture/json.hpp"

namespace kvreplay {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxConfigBytes = std::uint64_t{64} << 20;
constexpr int kMaxPositions = 1 << 28;

// What the configuration class of a family in transformers takes where config.json is silent.
struct FamilyInfo {
  std::string_view architecture, model_type;
  Family family;
  int n_kv_heads;  // 0 = n_heads
  int head_dim;    // 0 = hidden / n_heads
  int max_positions;
  int bos_id, eos_id;  // -1 = none
};

constexpr std::array<FamilyInfo, 4> kFamilies{{
    {"LlamaForCausalLM", "llama", Family::llama, 0, 0, 2048, 1, 2},
    {"MistralForCausalLM", "mistral", Family::mistral, 8, 0, 4096 * 32, 1, 2},
    {"Qwen2ForCausalLM", "qwen2", Family::qwen2, 32, 0, 32768, -1, -1},
    {"Qwen3ForCausalLM", "qwen3", Family::qwen3, 32, 128, 32768, -1, -1},
}};
constexpr double kTheta = 10000;
constexpr int kSlidingWindow = 4096, kMaxWindowLayers = 28;

// The fields of one JSON object; null counts as absent.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(&object), where_(std::move(where)) {}

  const json* find(const char* name) const {
    const auto it = object_->find(name);
    return it == object_->end() || it->is_null() ? nullptr : &*it;
  }
  bool has(const char* name) const { return find(name) != nullptr; }
  bool is_null(const char* name) const { return object_->contains(name) && !has(name); }

  [[noreturn]] void wrong(const std::string& name, const std::string& expected) const {
    const auto it = object_->find(name);
    throw ConfigError(fmt::format("{}: {}: expected {}, found {}", where_, name, expected,
                                  it == object_->end() ? "nothing" : shown(*it)));
  }

  int integer(const char* name, int min, int max, std::optional<int> otherwise = {}) const {
    const json* value = find(name);
    if (value == nullptr && otherwise) {
      return *otherwise;
    }
    // Unsigned numbers beyond int64 and all others fall out of the range.
    const bool fits =
        value != nullptr && value->is_number_integer() && value->get<double>() >= min && value->get<double>() <= max;
    if (!fits) {
      wrong(name, fmt::format("an integer in [{}, {}]", min, max));
    }
    return value->get<int>();
  }

  double number(const char* name, double min, double max, std::optional<double> otherwise = {}) const {
    const json* value = find(name);
    if (value == nullptr && otherwise) {
      return *otherwise;
    }
    if (value == nullptr || !value->is_number() || !(value->get<double>() >= min && value->get<double>() <= max)) {
      wrong(name, fmt::format("a number in [{}, {}]", min, max));
    }
    return value->get<double>();
  }
  std::optional<double> optional_number(const char* name, double min, double max) const {
    return has(name) ? std::optional(number(name, min, max)) : std::nullopt;
  }

  bool flag(const char* name, bool otherwise) const {
    const json* value = find(name);
    if (value != nullptr && !value->is_boolean()) {
      wrong(name, "true or false");
    }
    return value == nullptr ? otherwise : value->get<bool>();
  }

  std::string text(const char* name, std::string otherwise) const {
    const json* value = find(name);
    if (value != nullptr && !value->is_string()) {
      wrong(name, "a string");
    }
    return value == nullptr ? std::move(otherwise) : value->get<std::string>();
  }

  Fields object(const char* name) const {
    const json* value = find(name);
    if (value == nullptr || !value->is_object()) {
      wrong(name, "an object");
    }
    return Fields(*value, where_ + ": " + name);
  }

  const std::string& where() const { return where_; }
  const json& value() const { return *object_; }

 private:
  const json* object_;
  std::string where_;
};

// A folder of the Hugging Face cache is named by a commit: models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f2...
std::string model_name(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::path path = std::filesystem::absolute(folder, error).lexically_normal();
  if (!path.has_filename()) {
    path = path.parent_path();
  }
  const std::string repository = path.parent_path().parent_path().filename().string();
  if (path.parent_path().filename() == "snapshots" && repository.starts_with("models--")) {
    return repository.substr(repository.rfind("--") + 2);
  }
  return path.filename().string();
}

const FamilyInfo& find_family(const Fields& config) {
  std::vector<std::string> names;
  names.reserve(kFamilies.size());
  for (const FamilyInfo& info : kFamilies) {
    names.emplace_back(info.architecture);
  }
  const std::string model_type = config.text("model_type", "");
  std::string architecture;
  if (const json* list = config.find("architectures")) {
    if (!list->is_array() || list->empty() || !list->front().is_string()) {
      config.wrong("architectures", "a list that names the architecture");
    }
    architecture = list->front().get<std::string>();
  } else {
    const auto it =
        std::find_if(kFamilies.begin(), kFamilies.end(), [&](const auto& f) { return f.model_type == model_type; });
    architecture = it == kFamilies.end() ? model_type : std::string(it->architecture);
  }
  const auto it = std::find_if(kFamilies.begin(), kFamilies.end(),
                               [&](const auto& info) { return info.architecture == architecture; });
  if (it == kFamilies.end()) {
    const std::string name = shown(std::string_view(architecture));
    throw ConfigError(fmt::format("{}: architecture '{}' is not supported; supported are {}; nearest is {}",
                                  config.where(), name, fmt::join(names, ", "), nearest(name, names)));
  }
  if (!model_type.empty() && model_type != it->model_type) {
    config.wrong("model_type", fmt::format("\"{}\", which belongs to {}", it->model_type, it->architecture));
  }
  return *it;
}

RopeConfig read_rope(const Fields& config, int max_positions) {
  static const std::vector<std::string> kTypes{"default", "linear", "dynamic", "llama3", "yarn"};
  constexpr double kSmall = 1e-6, kLarge = 1e6;
  const json nothing = json::object();
  // transformers 4 writes rope_scaling, transformers 5 rope_parameters; both may be null. The first that says something
  // counts.
  std::optional<Fields> found;
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    if (!found && config.has(name) && !config.find(name)->empty()) {
      found = config.object(name);
    }
  }
  const Fields fields = found.value_or(Fields(nothing, config.where()));

  RopeConfig rope;
  rope.theta = fields.number("rope_theta", 2, 1e15, config.number("rope_theta", 2, 1e15, kTheta));
  rope.type = fields.text("rope_type", fields.text("type", "default"));
  rope.original_max_positions = max_positions;
  if (std::find(kTypes.begin(), kTypes.end(), rope.type) == kTypes.end()) {
    const std::string name = shown(std::string_view(rope.type));
    throw ConfigError(fmt::format("{}: RoPE scaling '{}' is not supported; supported are {}; nearest is {}",
                                  fields.where(), name, fmt::join(kTypes, ", "), nearest(name, kTypes)));
  }
  for (const Fields* place : {&config, &fields}) {
    if (place->has("partial_rotary_factor") && place->number("partial_rotary_factor", 0, 1) != 1) {
      place->wrong("partial_rotary_factor", "1 (rotation of whole heads)");
    }
    if (place->has("mrope_section")) {
      place->wrong("mrope_section", "none (multimodal RoPE is not supported)");
    }
  }
  for (const char* layer_type : {"full_attention", "sliding_attention"}) {
    if (fields.has(layer_type)) {
      fields.wrong(layer_type, "one RoPE for all layers");
    }
  }
  if (rope.type == "default") {
    return rope;
  }

  rope.json = fields.value().dump();
  if (rope.type == "llama3" || rope.type == "yarn") {
    // A field beside the object, as Phi-3 has it, goes first, as in transformers.
    const Fields& place = config.has("original_max_position_embeddings") ? config : fields;
    rope.original_max_positions = place.integer("original_max_position_embeddings", 1, kMaxPositions, max_positions);
  }
  const std::optional<double> implied =
      rope.type == "yarn" && fields.is_null("factor")
          ? std::optional(std::max(1.0, static_cast<double>(max_positions) / rope.original_max_positions))
          : std::nullopt;
  rope.factor = fields.number("factor", 1, kLarge, implied);
  if (rope.type == "llama3") {
    rope.low_freq_factor = fields.number("low_freq_factor", kSmall, kLarge);
    rope.high_freq_factor = fields.number("high_freq_factor", kSmall, kLarge);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fields.wrong("high_freq_factor", fmt::format("more than low_freq_factor = {}", rope.low_freq_factor));
    }
  } else if (rope.type == "yarn") {
    rope.beta_fast = fields.number("beta_fast", kSmall, kLarge, rope.beta_fast);
    rope.beta_slow = fields.number("beta_slow", kSmall, kLarge, rope.beta_slow);
    if (rope.beta_fast < rope.beta_slow) {
      fields.wrong("beta_fast", fmt::format("at least beta_slow = {}", rope.beta_slow));
    }
    rope.attention_factor = fields.optional_number("attention_factor", kSmall, kLarge);
    rope.mscale = fields.optional_number("mscale", 0, kLarge);
    rope.mscale_all_dim = fields.optional_number("mscale_all_dim", 0, kLarge);
    rope.truncate = fields.flag("truncate", true);
  }
  return rope;
}

// (n_layers), 0 = none. Mistral: all layers or none. Qwen: the layers that layer_types names, or all from
// max_window_layers on, where use_sliding_window. Llama has no window whatever the file says.
std::vector<int> read_sliding_window(const Fields& config, Family family, int n_layers) {
  std::vector<int> out(static_cast<std::size_t>(n_layers), 0);
  const bool qwen = family == Family::qwen2 || family == Family::qwen3;
  int window = 0;
  if ((family == Family::mistral || (qwen && config.flag("use_sliding_window", false))) &&
      !config.is_null("sliding_window")) {
    window = config.integer("sliding_window", 1, kMaxPositions, kSlidingWindow);
  }
  if (family == Family::mistral) {
    std::fill(out.begin(), out.end(), window);
  } else if (qwen && config.has("layer_types")) {
    const json& types = *config.find("layer_types");
    if (!types.is_array() || types.size() != out.size()) {
      config.wrong("layer_types", fmt::format("a list of num_hidden_layers = {} names", n_layers));
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      const bool sliding = types[i] == "sliding_attention";
      if (!sliding && types[i] != "full_attention" && types[i] != "attention") {
        throw ConfigError(fmt::format("{}: layer_types: expected full_attention or sliding_attention, found {}",
                                      config.where(), shown(types[i])));
      }
      if (sliding && window == 0) {
        throw ConfigError(fmt::format(
            "{}: layer_types has sliding_attention, expected use_sliding_window true and a sliding_window, found none",
            config.where()));
      }
      out[i] = sliding ? window : 0;
    }
  } else if (qwen) {
    const int first = config.integer("max_window_layers", 0, kMaxPositions, kMaxWindowLayers);
    std::fill(out.begin() + std::min(first, n_layers), out.end(), window);
  }
  return out;
}

// Adds the ids that `name` gives, one or a list; some files write -1 for none.
void add_ids(const Fields& fields, const char* name, int vocab, std::vector<std::int32_t>& ids) {
  const json* value = fields.find(name);
  if (value == nullptr) {
    return;
  }
  const auto add = [&](const json& id) {
    if (!id.is_number_integer() || id.get<double>() < -1 || id.get<double>() >= vocab) {
      fields.wrong(name, fmt::format("token ids below vocab_size = {}", vocab));
    }
    const auto n = id.get<std::int32_t>();
    if (n >= 0 && std::find(ids.begin(), ids.end(), n) == ids.end()) {
      ids.push_back(n);
    }
  };
  if (value->is_array()) {
    std::for_each(value->begin(), value->end(), add);
  } else {
    add(*value);
  }
}

void refuse_what_is_not_built(const Fields& config) {
  const std::string activation = config.text("hidden_act", "silu");
  if (activation != "silu") {
    config.wrong("hidden_act", "\"silu\"");
  }
  if (config.has("quantization_config")) {
    config.wrong("quantization_config", "none (weights in F32, F16 or BF16)");
  }
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& folder) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    throw ConfigError(fmt::format(
        "{}: expected a model folder with config.json and model.safetensors, found {}; `hf download ORG/MODEL "
        "--local-dir FOLDER` makes one of a model on the Hugging Face hub",
        folder.string(), std::filesystem::exists(folder, error) ? "a file" : "nothing"));
  }
  const std::filesystem::path path = folder / "config.json";
  ModelConfig out;
  out.json = read_text(path, kMaxConfigBytes);
  const json document = parse_object(out.json, path.string());
  const Fields config(document, path.string());

  const FamilyInfo& info = find_family(config);
  refuse_what_is_not_built(config);
  out.name = model_name(folder);
  out.architecture = info.architecture;
  out.family = info.family;
  out.n_layers = config.integer("num_hidden_layers", 1, 1024);
  out.hidden = config.integer("hidden_size", 1, 1 << 20);
  out.intermediate = config.integer("intermediate_size", 1, 1 << 24);
  out.vocab = config.integer("vocab_size", 1, 1 << 24);
  out.n_heads = config.integer("num_attention_heads", 1, 1 << 14);
  const bool one_per_head = info.n_kv_heads == 0 || config.is_null("num_key_value_heads");
  out.n_kv_heads = config.integer("num_key_value_heads", 1, out.n_heads, one_per_head ? out.n_heads : info.n_kv_heads);
  if (out.n_kv_heads > out.n_heads || out.n_heads % out.n_kv_heads != 0) {
    config.wrong("num_key_value_heads", fmt::format("a divisor of num_attention_heads = {}", out.n_heads));
  }
  if (!config.has("head_dim") && info.head_dim == 0 && out.hidden % out.n_heads != 0) {
    config.wrong("hidden_size",
                 fmt::format("a multiple of num_attention_heads = {} where there is no head_dim", out.n_heads));
  }
  out.head_dim = config.integer("head_dim", 1, 4096, info.head_dim > 0 ? info.head_dim : out.hidden / out.n_heads);
  if (out.head_dim % 2 != 0 || out.head_dim > 4096) {
    throw ConfigError(
        fmt::format("{}: head_dim (or hidden_size / num_attention_heads): expected an even number of at "
                    "most 4096, found {}",
                    config.where(), out.head_dim));
  }
  out.attention_scale = 1 / std::sqrt(static_cast<double>(out.head_dim));
  out.max_positions = config.integer("max_position_embeddings", 1, kMaxPositions, info.max_positions);
  out.norm_eps = config.number("rms_norm_eps", 0, 1, 1e-6);
  out.tied_embeddings = config.flag("tie_word_embeddings", false);

  const bool llama = out.family == Family::llama, qwen3 = out.family == Family::qwen3;
  const bool bias = (llama || qwen3) && config.flag("attention_bias", false);
  out.qkv_bias = bias || out.family == Family::qwen2;
  out.o_bias = bias;
  out.mlp_bias = llama && config.flag("mlp_bias", false);
  out.qk_norm = qwen3;
  out.sliding_window = read_sliding_window(config, out.family, out.n_layers);
  out.rope = read_rope(config, out.max_positions);

  std::vector<std::int32_t> bos;
  if (document.contains("bos_token_id")) {
    add_ids(config, "bos_token_id", out.vocab, bos);
    out.bos_id = bos.empty() ? -1 : bos.front();
  } else {
    out.bos_id = info.bos_id;
  }
  if (document.contains("eos_token_id")) {
    add_ids(config, "eos_token_id", out.vocab, out.eos_ids);
  } else if (info.eos_id >= 0) {
    out.eos_ids.push_back(info.eos_id);
  }
  const std::filesystem::path generation_path = folder / "generation_config.json";
  if (std::filesystem::exists(generation_path, error)) {
    const json generation = parse_object(read_text(generation_path, kMaxConfigBytes), generation_path.string());
    add_ids(Fields(generation, generation_path.string()), "eos_token_id", out.vocab, out.eos_ids);
  }
  return out;
}

}  // namespace kvreplay
