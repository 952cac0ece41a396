// SHA-256 over the logical content of a trace: the same for every profile and writer of the same
// content.
#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "traces/reader.hpp"

namespace kvreplay {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void add(std::span<const std::byte> bytes);
  std::string hex();  // ends the hash

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string sha256(std::string_view text);  // hex

struct TraceHashes {
  std::string content;                        // "sha256:..."
  std::map<std::string, std::string> arrays;  // hex, by "layers/004/k"
};

// Reads everything once. docs/trace_format.md, "Hashes", is the specification.
TraceHashes hash_trace(const TraceReader& trace);

// The content hash where the hashes of the arrays are known already.
std::string content_hash(const TraceReader& trace, const std::map<std::string, std::string>& arrays);

std::string array_path(int layer, const std::string& name);  // "layers/004/k"

}  // namespace kvreplay
