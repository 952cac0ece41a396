#include "trace_capture/row_collector.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "policies/errors.hpp"
#include "trace_capture/device_rows.hpp"
#include "trace_capture/errors.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kScratch = 4096;  // float32 values widened at a time

const char* name_of(kvt_kind kind) {
  constexpr std::array kNames = {"k", "v", "q", "out"};
  return kNames[static_cast<std::size_t>(kind)];
}

ElementType type_of(kvt_dtype dtype) {
  switch (dtype) {
    case KVT_F16:
      return ElementType::f16;
    case KVT_BF16:
      return ElementType::bf16;
    case KVT_F32:
      return ElementType::f32;
  }
  throw ConfigError(fmt::format("dtype {} is unknown; allowed are KVT_F16 = {}, KVT_BF16 = {} and KVT_F32 = {}",
                                static_cast<int>(dtype), static_cast<int>(KVT_F16), static_cast<int>(KVT_BF16),
                                static_cast<int>(KVT_F32)));
}

// How far apart the first and the last of n rows are, in bytes. False if it is beyond all memory.
bool reach_of(std::int64_t n, std::int64_t stride, std::int64_t& reach) {
  return n <= 1 ? (reach = 0, true)
                : stride != std::numeric_limits<std::int64_t>::min() &&
                      !__builtin_mul_overflow(n - 1, std::abs(stride), &reach);
}

// Rows of n_heads x n that lie apart in memory, each of row_bytes: head after head, or token after token.
void check_strides(const kvt_rows& rows, std::int64_t n_heads, std::int64_t n, std::int64_t row_bytes,
                   const std::string& where) {
  std::int64_t over_heads = 0, over_tokens = 0, whole = 0;
  if (!reach_of(n_heads, rows.stride_head, over_heads) || !reach_of(n, rows.stride_token, over_tokens) ||
      __builtin_add_overflow(over_heads, over_tokens, &whole) ||
      whole > std::numeric_limits<std::ptrdiff_t>::max() - row_bytes) {
    throw ConfigError(
        fmt::format("{}: stride_head {} over {} heads and stride_token {} over {} tokens span more than "
                    "all memory; strides are in bytes",
                    where, rows.stride_head, n_heads, rows.stride_token, n));
  }
  const std::int64_t head = n_heads > 1 ? std::abs(rows.stride_head) : std::numeric_limits<std::int64_t>::max();
  const std::int64_t token = n > 1 ? std::abs(rows.stride_token) : std::numeric_limits<std::int64_t>::max();
  const bool apart =
      head >= row_bytes && token >= row_bytes && (head - row_bytes >= over_tokens || token - row_bytes >= over_heads);
  if (!apart) {
    throw ConfigError(
        fmt::format("{}: with stride_head {} over {} heads and stride_token {} over {} tokens, rows of "
                    "{} bytes overlap; strides are in bytes",
                    where, rows.stride_head, n_heads, rows.stride_token, n, row_bytes));
  }
  if (rows.on_device != 0 && ((n_heads > 1 && rows.stride_head < 0) || (n > 1 && rows.stride_token < 0))) {
    throw ConfigError(where + ": strides in device memory must be positive");
  }
}

}  // namespace

RowCollector::RowCollector(const TraceInfo& info, Pos capacity, const WriterOptions& options, TraceWriter& writer)
    : info_(info), capacity_(capacity), queries_(options.queries), outputs_(options.outputs), writer_(writer) {
  for (const int layer : info_.layers) {
    layers_[layer];
  }
}

int RowCollector::heads(kvt_kind kind) const {
  return kind == KVT_K || kind == KVT_V ? info_.n_kv_heads : info_.n_heads;
}

int RowCollector::width(kvt_kind kind) const {
  return kind == KVT_K || kind == KVT_Q ? info_.head_dim : info_.v_head_dim;
}

