// Writes a trace while its tokens come. Rows go to their place in the file at once; n_valid moves
// only after they are on disk, so that a writer that is killed leaves a readable file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "traces/reader.hpp"
#include "traces/skeleton.hpp"

namespace kvreplay {

struct WriterOptions {
  Profile profile = Profile::working;  // archive: a working file is written first, and packed by close
  ArchiveLayout archive;
  // Tokens whose queries are stored, ascending: see the three functions below.
  std::vector<Pos> queries;
  // Tokens at which the engine's own attention output is stored, ascending; empty = none.
  std::vector<Pos> outputs;
  ElementType out_type = ElementType::f32;
  int hidden = 0;  // rows of w_o; 0 = it is not stored
  ElementType w_o_type = ElementType::f32;
  std::vector<std::string> scores;  // names of float32 external scores
  bool logprob = false;
  std::size_t piece_bytes = 0;  // longest piece of text; 0 = none are stored
};

// What --queries all | decode | window:N means, for room for `capacity` tokens.
std::vector<Pos> queries_all(Pos capacity);
std::vector<Pos> queries_decode(Pos prompt_len, Pos capacity);
std::vector<Pos> queries_window(Pos window, Pos prompt_len, Pos capacity);

// Misuse (wrong sizes, tokens beyond the capacity) is a std::invalid_argument, an unwritable file a
// TraceError.
class TraceWriter {
 public:
  // Takes the model, rope, element, layers, prompt_len, spans and provenance from `meta`; writes
  // <path>.part until close renames it. An empty uuid or created_utc is filled in.
  TraceWriter(const std::filesystem::path& path, const TraceInfo& meta, Pos capacity, WriterOptions options);
  ~TraceWriter();  // without close: the .part file stays, readable up to the last commit
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  // The next n tokens of the sequence. Empty positions continue 0, 1, ...
  void append_tokens(std::span<const std::int32_t> ids, std::span<const std::int32_t> positions = {},
                     std::span<const float> logprob = {}, std::span<const std::string> pieces = {});

  // The next n rows of one layer, in the file's element type, head-major: k (n_kv_heads, n,
  // head_dim), v (n_kv_heads, n, v_head_dim), and q (n_heads, m, head_dim) of the m of these tokens
  // whose queries are stored.
  void append(int layer, Pos n, std::span<const std::byte> k, std::span<const std::byte> v,
              std::span<const std::byte> q);
  // The same from float32, rounded to nearest even. A finite value that the element type cannot
  // hold is refused.
  void append(int layer, Pos n, std::span<const float> k, std::span<const float> v, std::span<const float> q);
  Pos n_stored_queries(int layer, Pos n) const;  // m of the next n rows of this layer

  void write_output(int layer, Pos pos,
                    std::span<const float> out);          // (n_heads, v_head_dim); pos in `outputs`
  void write_w_o(int layer, std::span<const float> w_o);  // (hidden, n_heads * v_head_dim)
  void write_scores(int layer, const std::string& name, int kv_head,
                    std::span<const float> scores);  // (n_tokens)

  // Everything of the first n tokens is written: flush it, then say so. What comes later may still
  // be appended.
  void commit(Pos n);
  // Commits what all layers have, hashes the content and gives the file its final name.
  void close();
  // Closes and removes the unfinished file.
  void discard();

  Pos n_committed() const { return n_committed_; }
  const std::filesystem::path& part_path() const { return part_; }

 private:
  struct Array {
    std::uint64_t offset = 0, n_rows = 0, row_bytes = 0;
    ElementType type = ElementType::f32;
  };
  struct LayerState {
    std::map<std::string, Array> arrays;
    Pos n_rows = 0;     // k and v rows written
    Pos n_queries = 0;  // q rows written
  };
  LayerState& layer_state(int layer);
  void write_at(std::uint64_t offset, std::span<const std::byte> data);
  void write_rows(const Array& array, int heads, std::uint64_t first, std::uint64_t n, std::span<const std::byte> data,
                  const char* name);
  void write_values(const Array& array, std::uint64_t head, std::uint64_t row, std::span<const float> values);
  std::vector<std::byte> narrowed(ElementType type, std::span<const float> values, const char* name) const;
  void flush();

  std::filesystem::path path_, working_, part_;
  TraceInfo meta_;
  Pos capacity_ = 0, n_tokens_ = 0, n_committed_ = 0;
  WriterOptions options_;
  std::map<int, LayerState> layers_;
  std::map<std::string, std::uint64_t> columns_;  // byte offsets of token columns and n_valid
  int fd_ = -1;
};

std::string new_uuid();  // random, version 4
std::string utc_now();   // 2031-05-04T12:00:00Z

}  // namespace kvreplay
