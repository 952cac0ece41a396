#include "traces/writer.hpp"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <ctime>
#include <numeric>
#include <random>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "traces/hash.hpp"
#include "traces/repack.hpp"
#include "traces/schema.hpp"

namespace kvreplay {
namespace {

std::string errno_text() { return std::generic_category().message(errno); }

std::uint64_t u64(std::int64_t value) { return static_cast<std::uint64_t>(value); }

struct Held {
  int fd;
  ~Held() {
    if (fd >= 0) {
      ::close(fd);
    }
  }
};

// Opens the file that is written, and keeps every other writer out of it: two would destroy each other's trace.
int open_alone(const std::filesystem::path& part) {
  while (true) {
    Held held{::open(part.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)};
    if (held.fd < 0) {
      throw TraceError(part.string() + " cannot be created (" + errno_text() + ")");
    }
    if (::flock(held.fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      throw TraceError(part.string() + " is being written by another process or writer");
    }  // a file system without locks has to do without
    struct stat opened {};
    struct stat named {};
    if (::fstat(held.fd, &opened) == 0 && ::stat(part.c_str(), &named) == 0 && opened.st_dev == named.st_dev &&
        opened.st_ino == named.st_ino) {
      return std::exchange(held.fd, -1);
    }  // else its writer gave it its final name, or removed it, in between
  }
}

void expect_size(const std::string& what, std::uint64_t expected, std::size_t found) {
  if (expected != found) {
    throw std::invalid_argument(fmt::format("{}: expected {} elements, found {}", what, expected, found));
  }
}

void check_index(const std::vector<Pos>& index, Pos capacity, const char* what) {
  for (std::size_t i = 0; i < index.size(); ++i) {
    if (index[i] < 0 || index[i] >= capacity || (i > 0 && index[i] <= index[i - 1])) {
      throw std::invalid_argument(
          fmt::format("{} must be ascending tokens below {}, but entry {} is {}", what, capacity, i, index[i]));
    }
  }
}

void check_meta(const TraceInfo& meta, Pos capacity) {
  const auto require = [](bool holds, const std::string& sentence) {
    if (!holds) {
      throw std::invalid_argument(sentence);
    }
  };
  require(capacity >= 1 && capacity <= schema::kMaxTokens, fmt::format("a trace of {} tokens cannot be", capacity));
  require(meta.prompt_len >= 1 && meta.prompt_len <= capacity,
          fmt::format("prompt_len {} must be from 1 to the {} tokens", meta.prompt_len, capacity));
  require(meta.n_layers >= 1 && meta.n_layers <= schema::kMaxLayers,
          fmt::format("n_layers {} must be from 1 to {}", meta.n_layers, schema::kMaxLayers));
  require(meta.n_heads >= 1 && meta.n_heads <= schema::kMaxHeads && meta.n_kv_heads >= 1 &&
              meta.n_heads % meta.n_kv_heads == 0,
          fmt::format("n_heads {} must be a multiple of n_kv_heads {}, and at most {}", meta.n_heads, meta.n_kv_heads,
                      schema::kMaxHeads));
  require(meta.head_dim >= 1 && meta.head_dim <= schema::kMaxHeadDim && meta.v_head_dim >= 1 &&
              meta.v_head_dim <= schema::kMaxHeadDim,
          fmt::format("head_dim {} and v_head_dim {} must be from 1 to {}", meta.head_dim, meta.v_head_dim,
                      schema::kMaxHeadDim));
  require(std::isfinite(meta.attention_scale) && meta.attention_scale > 0,
          fmt::format("attention_scale {} must be positive", meta.attention_scale));
  require(std::isfinite(meta.logit_softcap) && meta.logit_softcap >= 0,
          fmt::format("logit_softcap {} must be 0 (none) or positive", meta.logit_softcap));
  require(
      meta.sliding_window.empty() || meta.sliding_window.size() == static_cast<std::size_t>(meta.n_layers),
      fmt::format("sliding_window has {} values, but there are {} layers", meta.sliding_window.size(), meta.n_layers));
  require(!meta.layers.empty(), "a trace needs at least one layer");
  for (std::size_t i = 0; i < meta.layers.size(); ++i) {
    require(meta.layers[i] >= 0 && meta.layers[i] < meta.n_layers && (i == 0 || meta.layers[i] > meta.layers[i - 1]),
            fmt::format("layers must be ascending and below n_layers = {}, but there is {}", meta.n_layers,
                        meta.layers[i]));
  }
  if (meta.rope.present) {
    require(meta.rope.rotary_dim >= 2 && meta.rope.rotary_dim % 2 == 0 && meta.rope.rotary_dim <= meta.head_dim,
            fmt::format("rotary_dim {} must be even and at most head_dim {}", meta.rope.rotary_dim, meta.head_dim));
    require(meta.rope.inv_freq.size() == static_cast<std::size_t>(meta.rope.rotary_dim / 2),
            fmt::format("inv_freq has {} values, but rotary_dim {} needs {}", meta.rope.inv_freq.size(),
                        meta.rope.rotary_dim, meta.rope.rotary_dim / 2));
    require(meta.rope.style == schema::kStyleHalf || meta.rope.style == schema::kStyleInterleaved,
            "rope style '" + meta.rope.style + "' is unknown; allowed are half and interleaved");
  }
}

}  // namespace

std::vector<Pos> queries_all(Pos capacity) { return queries_window(capacity, capacity, capacity); }

std::vector<Pos> queries_decode(Pos prompt_len, Pos capacity) { return queries_window(0, prompt_len, capacity); }

std::vector<Pos> queries_window(Pos window, Pos prompt_len, Pos capacity) {
  const Pos begin = std::clamp(prompt_len - window, Pos{0}, capacity);
  std::vector<Pos> index(static_cast<std::size_t>(capacity - begin));
  std::iota(index.begin(), index.end(), begin);
  return index;
}

std::string new_uuid() {
  std::random_device random;
  std::uint32_t words[4];
  for (std::uint32_t& word : words) {
    word = random();
  }
  words[1] = (words[1] & 0xffff0fffU) | 0x00004000U;
  words[2] = (words[2] & 0x3fffffffU) | 0x80000000U;
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:04x}{:08x}", words[0], words[1] >> 16, words[1] & 0xffffU,
                     words[2] >> 16, words[2] & 0xffffU, words[3]);
}

