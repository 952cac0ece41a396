// What a capture stores of a sequence, and how many bytes that will be.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "trace_capture/model.hpp"
#include "trace_capture/packet.hpp"

namespace kvreplay {

// --queries all | decode | window:N
struct QueryChoice {
  enum class Kind { all, decode, window } kind = Kind::all;
  Pos window = 0;

  static QueryChoice parse(const std::string& text);  // ConfigError
  std::vector<Pos> tokens(Pos prompt_len, Pos n_tokens) const;
};

struct StoreOptions {
  std::vector<int> layers;  // ascending; empty = all
  QueryChoice queries;
  ElementType element = ElementType::f16;
  int check_steps = 16;  // decode steps whose attention output is stored, and up to 4 tokens of the prompt; 0 = none
  bool w_o = false;
};

// Throws ConfigError for a layer that the model has not.
RecordPlan record_plan(const ModelConfig& config, const StoreOptions& options, Pos prompt_len, Pos n_tokens);

// Bytes of the trace file. piece_bytes: of the longest piece of text, 0 = none are stored.
std::uint64_t trace_bytes(const Model& model, const StoreOptions& options, Pos prompt_len, Pos n_tokens,
                          std::size_t piece_bytes);

// Room for files in a folder, or in the nearest folder above it that exists.
std::uint64_t free_bytes(const std::filesystem::path& folder);

std::string bytes_text(std::uint64_t bytes);  // "2.5 GiB"

}  // namespace kvreplay
