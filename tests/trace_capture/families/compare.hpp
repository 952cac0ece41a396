// What a decoder computes of a sequence, and how far that is from stored reference values.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "trace_capture/decoder.hpp"

namespace kvreplay::test {

// "q.3", "k.3", "v.3", "out.3" (heads, rows, head_dim) of layer 3, "logits" (rows, vocab), "logprob" (n_tokens - 1).
using Tensors = std::map<std::string, std::vector<float>>;

struct Reference {
  std::vector<std::int32_t> ids;
  std::vector<Pos> passes;  // tokens of each pass
  std::vector<Pos> rows;    // tokens whose values are kept, ascending
  Tensors tensors;
};

// Reads reference.json and model.safetensors.
Reference read_reference(const std::filesystem::path& folder, const ModelConfig& config);

// Passes ids through the decoder, capturing float32 to a trace file, and reads back what the reference keeps.
Tensors decode(Decoder& decoder, const ModelConfig& config, const std::vector<std::int32_t>& ids,
               const std::vector<Pos>& passes, const std::vector<Pos>& rows);

// max |a - b| / RMS of b.
double difference(const std::vector<float>& a, const std::vector<float>& b);

// For every tensor of the reference.
std::map<std::string, double> differences(const Tensors& found, const Tensors& reference);

std::vector<std::int32_t> greedy(Decoder& decoder, const std::vector<std::int32_t>& prompt, std::size_t n);

}  // namespace kvreplay::test
