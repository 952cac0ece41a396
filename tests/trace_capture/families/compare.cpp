#include "tests/trace_capture/families/compare.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include "tests/traces/fixtures.hpp"
#include "trace_capture/recorder.hpp"

namespace kvreplay::test {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

TraceInfo trace_info(const ModelConfig& config) {
  TraceInfo info;
  info.model_name = config.name;
  info.n_layers = config.n_layers;
  info.n_heads = config.n_heads;
  info.n_kv_heads = config.n_kv_heads;
  info.head_dim = info.v_head_dim = config.head_dim;
  info.attention_scale = config.attention_scale;
  info.sliding_window = config.sliding_window;
  info.element = ElementType::f32;
  info.prompt_len = 1;
  info.layers.resize(sz(config.n_layers));
  std::iota(info.layers.begin(), info.layers.end(), 0);
  return info;
}

}  // namespace

Reference read_reference(const std::filesystem::path& folder, const ModelConfig& config) {
  std::ifstream file(folder / "reference.json");
  const nlohmann::json json = nlohmann::json::parse(file);
  Reference reference;
  json.at("ids").get_to(reference.ids);
  json.at("passes").get_to(reference.passes);
  json.at("rows").get_to(reference.rows);

  const Safetensors tensors(folder);
  const auto rows = static_cast<std::int64_t>(reference.rows.size());
  for (const std::string& name : tensors.names()) {
    std::vector<std::int64_t> shape = {name[0] == 'q' || name[0] == 'o' ? config.n_heads : config.n_kv_heads, rows,
                                       config.head_dim};
    if (name == "logits") {
      shape = {rows, config.vocab};
    } else if (name == "logprob") {
      shape = {static_cast<std::int64_t>(reference.ids.size()) - 1};
    }
    const Tensor tensor = tensors.tensor(name, shape);
    std::vector<float>& values = reference.tensors[name];
    values.resize(sz(tensor.size()));
    widen(tensor.type, tensor.data, values);
  }
  return reference;
}

Tensors decode(Decoder& decoder, const ModelConfig& config, const std::vector<std::int32_t>& ids,
               const std::vector<Pos>& passes, const std::vector<Pos>& rows) {
  const TemporaryFolder folder;
  const TraceInfo info = trace_info(config);
  const Pos n_tokens = static_cast<Pos>(ids.size());
  const std::vector<Pos> all = queries_all(n_tokens);
  WriterOptions options;
  options.queries = options.outputs = all;
  TraceWriter writer(folder / "t.h5", info, n_tokens, options);
  RecordPlan plan{.n_heads = config.n_heads,
                  .n_kv_heads = config.n_kv_heads,
                  .head_dim = config.head_dim,
                  .layers = info.layers,
                  .element = ElementType::f32,
                  .capacity = n_tokens,
                  .queries = all,
                  .outputs = all};
  Tensors tensors;
  std::vector<float>& logits = tensors["logits"];
  std::vector<float>& logprob = tensors["logprob"];
  {
    Recorder recorder(plan, writer, {.stage_bytes = std::size_t{8} << 20});
    Pos done = 0;
    for (const Pos n : passes) {
      const std::span<const std::int32_t> pass = std::span(ids).subspan(sz(done), sz(n));
      decoder.pass(pass, &recorder);
      recorder.tokens(pass, {});
      std::vector<float> row(sz(config.vocab));
      for (const Pos token : rows) {
        if (token >= done && token < done + n) {
          decoder.logits(token - done, row);
          logits.insert(logits.end(), row.begin(), row.end());
        }
      }
      const Pos n_next = std::min(n, n_tokens - done - 1);
      logprob.resize(logprob.size() + sz(n_next));
      decoder.log_probabilities(std::span(ids).subspan(sz(done) + 1, sz(n_next)),
                                std::span(logprob).subspan(sz(done), sz(n_next)));
      done += n;
    }
    recorder.finish();
  }
  writer.close();

  const TraceReader reader(folder / "t.h5");
  std::vector<float> row(sz(config.head_dim));
  for (const int layer : info.layers) {
    const std::string suffix = "." + std::to_string(layer);
    for (int head = 0; head < config.n_heads; ++head) {
      for (const Pos token : rows) {
        reader.read_q(layer, head, token, token + 1, row);
        tensors["q" + suffix].insert(tensors["q" + suffix].end(), row.begin(), row.end());
        reader.read_out(layer, head, token, token + 1, row);
        tensors["out" + suffix].insert(tensors["out" + suffix].end(), row.begin(), row.end());
      }
    }
    for (int head = 0; head < config.n_kv_heads; ++head) {
      for (const Pos token : rows) {
        reader.read_k(layer, head, token, token + 1, row);
        tensors["k" + suffix].insert(tensors["k" + suffix].end(), row.begin(), row.end());
        reader.read_v(layer, head, token, token + 1, row);
        tensors["v" + suffix].insert(tensors["v" + suffix].end(), row.begin(), row.end());
      }
    }
  }
  return tensors;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size() || b.empty()) {
    throw std::invalid_argument("tensors of " + std::to_string(a.size()) + " and " + std::to_string(b.size()) +
                                " values are compared");
  }
  double largest = 0, squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double away = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    largest = away <= largest ? largest : away;  // a NaN stays
    squares += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return largest / std::sqrt(squares / static_cast<double>(b.size()));
}

std::map<std::string, double> differences(const Tensors& found, const Tensors& reference) {
  std::map<std::string, double> result;
  for (const auto& [name, values] : reference) {
    result[name] = difference(found.at(name), values);
  }
  return result;
}

std::vector<std::int32_t> greedy(Decoder& decoder, const std::vector<std::int32_t>& prompt, std::size_t n) {
  decoder.reset();
  for (std::size_t done = 0; done < prompt.size();) {
    const std::size_t now = std::min(prompt.size() - done, sz(decoder.max_pass()));
    decoder.pass(std::span(prompt).subspan(done, now), nullptr);
    done += now;
  }
  std::vector<std::int32_t> chosen;
  for (std::size_t step = 0; step < n; ++step) {
    chosen.push_back(decoder.choose({}, step).id);
    if (step + 1 < n) {
      decoder.pass({&chosen.back(), 1}, nullptr);
    }
  }
  return chosen;
}

}  // namespace kvreplay::test