std::string utc_now() { return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))); }

TraceWriter::TraceWriter(const std::filesystem::path& path, const TraceInfo& meta, Pos capacity, WriterOptions options)
    : path_(path), meta_(meta), capacity_(capacity), options_(std::move(options)) {
  check_meta(meta_, capacity_);
  check_index(options_.queries, capacity_, "the tokens whose queries are stored");
  check_index(options_.outputs, capacity_, "the tokens whose outputs are stored");
  if (meta_.uuid.empty()) {
    meta_.uuid = new_uuid();
  }
  if (meta_.created_utc.empty()) {
    meta_.created_utc = utc_now();
  }
  TracePlan plan;
  plan.info = meta_;
  plan.info.token_ids.clear();
  plan.info.positions.clear();
  plan.info.pieces.clear();
  plan.info.logprob.clear();
  plan.capacity = capacity_;
  plan.has_logprob = options_.logprob;
  plan.piece_bytes = options_.piece_bytes;
  for (const int layer : meta_.layers) {
    LayerPlan one;
    one.layer = layer;
    one.has_q = !options_.queries.empty();
    one.q_all = options_.queries.size() == static_cast<std::size_t>(capacity_);
    one.q_index = options_.queries;
    one.out_index = options_.outputs;
    one.out_type = options_.out_type;
    one.hidden = options_.hidden;
    one.w_o_type = options_.w_o_type;
    for (const std::string& name : options_.scores) {
      one.scores.emplace_back(name, ElementType::f32);
    }
    plan.layers.push_back(std::move(one));
  }

  working_ = options_.profile == Profile::archive ? std::filesystem::path(path_.string() + ".working") : path_;
  part_ = hdf5::File::part_of(working_);
  fd_ = open_alone(part_);
  try {
    hdf5::File file = hdf5::File::create(working_);
    const hdf5::Group& root = file.root();
    write_skeleton(root, plan, 0);
    for (const LayerPlan& layer : plan.layers) {
      LayerState& state = layers_[layer.layer];
      const auto learn = [&](const std::string& name) {
        const hdf5::Dataset dataset = array_dataset(root, layer.layer, name);
        const hdf5::Shape shape = dataset.shape();
        const hdf5::Type type = dataset.type();
        Array& array = state.arrays[name];
        array.offset = dataset.storage().extents.front().offset;
        array.type = type == hdf5::Type::f16    ? ElementType::f16
                     : type == hdf5::Type::bf16 ? ElementType::bf16
                                                : ElementType::f32;
        const bool matrix = name == schema::kWO;
        array.n_rows = shape[matrix ? 0 : 1];
        array.row_bytes = (matrix ? shape[1] : shape.size() == 3 ? shape[2] : 1) * size_of(array.type);
      };
      learn(schema::kK);
      learn(schema::kV);
      if (layer.has_q) {
        learn(schema::kQ);
      }
      if (!layer.out_index.empty()) {
        learn(schema::kOut);
      }
      if (layer.hidden > 0) {
        learn(schema::kWO);
      }
      for (const std::string& name : options_.scores) {
        learn(std::string(schema::kScores) + "/" + name);
      }
    }
    const hdf5::Group tokens = root.group(schema::kTokens);
    const auto learn_column = [&](const hdf5::Group& group, const char* name) {
      columns_[name] = group.dataset(name).storage().extents.front().offset;
    };
    learn_column(tokens, schema::kId);
    learn_column(tokens, schema::kPosition);
    if (options_.logprob) {
      learn_column(tokens, schema::kLogprob);
    }
    if (options_.piece_bytes > 0) {
      learn_column(tokens, schema::kPiece);
    }
    learn_column(root, schema::kNValid);
    file.close();
  } catch (const hdf5::StorageError& error) {
    discard();  // nothing of use is in it yet
    throw TraceError(error.what());
  }
}