std::size_t RowCollector::stored_below(kvt_kind kind, Pos end) const {
  if (kind == KVT_K || kind == KVT_V) {
    return static_cast<std::size_t>(end);
  }
  const std::vector<Pos>& index = kind == KVT_Q ? queries_ : outputs_;
  return static_cast<std::size_t>(std::lower_bound(index.begin(), index.end(), end) - index.begin());
}

Pos RowCollector::stored_at(kvt_kind kind, std::size_t i) const {
  if (kind == KVT_K || kind == KVT_V) {
    return static_cast<Pos>(i);
  }
  const std::vector<Pos>& index = kind == KVT_Q ? queries_ : outputs_;
  return i < index.size() ? index[i] : capacity_;
}

Pos RowCollector::complete(const Layer& layer, kvt_kind kind) const {
  return stored_at(kind, layer.streams[static_cast<std::size_t>(kind)].stored);
}

void RowCollector::append(int layer, kvt_kind kind, std::int64_t first, std::int64_t n, const kvt_rows& rows) {
  const auto at = layers_.find(layer);
  if (at == layers_.end()) {
    throw ConfigError(
        fmt::format("layer {} is not in this trace; its layers are {}", layer, fmt::join(info_.layers, ", ")));
  }
  if (kind < KVT_K || kind > KVT_OUT) {
    throw ConfigError(fmt::format("kind {} is unknown; allowed are KVT_K = {}, KVT_V = {}, KVT_Q = {} and KVT_OUT = {}",
                                  static_cast<int>(kind), static_cast<int>(KVT_K), static_cast<int>(KVT_V),
                                  static_cast<int>(KVT_Q), static_cast<int>(KVT_OUT)));
  }
  const std::string where = fmt::format("layer {}, {}", layer, name_of(kind));
  Stream& stream = at->second.streams[static_cast<std::size_t>(kind)];
  if (first < 0 || n < 0 || first > capacity_ || n > capacity_ - first) {
    throw ConfigError(
        fmt::format("{}: {} rows from token {} on lie outside the capacity of {} tokens", where, n, first, capacity_));
  }
  const Pos begin = static_cast<Pos>(first), end = static_cast<Pos>(first + n);
  if (begin < stream.next) {
    throw ConfigError(
        fmt::format("{}: rows from token {} on were appended already; the next is {}", where, begin, stream.next));
  }
  if (stored_below(kind, begin) != stream.stored) {
    throw ConfigError(fmt::format("{}: rows begin at token {}, but those of token {} have not come", where, begin,
                                  stored_at(kind, stream.stored)));
  }
  const std::int64_t row_bytes = width(kind) * static_cast<std::int64_t>(size_of(type_of(rows.dtype)));
  if (rows.on_device != 0 && rows.on_device != 1) {
    throw ConfigError(fmt::format("{}: on_device is {}, but must be 0 (host) or 1 (CUDA)", where, rows.on_device));
  }
  if (n == 0) {
    return;
  }
  if (rows.data == nullptr) {
    throw ConfigError(where + ": data is NULL");
  }
  check_strides(rows, heads(kind), n, row_bytes, where);

  // The tokens that the file stores, in runs without a gap. All are converted before anything changes.
  std::vector<Piece> pieces;
  const std::size_t stored_end = stored_below(kind, end);
  for (std::size_t i = stream.stored; i < stored_end;) {
    const Pos run = stored_at(kind, i);
    Pos n_run = 1;
    while (i + static_cast<std::size_t>(n_run) < stored_end &&
           stored_at(kind, i + static_cast<std::size_t>(n_run)) == run + n_run) {
      ++n_run;
    }
    kvt_rows part = rows;
    part.data = static_cast<const std::byte*>(rows.data) + (n > 1 ? (run - begin) * rows.stride_token : 0);
    Piece piece;
    piece.n = static_cast<std::size_t>(n_run);
    piece.bytes = converted(part, layer, kind, run, n_run, kind == KVT_OUT ? ElementType::f32 : info_.element);
    pieces.push_back(std::move(piece));
    i += static_cast<std::size_t>(n_run);
  }
  if (kind == KVT_OUT) {
    std::size_t i = stream.stored;
    for (const Piece& piece : pieces) {
      write_outputs(layer, i, piece);
      i += piece.n;
    }
  } else {
    std::move(pieces.begin(), pieces.end(), std::back_inserter(stream.pieces));
  }
  stream.stored = stored_end;
  stream.next = end;
  write_tokens(layer, at->second);
}

