#include "traces/synth.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include "traces/schema.hpp"
#include "traces/writer.hpp"

namespace kvreplay {
namespace {

std::size_t size(std::int64_t value) { return static_cast<std::size_t>(value); }

// Elementary functions from + - * / alone. This file is compiled without contraction, so that no
// machine fuses what another rounds twice, and no mathematical library has a say in the bytes.

double exactly_log(double x) {  // x > 0
  int exponent = 0;
  const double m = std::frexp(x, &exponent);  // exact
  const double z = (m - 0.75) / (m + 0.75);   // log(m / 0.75) = 2 artanh z, |z| <= 0.2
  double sum = 0, power = z;
  for (int i = 1; i < 40; i += 2) {
    sum += power / i;
    power *= z * z;
  }
  constexpr double kLog2 = 0.693147180559945309, kLog075 = -0.287682072451780927;
  return 2 * sum + kLog075 + exponent * kLog2;
}

double exactly_exp(double x) {
  const double small = x / 1024;
  double sum = 1, term = 1;
  for (int i = 1; i < 16; ++i) {
    term *= small / i;
    sum += term;
  }
  for (int i = 0; i < 10; ++i) {
    sum *= sum;
  }
  return sum;
}

struct Turn {
  double cos = 1, sin = 0;
};

Turn exactly_turn(double angle) {
  constexpr double kHalfPi = 1.57079632679489662;
  const double quarter = std::floor(angle / kHalfPi + 0.5);
  const double x = angle - quarter * kHalfPi, x2 = x * x;
  double c = 0, s = 0, term = 1;
  for (int i = 0; i < 20; i += 2) {
    c += term;
    s += term * x / (i + 1);
    term *= -x2 / ((i + 1) * (i + 2));
  }
  switch (static_cast<std::int64_t>(quarter) & 3) {
    case 0:
      return {c, s};
    case 1:
      return {-s, c};
    case 2:
      return {-c, -s};
    default:
      return {s, -c};
  }
}

// Counter-based: a value is a function of the seed and of what it is for, never of what was drawn
// before it.
class Noise {
 public:
  explicit Noise(std::uint64_t seed) : seed_(seed) {}

  std::uint64_t bits(std::uint64_t stream, std::uint64_t index) const {
    return mix(mix(seed_ + 0x9e3779b97f4a7c15U * (stream + 1)) + 0xd1342543de82ef95U * (index + 1));
  }
  // Sum of four 16-bit uniforms, centred and scaled to variance 1: bell-shaped enough, and exact.
  double bell(std::uint64_t stream, std::uint64_t index) const {
    const std::uint64_t b = bits(stream, index);
    const auto sum = static_cast<std::int64_t>((b & 0xffffU) + (b >> 16 & 0xffffU) + (b >> 32 & 0xffffU) + (b >> 48));
    return static_cast<double>(sum - 2 * 65535) * (1.7320508075688772 / 65536);
  }

 private:
  // The finaliser of splitmix64 (Steele, Lea, Flood 2014).
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    return z ^ z >> 31;
  }
  std::uint64_t seed_;
};

enum Stream : std::uint64_t { kTokenStream, kTopicStream, kVectorStream, kHeadStream = 1000 };

constexpr int kTopics = 32, kVocabulary = 4096;

// What one KV head likes: the pattern of its queries.
enum class Kind { local, retrieval, diffuse };

// Unit direction number `index`, in pairs [first, last) of a head: (n_pairs, 2).
std::vector<double> direction(const Noise& noise, std::uint64_t index, int n_pairs, int first, int last) {
  std::vector<double> vector(size(2 * n_pairs), 0.0);
  double squares = 0;
  for (int i = 2 * first; i < 2 * last; ++i) {
    vector[size(i)] = noise.bell(kVectorStream, index * 65536 + static_cast<std::uint64_t>(i));
    squares += vector[size(i)] * vector[size(i)];
  }
  const double norm = std::sqrt(squares);
  for (double& x : vector) {
    x = norm > 0 ? x / norm : 0;
  }
  return vector;
}

void add(std::span<double> to, std::span<const double> vector, double factor) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    to[i] += factor * vector[i];
  }
}

void validate(const SynthOptions& o) {
  const auto require = [](bool holds, const std::string& sentence) {
    if (!holds) {
      throw std::invalid_argument(sentence);
    }
  };
  require(o.head_dim >= 4 && o.head_dim % 2 == 0 && o.head_dim <= schema::kMaxHeadDim,
          fmt::format("head_dim {} must be even and from 4 to {}", o.head_dim, schema::kMaxHeadDim));
  require(o.n_tokens >= 1, fmt::format("tokens {} must be at least 1", o.n_tokens));
  require(o.sinks >= 0, fmt::format("sinks {} must not be negative", o.sinks));
  require(o.hidden >= 0 && o.hidden <= schema::kMaxHidden,
          fmt::format("hidden {} must be from 0 to {}", o.hidden, schema::kMaxHidden));
  require(std::isfinite(o.theta) && o.theta > 1, fmt::format("rope_theta {} must be greater than 1", o.theta));
}

}  // namespace