TraceWriter::~TraceWriter() {
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

TraceWriter::LayerState& TraceWriter::layer_state(int layer) {
  const auto at = layers_.find(layer);
  if (at == layers_.end()) {
    throw std::invalid_argument(
        fmt::format("layer {} was not announced; the layers are {}", layer, fmt::join(meta_.layers, ", ")));
  }
  return at->second;
}

void TraceWriter::write_at(std::uint64_t offset, std::span<const std::byte> data) {
  if (fd_ < 0) {
    throw std::invalid_argument(part_.string() + " is closed already");
  }
  std::size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = ::pwrite(fd_, data.data() + done, data.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      throw TraceError(part_.string() + ": cannot be written (" + errno_text() + ")");
    }
    done += static_cast<std::size_t>(n);
  }
}

void TraceWriter::flush() {
  if (::fdatasync(fd_) != 0 && errno != EINVAL) {
    throw TraceError(part_.string() + ": cannot be flushed to disk (" + errno_text() + ")");
  }
}

void TraceWriter::append_tokens(std::span<const std::int32_t> ids, std::span<const std::int32_t> positions,
                                std::span<const float> logprob, std::span<const std::string> pieces) {
  const std::uint64_t first = u64(n_tokens_);
  if (ids.size() > u64(capacity_) - first) {
    throw std::invalid_argument(
        fmt::format("{} more tokens do not fit: {} of {} are written", ids.size(), n_tokens_, capacity_));
  }
  if (!positions.empty()) {
    expect_size("positions", ids.size(), positions.size());
  }
  expect_size("logprob", options_.logprob ? ids.size() : 0, logprob.size());
  expect_size("pieces", options_.piece_bytes > 0 ? ids.size() : 0, pieces.size());
  write_at(columns_[schema::kId] + first * sizeof(std::int32_t), std::as_bytes(ids));
  write_at(columns_[schema::kPosition] + first * sizeof(std::int32_t), std::as_bytes(positions));
  if (options_.logprob) {
    write_at(columns_[schema::kLogprob] + first * sizeof(float), std::as_bytes(logprob));
  }
  if (options_.piece_bytes > 0) {
    std::vector<char> raw(pieces.size() * options_.piece_bytes, '\0');
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      if (pieces[i].size() > options_.piece_bytes) {
        throw std::invalid_argument(
            fmt::format("a piece has {} bytes, but there is room for {}", pieces[i].size(), options_.piece_bytes));
      }
      std::copy(pieces[i].begin(), pieces[i].end(),
                raw.begin() + static_cast<std::ptrdiff_t>(i * options_.piece_bytes));
    }
    write_at(columns_[schema::kPiece] + first * options_.piece_bytes, hdf5::bytes_of(raw));
  }
  n_tokens_ += static_cast<Pos>(ids.size());
}

