// Weights of a Hugging Face folder, memory-mapped: model.safetensors, or the shards that
// model.safetensors.index.json lists.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "traces/widen.hpp"

namespace kvreplay {

// A view of one tensor, row-major, little-endian, in the mapped file: valid as long as the Safetensors it came from.
// The data are aligned to their element, and no further.
struct Tensor {
  const std::byte* data = nullptr;  // nullptr = not in this model
  ElementType type = ElementType::f32;
  std::vector<std::int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  std::int64_t size() const;  // number of elements
};

class Safetensors {
 public:
  // Throws ConfigError naming the file and what is wrong: no weights, a header that lies about sizes, offsets outside
  // the file or overlapping, element types other than F32, F16, BF16 (where such a tensor is asked for), a shard that
  // is missing or does not hold what the index says.
  explicit Safetensors(const std::filesystem::path& folder);
  ~Safetensors();
  Safetensors(const Safetensors&) = delete;
  Safetensors& operator=(const Safetensors&) = delete;

  bool has(const std::string& name) const;
  // Throws ConfigError if it is missing, of another shape, or of an element type that is not supported.
  Tensor tensor(const std::string& name, const std::vector<std::int64_t>& shape) const;
  std::vector<std::string> names() const;  // ascending

  // "fingerprint-sha256:..." over every tensor's name, type and shape and the first and last 4096 bytes of its data:
  // tells models apart at once, without reading gigabytes.
  std::string fingerprint() const;

 private:
  struct File;
  struct Entry;
  std::vector<std::unique_ptr<File>> files_;
  std::map<std::string, Entry> entries_;
};

}  // namespace kvreplay