std::vector<std::byte> RowCollector::converted(const kvt_rows& rows, int layer, kvt_kind kind, Pos first, Pos n,
                                               ElementType to) const {
  const ElementType from = type_of(rows.dtype);
  const auto n_heads = static_cast<std::size_t>(heads(kind)), n_rows = static_cast<std::size_t>(n);
  const auto row = static_cast<std::size_t>(width(kind)), row_bytes = row * size_of(from);
  const auto* data = static_cast<const std::byte*>(rows.data);
  std::int64_t stride_head = n_heads > 1 ? rows.stride_head : 0, stride_token = n > 1 ? rows.stride_token : 0;

  std::vector<std::byte> staged;  // (n_heads, n, row_bytes)
  if (rows.on_device != 0) {
    if (!device_pointers_supported()) {
      throw DeviceError(
          fmt::format("layer {}, {}: device memory cannot be read, because this libkvt was built without "
                      "CUDA or finds no device; copy the rows to host memory first",
                      layer, name_of(kind)));
    }
    staged.resize(n_heads * n_rows * row_bytes);
    copy_from_device(data, heads(kind), n, stride_head, stride_token, row_bytes, rows.stream, staged.data());
    data = staged.data();
    stride_token = static_cast<std::int64_t>(row_bytes);
    stride_head = n * stride_token;
  }

  std::vector<std::byte> out(n_heads * n_rows * row * size_of(to));
  const bool dense = stride_token == static_cast<std::int64_t>(row_bytes);
  const std::size_t step = dense ? std::max<std::size_t>(1, kScratch / row) : 1;
  std::vector<float> wide(step * row), back(step * row);
  std::byte* target = out.data();
  for (std::size_t head = 0; head < n_heads; ++head) {
    for (std::size_t token = 0; token < n_rows; token += step) {
      const std::size_t n_values = std::min(step, n_rows - token) * row;
      const std::byte* source =
          data + static_cast<std::int64_t>(head) * stride_head + static_cast<std::int64_t>(token) * stride_token;
      const std::span<float> values = std::span(wide).first(n_values), stored = std::span(back).first(n_values);
      bool finite = widen(from, source, values), fits = true;
      if (from == to) {
        std::memcpy(target, source, n_values * size_of(to));
      } else {
        narrow(to, values, target);
        fits = to == ElementType::f32 || widen(to, target, stored);
      }
      if (!finite || !fits) {
        const auto bad = static_cast<std::size_t>(
            std::find_if(values.begin(), values.end(),
                         [&](const float& value) {
                           return !std::isfinite(value) ||
                                  (finite && !std::isfinite(stored[static_cast<std::size_t>(&value - values.data())]));
                         }) -
            values.begin());
        const std::string place =
            fmt::format("layer {}, {}: token {}, head {}, channel {} is {}", layer, name_of(kind),
                        first + static_cast<Pos>(token + bad / row), head, bad % row, values[bad]);
        throw ConfigError(finite ? fmt::format("{}, which {} cannot hold; open the trace with element bf16 or f32",
                                               place, kvreplay::name_of(to))
                                 : place + ", but must be finite");
      }
      target += n_values * size_of(to);
    }
  }
  return out;
}