Pos TraceWriter::n_stored_queries(int layer, Pos n) const {
  const auto at = layers_.find(layer);
  const Pos first = at == layers_.end() ? 0 : at->second.n_rows;
  const auto& index = options_.queries;
  return static_cast<Pos>(std::lower_bound(index.begin(), index.end(), first + n) -
                          std::lower_bound(index.begin(), index.end(), first));
}

// `data` is (heads, n, width); row `first` is where the rows go in each head.
void TraceWriter::write_rows(const Array& array, int heads, std::uint64_t first, std::uint64_t n,
                             std::span<const std::byte> data, const char* name) {
  const std::uint64_t per_head = n * array.row_bytes;
  expect_size(std::string(name) + " (bytes)", u64(heads) * per_head, data.size());
  if (first + n > array.n_rows) {
    throw std::invalid_argument(
        fmt::format("{}: {} more rows do not fit: {} of {} are written", name, n, first, array.n_rows));
  }
  for (std::uint64_t head = 0; head < u64(heads); ++head) {
    write_at(array.offset + (head * array.n_rows + first) * array.row_bytes, data.subspan(head * per_head, per_head));
  }
}

void TraceWriter::append(int layer, Pos n, std::span<const std::byte> k, std::span<const std::byte> v,
                         std::span<const std::byte> q) {
  LayerState& state = layer_state(layer);
  if (n < 0) {
    throw std::invalid_argument(fmt::format("{} rows cannot be appended", n));
  }
  const Pos n_queries = n_stored_queries(layer, n);
  write_rows(state.arrays[schema::kK], meta_.n_kv_heads, u64(state.n_rows), u64(n), k, schema::kK);
  write_rows(state.arrays[schema::kV], meta_.n_kv_heads, u64(state.n_rows), u64(n), v, schema::kV);
  if (n_queries > 0) {
    write_rows(state.arrays[schema::kQ], meta_.n_heads, u64(state.n_queries), u64(n_queries), q, schema::kQ);
  } else {
    expect_size("q (bytes)", 0, q.size());
  }
  state.n_rows += n;
  state.n_queries += n_queries;
}

std::vector<std::byte> TraceWriter::narrowed(ElementType type, std::span<const float> values, const char* name) const {
  std::vector<std::byte> out(values.size() * size_of(type));
  narrow(type, values, out.data());
  std::vector<float> back(values.size());
  if (!widen(type, out.data(), back)) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(back[i])) {
        throw std::invalid_argument(
            std::isfinite(values[i])
                ? fmt::format("{}: the value {} does not fit {}; store the trace as f32 or bf16", name, values[i],
                              name_of(type))
                : fmt::format("{}: expected finite values, found {} at element {}", name, values[i], i));
      }
    }
  }
  return out;
}

void TraceWriter::append(int layer, Pos n, std::span<const float> k, std::span<const float> v,
                         std::span<const float> q) {
  append(layer, n, narrowed(meta_.element, k, schema::kK), narrowed(meta_.element, v, schema::kV),
         narrowed(meta_.element, q, schema::kQ));
}