std::vector<Pos> parse_queries(const std::string& text, Pos prompt_len, Pos n_tokens) {
  if (text == "all") {
    return queries_all(n_tokens);
  }
  if (text == "decode") {
    return queries_decode(prompt_len, n_tokens);
  }
  constexpr std::string_view kWindow = "window:";
  if (text.starts_with(kWindow)) {
    Pos window = 0;
    const char* const end = text.data() + text.size();
    const auto [at, error] = std::from_chars(text.data() + kWindow.size(), end, window);
    if (error == std::errc() && at == end && window >= 0) {
      return queries_window(window, prompt_len, n_tokens);
    }
  }
  throw std::invalid_argument("queries '" + text + "' is unknown; allowed are all, decode and window:N");
}

void synthesize(const std::filesystem::path& out, const SynthOptions& options) {
  validate(options);
  TraceInfo meta;
  meta.model_name = "synthetic";
  meta.architecture = "synthetic";
  meta.provenance =
      fmt::format("Synthetic (seed {}): for tests of scale and code, not evidence about models.", options.seed);
  meta.generator = options.generator;
  meta.n_layers = options.n_layers;
  meta.n_heads = options.n_heads;
  meta.n_kv_heads = options.n_kv_heads;
  meta.head_dim = meta.v_head_dim = options.head_dim;
  meta.attention_scale = 1 / std::sqrt(static_cast<double>(options.head_dim));
  meta.prompt_len = options.prompt_len;
  meta.element = options.element;
  meta.dtype = name_of(options.element);
  for (int layer = 0; layer < options.n_layers; ++layer) {
    meta.layers.push_back(layer);
  }
  meta.rope.present = true;
  meta.rope.style = options.style;
  meta.rope.theta = options.theta;
  meta.rope.rotary_dim = options.head_dim;
  const int n_pairs = options.head_dim / 2;
  const double log_theta = exactly_log(options.theta);
  for (int i = 0; i < n_pairs; ++i) {
    meta.rope.inv_freq.push_back(exactly_exp(-log_theta * i / n_pairs));
  }

  WriterOptions writing;
  writing.profile = options.profile;
  writing.queries = parse_queries(options.queries, options.prompt_len, options.n_tokens);
  writing.hidden = options.hidden;

  TraceWriter writer(out, meta, options.n_tokens, writing);
  try {
    const Noise noise(options.seed);
    const int n_heads = options.n_heads, n_kv_heads = options.n_kv_heads, group_size = n_heads / n_kv_heads;
    const std::size_t d = size(options.head_dim);
    const bool half = options.style == schema::kStyleHalf;

    // Slow pairs carry content, which must not depend on distance; those that turn once in 16 to
    // 256 tokens carry "how far away". In a small head, each has at least one pair.
    int local_first = 0, local_last = 0;
    for (int i = 0; i < n_pairs; ++i) {
      const double wavelength = 6.283185307179586 / meta.rope.inv_freq[size(i)];
      local_first += wavelength < 16 ? 1 : 0;
      local_last += wavelength < 256 ? 1 : 0;
    }
    local_first = std::min(local_first, n_pairs - 2);
    local_last = std::clamp(local_last, local_first + 1, n_pairs - 1);
    const std::vector<double> sink = direction(noise, 0, n_pairs, n_pairs - 1, n_pairs);
    const std::vector<double> common = direction(noise, 1, n_pairs, 0, n_pairs);
    const std::vector<double> nearby = direction(noise, 2, n_pairs, local_first, local_last);
    std::vector<std::vector<double>> topics, values;  // (kTopics, head_dim)
    for (std::uint64_t topic = 0; topic < kTopics; ++topic) {
      topics.push_back(direction(noise, 10 + topic, n_pairs, local_last, n_pairs));
      values.push_back(direction(noise, 10 + kTopics + topic, n_pairs, 0, n_pairs));
    }
    // Two vectors of this length that agree have a logit of `logit`.
    const auto length = [&](double logit) { return std::sqrt(logit / meta.attention_scale); };

    std::vector<std::int32_t> ids(size(options.n_tokens));
    for (std::size_t t = 0; t < ids.size(); ++t) {
      // The smaller of two draws: frequent and rare tokens.
      const std::uint64_t b = noise.bits(kTokenStream, t);
      ids[t] = static_cast<std::int32_t>(std::min(b % kVocabulary, (b >> 32) % kVocabulary));
    }
    writer.append_tokens(ids);

    const auto place = [&](std::span<const double> pairs, std::span<const Turn> turns, float* row) {
      for (std::size_t i = 0; i < size(n_pairs); ++i) {
        const Turn turn = turns.empty() ? Turn{} : turns[i];
        const double a = pairs[2 * i], b = pairs[2 * i + 1];
        row[half ? i : 2 * i] = static_cast<float>(a * turn.cos - b * turn.sin);
        row[half ? i + size(n_pairs) : 2 * i + 1] = static_cast<float>(b * turn.cos + a * turn.sin);
      }
    };

    constexpr Pos kBlock = 256;
    std::vector<Turn> turns;        // (block, n_pairs)
    std::vector<double> vector(d);  // one row before rotation, pair by pair
    std::vector<float> k, v, q;     // (heads, block, head_dim)
    for (Pos begin = 0; begin < options.n_tokens; begin += kBlock) {
      const Pos n = std::min(kBlock, options.n_tokens - begin);
      turns.resize(size(n) * size(n_pairs));
      for (Pos t = 0; t < n; ++t) {
        for (int i = 0; i < n_pairs; ++i) {
          turns[size(t) * size(n_pairs) + size(i)] = exactly_turn((begin + t) * meta.rope.inv_freq[size(i)]);
        }
      }
      for (const int layer : meta.layers) {
        const Pos n_queries = writer.n_stored_queries(layer, n);
        k.resize(size(n_kv_heads) * size(n) * d);
        v.resize(k.size());
        q.resize(size(n_heads) * size(n_queries) * d);
        for (int kv_head = 0; kv_head < n_kv_heads; ++kv_head) {
          const Kind kind = static_cast<Kind>((layer + kv_head) % 3);
          const std::uint64_t stream =
              kHeadStream + 4096U * static_cast<std::uint64_t>(layer) + 4U * static_cast<std::uint64_t>(kv_head);
          for (Pos t = 0; t < n; ++t) {
            const Pos pos = begin + t;
            const std::uint64_t row = static_cast<std::uint64_t>(pos) * d;
            const std::size_t topic = size(ids[size(pos)]) % kTopics;
            const std::span<const Turn> turn(turns.data() + size(t) * size(n_pairs), size(n_pairs));
            const std::size_t at = (size(kv_head) * size(n) + size(t)) * d;
            for (std::size_t i = 0; i < d; ++i) {
              vector[i] = 0.7 * noise.bell(stream, row + i);
            }
            add(vector, common, length(2));
            add(vector, nearby, length(4));
            add(vector, topics[topic], length(5));
            add(vector, sink, pos < options.sinks ? length(8) : -length(0.5));
            place(vector, turn, k.data() + at);
            for (std::size_t i = 0; i < d; ++i) {
              vector[i] = 0.3 * noise.bell(stream + 1, row + i);
            }
            add(vector, common, 0.3);
            add(vector, values[topic], 1);
            for (std::size_t i = 0; i < d; ++i) {
              vector[i] *= pos < options.sinks ? 0.05 : 1;  // sinks say nothing
            }
            place(vector, {}, v.data() + at);
          }
          for (int head = kv_head * group_size; head < (kv_head + 1) * group_size; ++head) {
            for (Pos t = n - n_queries; t < n; ++t) {
              const Pos pos = begin + t;
              const std::uint64_t row = (static_cast<std::uint64_t>(pos) * size(n_heads) + size(head)) * d;
              const std::span<const Turn> turn(turns.data() + size(t) * size(n_pairs), size(n_pairs));
              for (std::size_t i = 0; i < d; ++i) {
                vector[i] = 0.7 * noise.bell(stream + 2, row + i);
              }
              // What it looks for: the topic of its own token, or of one drawn anew.
              const std::uint64_t wish = noise.bits(kTopicStream + stream, row) % kTopics;
              add(vector, common, length(0.2));
              add(vector, sink, length(4));
              add(vector, nearby, kind == Kind::local ? length(5) : length(0.3));
              add(vector, topics[wish], kind == Kind::retrieval ? length(6) : length(0.2));
              const std::size_t at = (size(head) * size(n_queries) + size(t - (n - n_queries))) * d;
              place(vector, turn, q.data() + at);
            }
          }
        }
        writer.append(layer, n, k, v, q);
      }
    }
    for (const int layer : meta.layers) {
      if (options.hidden > 0) {
        std::vector<float> w_o(size(options.hidden) * size(n_heads) * d);
        const double scale = 1 / std::sqrt(static_cast<double>(n_heads) * static_cast<double>(d));
        for (std::size_t i = 0; i < w_o.size(); ++i) {
          w_o[i] = static_cast<float>(scale * noise.bell(kHeadStream + 4096U * size(layer) + 3, i));
        }
        writer.write_w_o(layer, w_o);
      }
    }
    writer.close();
  } catch (...) {
    writer.discard();
    throw;
  }
}

}  // namespace kvreplay
