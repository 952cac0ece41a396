// Rows that come kind by kind, in any pieces, element type and strides, become whole tokens of a trace.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "trace_capture/kvt.h"
#include "traces/writer.hpp"

namespace kvreplay {

class RowCollector {
 public:
  // Writes through `writer`, which was made from the same arguments and must outlive the collector.
  RowCollector(const TraceInfo& info, Pos capacity, const WriterOptions& options, TraceWriter& writer);

  // See kvt_append. Throws ConfigError for rows that cannot be and DeviceError, having changed nothing, or TraceError.
  void append(int layer, kvt_kind kind, std::int64_t first, std::int64_t n, const kvt_rows& rows);
  // Throws ConfigError, naming what is missing, unless all rows of the first n tokens are with the writer.
  void expect_complete(std::int64_t n) const;

 private:
  // Stored rows in the file's element type, (heads, n, width).
  struct Piece {
    std::size_t n = 0;
    std::vector<std::byte> bytes;
  };
  // What came of one layer and kind. `stored`: how many rows of the file came, written or waiting in pieces.
  struct Stream {
    Pos next = 0;  // token that comes next
    std::size_t stored = 0;
    std::deque<Piece> pieces;
  };
  struct Layer {
    std::array<Stream, 4> streams;  // by kvt_kind
    Pos written = 0;                // tokens whose k, v and q the writer has
  };

  int heads(kvt_kind kind) const;
  int width(kvt_kind kind) const;
  // Of the tokens below `end`, how many the file stores, and the i-th of all that it stores (capacity if there are
  // fewer).
  std::size_t stored_below(kvt_kind kind, Pos end) const;
  Pos stored_at(kvt_kind kind, std::size_t i) const;
  // The tokens of which nothing is missing: all before this one.
  Pos complete(const Layer& layer, kvt_kind kind) const;

  std::vector<std::byte> converted(const kvt_rows& rows, int layer, kvt_kind kind, Pos first, Pos n,
                                   ElementType to) const;  // (heads, n, width)
  void write_outputs(int layer, std::size_t begin, const Piece& piece);
  void write_tokens(int number, Layer& layer);

  TraceInfo info_;
  Pos capacity_ = 0;
  std::vector<Pos> queries_, outputs_;  // tokens whose q and out are stored, ascending
  TraceWriter& writer_;
  std::map<int, Layer> layers_;
};

}  // namespace kvreplay
