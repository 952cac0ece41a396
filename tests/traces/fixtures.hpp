// Small traces of known numbers, and folders that vanish.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "traces/reader.hpp"
#include "traces/writer.hpp"

namespace kvreplay::test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    static std::atomic<int> n{0};
    path_ = std::filesystem::temp_directory_path() /
            ("kvreplay_traces_" + std::to_string(::getpid()) + "_" + std::to_string(n++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// Multiples of 1/8 below 8: exact in every element type.
inline float value_at(int layer, char what, int head, Pos pos, int channel) {
  const unsigned mixed = static_cast<unsigned>(layer * 131 + what * 17 + head * 31 + pos * 7 + channel * 3);
  return static_cast<float>(mixed % 127U) / 8.0F - 8.0F;
}

struct Shape {
  int n_heads = 4, n_kv_heads = 2, head_dim = 8, v_head_dim = 6;
  Pos n_tokens = 40, prompt_len = 15;
};

inline TraceInfo small_meta(const Shape& shape = {}, ElementType element = ElementType::f16) {
  TraceInfo meta;
  meta.model_name = "small";
  meta.n_layers = 4;
  meta.layers = {1, 3};
  meta.n_heads = shape.n_heads;
  meta.n_kv_heads = shape.n_kv_heads;
  meta.head_dim = shape.head_dim;
  meta.v_head_dim = shape.v_head_dim;
  meta.attention_scale = 0.25;
  meta.prompt_len = shape.prompt_len;
  meta.element = element;
  meta.sliding_window = {0, 16, 0, 0};
  meta.rope = {true, "half", shape.head_dim, 1, 1e4, "", true, {}};
  for (int i = 0; i < shape.head_dim / 2; ++i) {
    meta.rope.inv_freq.push_back(std::ldexp(1.0, -i));
  }
  meta.spans = {{"needle", 3, 6}};
  return meta;
}

// (heads, n, width) of the tokens in `index`
inline std::vector<float> rows(int layer, char what, int n_heads, const std::vector<Pos>& index, int width) {
  std::vector<float> out;
  for (int head = 0; head < n_heads; ++head) {
    for (const Pos pos : index) {
      for (int channel = 0; channel < width; ++channel) {
        out.push_back(value_at(layer, what, head, pos, channel));
      }
    }
  }
  return out;
}

inline std::vector<Pos> stored_in(const std::vector<Pos>& queries, Pos begin, Pos end) {
  std::vector<Pos> in;
  for (const Pos pos : queries) {
    if (pos >= begin && pos < end) {
      in.push_back(pos);
    }
  }
  return in;
}

// Appends tokens [begin, end) to all layers.
inline void append_small(TraceWriter& writer, const TraceInfo& meta, const std::vector<Pos>& queries, Pos begin,
                         Pos end, bool text = false) {
  std::vector<std::int32_t> ids;
  std::vector<float> logprob;
  std::vector<std::string> pieces;
  std::vector<Pos> index;
  for (Pos pos = begin; pos < end; ++pos) {
    index.push_back(pos);
    ids.push_back(100 + pos);
    if (text) {
      logprob.push_back(-0.5F * static_cast<float>(pos));
      pieces.push_back("p" + std::to_string(pos));
    }
  }
  writer.append_tokens(ids, {}, logprob, pieces);
  for (const int layer : meta.layers) {
    writer.append(layer, end - begin, rows(layer, 'k', meta.n_kv_heads, index, meta.head_dim),
                  rows(layer, 'v', meta.n_kv_heads, index, meta.v_head_dim),
                  rows(layer, 'q', meta.n_heads, stored_in(queries, begin, end), meta.head_dim));
  }
}

struct SmallOptions {
  Shape shape;
  ElementType element = ElementType::f16;
  Profile profile = Profile::working;
  std::vector<Pos> queries;  // empty = all
  bool extras = false;       // w_o, scores, logprob, pieces
};

inline void write_small(const std::filesystem::path& path, SmallOptions o = {}) {
  const TraceInfo meta = small_meta(o.shape, o.element);
  if (o.queries.empty()) {
    o.queries = queries_all(o.shape.n_tokens);
  }
  WriterOptions options;
  options.profile = o.profile;
  options.archive.chunk_tokens = 16;
  options.queries = o.queries;
  if (o.extras) {
    options.hidden = 5;
    options.scores = {"magic"};
    options.logprob = true;
    options.piece_bytes = 8;
  }
  TraceWriter writer(path, meta, o.shape.n_tokens, options);
  const Pos middle = o.shape.n_tokens / 2;
  append_small(writer, meta, o.queries, 0, middle, o.extras);
  append_small(writer, meta, o.queries, middle, o.shape.n_tokens, o.extras);
  if (o.extras) {
    for (const int layer : meta.layers) {
      writer.write_w_o(layer, std::vector<float>(static_cast<std::size_t>(5 * meta.n_heads * meta.v_head_dim), 0.5F));
      for (int kv_head = 0; kv_head < meta.n_kv_heads; ++kv_head) {
        writer.write_scores(
            layer, "magic", kv_head,
            std::vector<float>(static_cast<std::size_t>(o.shape.n_tokens), 2.0F + static_cast<float>(kv_head)));
      }
    }
  }
  writer.close();
}

inline std::vector<char> file_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_bytes(const std::filesystem::path& path, const std::vector<char>& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The message of the E that `work` throws; empty if it throws none.
template <typename E, typename Work>
std::string message_of(Work&& work) {
  try {
    work();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace kvreplay::test