// `begin`: which of the stored outputs is the piece's first.
void RowCollector::write_outputs(int layer, std::size_t begin, const Piece& piece) {
  const auto n_heads = static_cast<std::size_t>(info_.n_heads), row = static_cast<std::size_t>(info_.v_head_dim);
  std::vector<float> out(n_heads * row);  // (n_heads, v_head_dim)
  for (std::size_t i = 0; i < piece.n; ++i) {
    for (std::size_t head = 0; head < n_heads; ++head) {
      std::memcpy(out.data() + head * row, piece.bytes.data() + (head * piece.n + i) * row * sizeof(float),
                  row * sizeof(float));
    }
    writer_.write_output(layer, outputs_[begin + i], out);
  }
}

// Hands over the tokens that have all their rows.
void RowCollector::write_tokens(int number, Layer& layer) {
  const Pos ready = std::min({complete(layer, KVT_K), complete(layer, KVT_V), complete(layer, KVT_Q)});
  const Pos n = ready - layer.written;
  if (n <= 0) {
    return;
  }
  // The first `m` waiting rows of a kind: the first piece itself where it is exactly these.
  std::vector<std::byte> joined[3];  // (heads, m, width)
  const auto rows_of = [&](kvt_kind kind, std::size_t m) -> std::span<const std::byte> {
    const Stream& stream = layer.streams[static_cast<std::size_t>(kind)];
    if (m == 0) {
      return {};
    }
    if (stream.pieces.front().n == m) {
      return stream.pieces.front().bytes;
    }
    const auto n_heads = static_cast<std::size_t>(heads(kind));
    const std::size_t row_bytes = static_cast<std::size_t>(width(kind)) * size_of(info_.element);
    std::vector<std::byte>& all = joined[static_cast<std::size_t>(kind)];
    all.resize(n_heads * m * row_bytes);
    std::size_t done = 0;
    for (const Piece& piece : stream.pieces) {
      const std::size_t taken = std::min(piece.n, m - done);
      for (std::size_t head = 0; head < n_heads; ++head) {
        std::memcpy(all.data() + (head * m + done) * row_bytes, piece.bytes.data() + head * piece.n * row_bytes,
                    taken * row_bytes);
      }
      done += taken;
      if (done == m) {
        break;
      }
    }
    return all;
  };
  const auto n_rows = static_cast<std::size_t>(n);
  const std::size_t n_queries = stored_below(KVT_Q, ready) - stored_below(KVT_Q, layer.written);
  writer_.append(number, n, rows_of(KVT_K, n_rows), rows_of(KVT_V, n_rows), rows_of(KVT_Q, n_queries));
  layer.written = ready;

  const auto drop = [&](kvt_kind kind, std::size_t m) {
    std::deque<Piece>& pieces = layer.streams[static_cast<std::size_t>(kind)].pieces;
    while (m > 0 && pieces.front().n <= m) {
      m -= pieces.front().n;
      pieces.pop_front();
    }
    if (m > 0) {
      Piece& piece = pieces.front();
      const auto n_heads = static_cast<std::size_t>(heads(kind));
      const std::size_t row_bytes = static_cast<std::size_t>(width(kind)) * size_of(info_.element);
      for (std::size_t head = 0; head < n_heads; ++head) {
        std::memmove(piece.bytes.data() + head * (piece.n - m) * row_bytes,
                     piece.bytes.data() + (head * piece.n + m) * row_bytes, (piece.n - m) * row_bytes);
      }
      piece.n -= m;
      piece.bytes.resize(n_heads * piece.n * row_bytes);
    }
  };
  drop(KVT_K, n_rows);
  drop(KVT_V, n_rows);
  drop(KVT_Q, n_queries);
}

void RowCollector::expect_complete(std::int64_t n) const {
  for (const auto& [number, layer] : layers_) {
    for (const kvt_kind kind : {KVT_K, KVT_V, KVT_Q, KVT_OUT}) {
      if (const Pos missing = complete(layer, kind); missing < n) {
        throw ConfigError(fmt::format("{} tokens cannot be committed, because layer {} has no {} of token {} yet", n,
                                      number, name_of(kind), missing));
      }
    }
  }
}

}  // namespace kvreplay