void TraceWriter::write_values(const Array& array, std::uint64_t head, std::uint64_t row,
                               std::span<const float> values) {
  write_at(array.offset + (head * array.n_rows + row) * array.row_bytes, narrowed(array.type, values, "values"));
}

void TraceWriter::write_output(int layer, Pos pos, std::span<const float> out) {
  LayerState& state = layer_state(layer);
  const auto at = std::lower_bound(options_.outputs.begin(), options_.outputs.end(), pos);
  if (at == options_.outputs.end() || *at != pos) {
    throw std::invalid_argument(fmt::format("token {} is not among those whose outputs were announced", pos));
  }
  const std::size_t width = static_cast<std::size_t>(meta_.v_head_dim);
  expect_size("out", u64(meta_.n_heads) * width, out.size());
  for (std::size_t head = 0; head < static_cast<std::size_t>(meta_.n_heads); ++head) {
    write_values(state.arrays[schema::kOut], head, u64(at - options_.outputs.begin()),
                 out.subspan(head * width, width));
  }
}

void TraceWriter::write_w_o(int layer, std::span<const float> w_o) {
  LayerState& state = layer_state(layer);
  expect_size("w_o", u64(options_.hidden) * u64(meta_.n_heads) * u64(meta_.v_head_dim), w_o.size());
  if (options_.hidden > 0) {
    write_values(state.arrays[schema::kWO], 0, 0, w_o);
  }
}

void TraceWriter::write_scores(int layer, const std::string& name, int kv_head, std::span<const float> scores) {
  LayerState& state = layer_state(layer);
  const auto at = state.arrays.find(std::string(schema::kScores) + "/" + name);
  if (at == state.arrays.end()) {
    throw std::invalid_argument("scores named '" + name + "' were not announced");
  }
  if (kv_head < 0 || kv_head >= meta_.n_kv_heads || scores.size() > u64(capacity_)) {
    throw std::invalid_argument(fmt::format("scores of {} tokens for KV head {} do not fit ({} heads, {} tokens)",
                                            scores.size(), kv_head, meta_.n_kv_heads, capacity_));
  }
  write_values(at->second, u64(kv_head), 0, scores);
}

void TraceWriter::commit(Pos n) {
  if (n < n_committed_ || n > n_tokens_) {
    throw std::invalid_argument(
        fmt::format("{} tokens cannot be committed: {} are, and {} were appended", n, n_committed_, n_tokens_));
  }
  for (const auto& [layer, state] : layers_) {
    if (state.n_rows < n) {
      throw std::invalid_argument(
          fmt::format("{} tokens cannot be committed: layer {} has rows of {}", n, layer, state.n_rows));
    }
  }
  flush();
  const std::uint64_t valid = u64(n);
  write_at(columns_[schema::kNValid], std::as_bytes(std::span(&valid, 1)));
  n_committed_ = n;
}

void TraceWriter::close() {
  Pos n = n_tokens_;
  for (const auto& [layer, state] : layers_) {
    n = std::min(n, state.n_rows);
  }
  if (n == 0) {
    throw std::invalid_argument(part_.string() + " holds no whole token, so there is no trace to close");
  }
  commit(n);
  flush();
  const Held held{std::exchange(fd_, -1)};  // nobody else writes the file before it has its final name
  try {
    if (options_.profile == Profile::archive) {
      repack(part_, path_, {.profile = Profile::archive, .archive = options_.archive});
      std::filesystem::remove(part_);
      return;
    }
    const TraceReader written(part_);
    const TraceHashes hashes = hash_trace(written);
    hdf5::File file = hdf5::File::open_write(part_);
    seal(file.root(), written.info(), hashes);
    file.close();
    hdf5::publish_file(part_, path_);
  } catch (const hdf5::StorageError& error) {
    throw TraceError(error.what());
  }
}

void TraceWriter::discard() {
  const Held held{std::exchange(fd_, -1)};
  std::error_code ignored;
  std::filesystem::remove(part_, ignored);
}

}  // namespace kvreplay
