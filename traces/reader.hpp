// Opens a trace, checks everything that can be checked without reading the tensors, and then reads
// rows of them as float32, from any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "traces/errors.hpp"
#include "traces/widen.hpp"

namespace kvreplay {

using Pos = std::int32_t;  // absolute token position

class FileBytes;
class StoredArray;

// A named half-open range of tokens: an instruction, a needle, a frame.
struct Span {
  std::string name;
  Pos begin = 0, end = 0;
  bool operator==(const Span&) const = default;
};

struct Rope {
  bool present = false;
  std::string style;  // "half" or "interleaved"
  int rotary_dim = 0;
  double attention_factor = 1, theta = 0;
  std::string scaling_json;
  bool invertible = true;        // false if parameters changed during the sequence
  std::vector<double> inv_freq;  // (rotary_dim / 2)
};

struct TraceInfo {
  std::filesystem::path path;
  std::string stem, uuid, created_utc, generator, provenance, content_hash;
  std::string model_name, architecture, config_json, weights_hash, dtype;
  int n_layers = 0, n_heads = 0, n_kv_heads = 0, group_size = 0, head_dim = 0, v_head_dim = 0;
  double attention_scale = 0, logit_softcap = 0;  // logit_softcap 0 = none
  bool qk_norm = false;
  std::vector<int> sliding_window;  // (n_layers) of the model, 0 = none
  Rope rope;
  Pos n_tokens = 0;    // valid tokens
  Pos prompt_len = 0;  // leading tokens of phase 0
  ElementType element = ElementType::f16;
  std::vector<int> layers;  // the model's numbers of the layers present, ascending
  std::vector<Span> spans;
  std::vector<std::int32_t> token_ids, positions;  // (n_tokens)
  std::vector<std::uint8_t> phase;                 // (n_tokens) 0 prefill, 1 decode
  std::vector<std::string> pieces;                 // (n_tokens) or empty
  std::vector<float> logprob;                      // (n_tokens) or empty
  bool complete = true;                            // false if the writer never closed the file
};

// All reads are const and thread-safe. Positions are token indices in [0, n_tokens).
class TraceReader {
 public:
  explicit TraceReader(const std::filesystem::path& path);
  ~TraceReader();
  TraceReader(TraceReader&&) noexcept;
  TraceReader& operator=(TraceReader&&) noexcept;

  const TraceInfo& info() const { return info_; }

  std::span<const Pos> q_index(int layer) const;  // tokens whose queries are stored, ascending; empty if none are
  void read_k(int layer, int kv_head, Pos begin, Pos end,
              std::span<float> out) const;  // (end - begin, head_dim)
  void read_v(int layer, int kv_head, Pos begin, Pos end,
              std::span<float> out) const;  // (end - begin, v_head_dim)
  // Every position in [begin, end) must be in q_index(layer).
  void read_q(int layer, int head, Pos begin, Pos end,
              std::span<float> out) const;  // (end - begin, head_dim)

  bool has_out(int layer) const;
  std::span<const Pos> out_index(int layer) const;  // tokens whose attention output is stored, ascending
  void read_out(int layer, int head, Pos begin, Pos end,
                std::span<float> out) const;  // (end - begin, v_head_dim)

  bool has_w_o(int layer) const;
  int hidden(int layer) const;                   // rows of w_o; 0 without it
  std::vector<float> read_w_o(int layer) const;  // (hidden, n_heads * v_head_dim)

  std::vector<std::string> score_names(int layer) const;
  std::vector<float> read_scores(int layer, const std::string& name,
                                 int kv_head) const;  // (n_tokens)

  // Size and time are as they were at open. Cheap: called before each layer.
  void check_unchanged() const;

  // The bulk arrays as stored, for hashes and repacking: "k", "v", "q", "out", "w_o",
  // "scores/NAME", in this order.
  std::vector<std::string> array_names(int layer) const;
  const StoredArray& array(int layer, const std::string& name) const;
  std::string array_hash(int layer, const std::string& name) const;  // the sha256 attribute, "" if there is none

 private:
  struct Layer;
  const Layer& layer_at(int layer) const;
  void open(const std::filesystem::path& path);

  TraceInfo info_;
  std::shared_ptr<const FileBytes> file_;
  std::vector<Layer> layers_;  // ascending by number
};

}  // namespace kvreplay
