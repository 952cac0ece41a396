#include "traces/hash.hpp"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "traces/hdf5.hpp"
#include "traces/schema.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  if (state_->context == nullptr || EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr) != 1) {
    throw std::runtime_error("SHA-256 is not available in this build of OpenSSL");
  }
}

Sha256::~Sha256() = default;

void Sha256::add(std::span<const std::byte> bytes) {
  if (EVP_DigestUpdate(state_->context, bytes.data(), bytes.size()) != 1) {
    throw std::runtime_error("SHA-256 failed");
  }
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned n = 0;
  if (EVP_DigestFinal_ex(state_->context, digest, &n) != 1) {
    throw std::runtime_error("SHA-256 failed");
  }
  std::string text;
  for (unsigned i = 0; i < n; ++i) {
    text += fmt::format("{:02x}", digest[i]);
  }
  return text;
}

std::string sha256(std::string_view text) {
  Sha256 hash;
  hash.add(std::as_bytes(std::span(text)));
  return hash.hex();
}

namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;  // bytes hashed at a time

std::string hash_array(const StoredArray& stored) {
  Sha256 hash;
  std::vector<std::byte> piece;
  const std::uint64_t rows = std::max<std::uint64_t>(1, kPiece / stored.row_bytes());
  for (std::uint64_t head = 0; head < stored.n_heads(); ++head) {
    for (std::uint64_t row = 0; row < stored.n_rows(); row += rows) {
      const std::uint64_t end = std::min(stored.n_rows(), row + rows);
      piece.resize((end - row) * stored.row_bytes());
      stored.read_raw(head, row, end, piece);
      hash.add(piece);
    }
  }
  return hash.hex();
}

// The manifest: one line per item, "path type shape sha256-of-bytes".
class Manifest {
 public:
  void add(const std::string& path, std::string_view type, const std::string& shape, const std::string& hex) {
    lines_ += fmt::format("{} {} {} {}\n", path, type, shape, hex);
  }

  void add_text(const std::string& path, std::string_view text) { add(path, "text", "()", sha256(text)); }

  template <typename T>
  void add_values(const std::string& path, std::string_view type, std::span<const T> values, bool scalar = false) {
    Sha256 hash;
    hash.add(std::as_bytes(values));
    add(path, type, scalar ? "()" : fmt::format("({})", values.size()), hash.hex());
  }

  template <typename T>
  void add_value(const std::string& path, std::string_view type, T value) {
    add_values<T>(path, type, std::span<const T>(&value, 1), true);
  }

  std::string hash() const { return std::string(schema::kHashPrefix) + sha256(lines_); }

 private:
  std::string lines_;
};

std::string joined(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) {
    all += text;
    all += '\0';
  }
  return all;
}

}  // namespace

std::string array_path(int layer, const std::string& name) {
  return fmt::format("{}/{:03}/{}", schema::kLayers, layer, name);
}

std::string content_hash(const TraceReader& trace, const std::map<std::string, std::string>& arrays) {
  const TraceInfo& info = trace.info();
  Manifest manifest;
  manifest.add_value<std::int64_t>("model/n_layers", "int64", info.n_layers);
  manifest.add_value<std::int64_t>("model/n_heads", "int64", info.n_heads);
  manifest.add_value<std::int64_t>("model/n_kv_heads", "int64", info.n_kv_heads);
  manifest.add_value<std::int64_t>("model/head_dim", "int64", info.head_dim);
  manifest.add_value<std::int64_t>("model/v_head_dim", "int64", info.v_head_dim);
  manifest.add_value<double>("model/attention_scale", "float64", info.attention_scale);
  manifest.add_value<double>("model/logit_softcap", "float64", info.logit_softcap);
  const std::vector<std::int32_t> windows(info.sliding_window.begin(), info.sliding_window.end());
  manifest.add_values<std::int32_t>("model/sliding_window", "int32", windows);
  if (info.rope.present) {
    manifest.add_text("model/rope/style", info.rope.style);
    manifest.add_value<std::int64_t>("model/rope/rotary_dim", "int64", info.rope.rotary_dim);
    manifest.add_value<double>("model/rope/attention_factor", "float64", info.rope.attention_factor);
    manifest.add_value<std::int64_t>("model/rope/invertible", "int64", info.rope.invertible ? 1 : 0);
    manifest.add_values<double>("model/rope/inv_freq", "float64", info.rope.inv_freq);
  }
  manifest.add_values<std::int32_t>("tokens/id", "int32", info.token_ids);
  manifest.add_values<std::int32_t>("tokens/position", "int32", info.positions);
  manifest.add_values<std::uint8_t>("tokens/phase", "uint8", info.phase);
  if (!info.logprob.empty()) {
    manifest.add_values<float>("tokens/logprob", "float32", info.logprob);
  }
  if (!info.pieces.empty()) {
    manifest.add_text("tokens/piece", joined(info.pieces));
  }
  if (!info.spans.empty()) {
    std::vector<std::string> names;
    std::vector<std::int32_t> begins, ends;
    for (const Span& span : info.spans) {
      names.push_back(span.name);
      begins.push_back(span.begin);
      ends.push_back(span.end);
    }
    manifest.add_text("tokens/spans/name", joined(names));
    manifest.add_values<std::int32_t>("tokens/spans/begin", "int32", begins);
    manifest.add_values<std::int32_t>("tokens/spans/end", "int32", ends);
  }
  for (const int layer : info.layers) {
    for (const std::string& name : trace.array_names(layer)) {
      if (name == schema::kQ) {
        manifest.add_values<std::int32_t>(array_path(layer, schema::kQIndex), "int32", trace.q_index(layer));
      } else if (name == schema::kOut) {
        manifest.add_values<std::int32_t>(array_path(layer, schema::kOutIndex), "int32", trace.out_index(layer));
      }
      const StoredArray& stored = trace.array(layer, name);
      const std::string path = array_path(layer, name);
      manifest.add(path, name_of(stored.type()),
                   fmt::format("({}, {}, {})", stored.n_heads(), stored.n_rows(), stored.width()), arrays.at(path));
    }
  }
  return manifest.hash();
}

TraceHashes hash_trace(const TraceReader& trace) {
  TraceHashes hashes;
  for (const int layer : trace.info().layers) {
    for (const std::string& name : trace.array_names(layer)) {
      hashes.arrays[array_path(layer, name)] = hash_array(trace.array(layer, name));
    }
  }
  hashes.content = content_hash(trace, hashes.arrays);
  return hashes;
}

}  // namespace kvreplay
