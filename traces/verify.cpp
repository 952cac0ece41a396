#include "traces/verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "traces/hash.hpp"
#include "traces/schema.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {
namespace {

constexpr Pos kEvidenceTokens = 2048;  // enough for the statistics, and cheap

std::size_t size(std::int64_t value) { return static_cast<std::size_t>(value); }

double tolerance_of(ElementType type) {
  switch (type) {
    case ElementType::f16:
      return 2e-3;
    case ElementType::bf16:
      return 1.5e-2;
    case ElementType::f32:
      return 1e-5;
  }
  return 0;
}

// Attention of one query over tokens [begin, pos], in float64 and in the most obvious way.
std::vector<double> attend(const TraceInfo& info, std::span<const float> q, std::span<const float> k,
                           std::span<const float> v, Pos begin, Pos pos) {
  const std::size_t d = size(info.head_dim), dv = size(info.v_head_dim);
  std::vector<double> logits;
  double largest = -INFINITY;
  for (Pos token = begin; token <= pos; ++token) {
    double dot = 0;
    for (std::size_t i = 0; i < d; ++i) {
      dot += static_cast<double>(q[i]) * static_cast<double>(k[size(token) * d + i]);
    }
    dot *= info.attention_scale;
    if (info.logit_softcap > 0) {
      dot = info.logit_softcap * std::tanh(dot / info.logit_softcap);
    }
    logits.push_back(dot);
    largest = std::max(largest, dot);
  }
  std::vector<double> out(dv, 0.0);
  double total = 0;
  for (Pos token = begin; token <= pos; ++token) {
    const double weight = std::exp(logits[size(token - begin)] - largest);
    total += weight;
    for (std::size_t i = 0; i < dv; ++i) {
      out[i] += weight * static_cast<double>(v[size(token) * dv + i]);
    }
  }
  for (double& x : out) {
    x /= total;
  }
  return out;
}

OutputCheck check_outputs(const TraceReader& trace, int layer) {
  const TraceInfo& info = trace.info();
  const std::size_t d = size(info.head_dim), dv = size(info.v_head_dim), n = size(info.n_tokens);
  OutputCheck check;
  check.layer = layer;
  check.tolerance = std::max(tolerance_of(info.element), tolerance_of(trace.array(layer, schema::kOut).type()));
  std::vector<float> k(n * d), v(n * dv), q(d),
      stored(dv);  // (n_tokens, .) of one KV head; (.) of one query
  const int window = info.sliding_window[size(layer)];
  const std::span<const Pos> queries = trace.q_index(layer);
  for (int kv_head = 0; kv_head < info.n_kv_heads; ++kv_head) {
    trace.read_k(layer, kv_head, 0, info.n_tokens, k);
    trace.read_v(layer, kv_head, 0, info.n_tokens, v);
    for (int head = kv_head * info.group_size; head < (kv_head + 1) * info.group_size; ++head) {
      for (const Pos pos : trace.out_index(layer)) {
        if (!std::binary_search(queries.begin(), queries.end(), pos)) {
          continue;
        }
        trace.read_q(layer, head, pos, pos + 1, q);
        trace.read_out(layer, head, pos, pos + 1, stored);
        const Pos begin = window > 0 ? std::max(0, pos - window + 1) : 0;
        const std::vector<double> out = attend(info, q, k, v, begin, pos);
        double difference = 0, norm = 0;
        for (std::size_t i = 0; i < dv; ++i) {
          const double x = static_cast<double>(stored[i]);
          difference += (out[i] - x) * (out[i] - x);
          norm += x * x;
        }
        const double error = difference == 0 ? 0 : std::sqrt(difference / norm);
        ++check.n;
        if (!(error <= check.worst)) {
          check.worst = error;
          check.worst_head = head;
          check.worst_pos = pos;
        }
      }
    }
  }
  return check;
}

struct Pairs {
  std::size_t step, stride;  // pair i is channels (i * step, i * step + stride)
};

Pairs pairs_of(const std::string& style, int rotary_dim) {
  return style == schema::kStyleHalf ? Pairs{1, size(rotary_dim) / 2} : Pairs{2, 1};
}

// Mean over pairs of std / mean of the pair's norm over tokens. A wrong pairing mixes channels that
// turn at different rates, so that the norm beats.
double norm_spread(std::span<const float> keys, std::size_t d, const Rope& rope, const std::string& style) {
  const Pairs pairs = pairs_of(style, rope.rotary_dim);
  const std::size_t n = keys.size() / d, n_pairs = rope.inv_freq.size();
  double total = 0;
  for (std::size_t i = 0; i < n_pairs; ++i) {
    double sum = 0, squares = 0;
    for (std::size_t t = 0; t < n; ++t) {
      const double a = static_cast<double>(keys[t * d + i * pairs.step]);
      const double b = static_cast<double>(keys[t * d + i * pairs.step + pairs.stride]);
      sum += std::sqrt(a * a + b * b);
      squares += a * a + b * b;
    }
    const double mean = sum / static_cast<double>(n);
    const double variance = squares / static_cast<double>(n) - mean * mean;
    total += mean > 0 ? std::sqrt(std::max(variance, 0.0)) / mean : 0;
  }
  return total / static_cast<double>(n_pairs);
}

// Mean resultant length of the pairs after turning each key back by position * inv_freq * factor;
// only pairs that turn at least once over the trace can tell.
double resultant(std::span<const float> keys, std::size_t d, const Rope& rope, const std::string& style,
                 std::span<const std::int32_t> positions, double factor) {
  const Pairs pairs = pairs_of(style, rope.rotary_dim);
  const std::size_t n = keys.size() / d;
  const double length = static_cast<double>(positions[n - 1]) - static_cast<double>(positions[0]);
  double total = 0;
  int used = 0;
  for (std::size_t i = 0; i < rope.inv_freq.size(); ++i) {
    if (rope.inv_freq[i] * length < 2 * M_PI) {
      continue;
    }
    double x = 0, y = 0, norms = 0;
    for (std::size_t t = 0; t < n; ++t) {
      const double a = static_cast<double>(keys[t * d + i * pairs.step]);
      const double b = static_cast<double>(keys[t * d + i * pairs.step + pairs.stride]);
      const double angle = static_cast<double>(positions[t]) * rope.inv_freq[i] * factor;
      const double c = std::cos(angle), s = std::sin(angle);
      x += a * c + b * s;
      y += b * c - a * s;
      norms += std::sqrt(a * a + b * b);
    }
    total += norms > 0 ? std::sqrt(x * x + y * y) / norms : 0;
    ++used;
  }
  return used > 0 ? total / used : 0;
}

constexpr const char* kSupports = "supports";
constexpr const char* kContradicts = "contradicts";
constexpr const char* kSaysNothing = "says nothing about";

std::string verdict(double declared, double other) {
  constexpr double kMargin = 1.1;  // less than this is noise on short traces
  return declared > kMargin * other ? kSupports : other > kMargin * declared ? kContradicts : kSaysNothing;
}

RopeEvidence rope_evidence(const TraceReader& trace, int layer) {
  const TraceInfo& info = trace.info();
  const Rope& rope = info.rope;
  const std::size_t d = size(info.head_dim);
  const Pos n = std::min(info.n_tokens, kEvidenceTokens);
  const std::string other = rope.style == schema::kStyleHalf ? schema::kStyleInterleaved : schema::kStyleHalf;
  RopeEvidence evidence;
  evidence.layer = layer;
  struct Reading {
    const char* what;
    double factor;
  };
  constexpr Reading kReadings[] = {
      {"frequencies x 0.9", 0.9}, {"frequencies x 1.1", 1.1}, {"not rotated", 0.0}, {"rotated the other way", -1.0}};
  for (const Reading& reading : kReadings) {
    evidence.perturbed.push_back({reading.what, 0});
  }
  std::vector<float> keys(size(n) * d);  // (n, head_dim)
  const double share = 1.0 / info.n_kv_heads;
  for (int kv_head = 0; kv_head < info.n_kv_heads; ++kv_head) {
    trace.read_k(layer, kv_head, 0, n, keys);
    evidence.spread_declared += share * norm_spread(keys, d, rope, rope.style);
    evidence.spread_other_pairing += share * norm_spread(keys, d, rope, other);
    evidence.resultant_declared += share * resultant(keys, d, rope, rope.style, info.positions, 1.0);
    evidence.resultant_other_pairing += share * resultant(keys, d, rope, other, info.positions, 1.0);
    for (std::size_t i = 0; i < evidence.perturbed.size(); ++i) {
      evidence.perturbed[i].resultant +=
          share * resultant(keys, d, rope, rope.style, info.positions, kReadings[i].factor);
    }
  }
  double best = 0;
  for (const RopeEvidence::Perturbed& perturbed : evidence.perturbed) {
    best = std::max(best, perturbed.resultant);
  }
  // Norms tell the pairings apart by a few percent only, so that both statistics must agree.
  const bool steadier = evidence.spread_declared < evidence.spread_other_pairing;
  const std::string pairing = verdict(evidence.resultant_declared, evidence.resultant_other_pairing);
  evidence.pairing = pairing == (steadier ? kSupports : kContradicts) ? pairing : kSaysNothing;
  evidence.frequencies = verdict(evidence.resultant_declared, best);
  return evidence;
}

// Reads every value of every array, which refuses what is not finite.
void read_everything(const TraceReader& trace, int layer) {
  std::vector<float> rows;
  for (const std::string& name : trace.array_names(layer)) {
    const StoredArray& array = trace.array(layer, name);
    rows.resize(array.n_rows() * array.width());
    for (std::uint64_t head = 0; head < array.n_heads(); ++head) {
      array.read(head, 0, array.n_rows(), rows);
    }
  }
}

}  // namespace

VerifyReport verify(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  VerifyReport report;
  const TraceHashes hashes = hash_trace(trace);
  report.hash = hashes.content;
  report.hash_stored = !info.content_hash.empty();
  for (const int layer : info.layers) {
    for (const std::string& name : trace.array_names(layer)) {
      const std::string path = array_path(layer, name), stored = trace.array_hash(layer, name);
      if (!stored.empty() && stored != hashes.arrays.at(path)) {
        report.failures.push_back(
            fmt::format("/{}: expected SHA-256 {}, found {}", path, stored, hashes.arrays.at(path)));
      }
    }
  }
  if (report.hash_stored && info.content_hash != hashes.content) {
    report.failures.push_back(fmt::format("content_hash: expected {}, found {}", info.content_hash, hashes.content));
  }
  for (const int layer : info.layers) {
    trace.check_unchanged();
    read_everything(trace, layer);
    if (trace.has_out(layer)) {
      const OutputCheck check = check_outputs(trace, layer);
      if (!check.holds()) {
        report.failures.push_back(
            fmt::format("/layers/{:03}/out: expected attention from q, k, v within {:g}, found a "
                        "relative error of {:.3g} at head "
                        "{}, token {}; scale, mask, soft-cap or rotation are not as declared",
                        layer, check.tolerance, check.worst, check.worst_head, check.worst_pos));
      }
      report.outputs.push_back(check);
    } else if (info.rope.present && info.n_tokens >= 64) {
      report.evidence.push_back(rope_evidence(trace, layer));
    }
  }
  return report;
}

std::string VerifyReport::text() const {
  std::string text = fmt::format("content   {}  {}\n", hash,
                                 hash_stored ? "(compared with the stored hash)" : "(the file stores no hash)");
  for (const OutputCheck& check : outputs) {
    text += fmt::format(
        "layer {:<3} {} outputs recomputed in float64, largest relative error {:.2e} (tolerance "
        "{:g}): {}\n",
        check.layer, check.n, check.worst, check.tolerance, check.holds() ? "proved" : "refuted");
  }
  for (const RopeEvidence& one : evidence) {
    text += fmt::format(
        "layer {:<3} evidence only: pair norms vary by {:.3f} as declared, {:.3f} with the other "
        "pairing; un-rotated keys agree to {:.3f} as declared, {:.3f} with the other pairing ({} "
        "the declared style)",
        one.layer, one.spread_declared, one.spread_other_pairing, one.resultant_declared, one.resultant_other_pairing,
        one.pairing);
    for (const RopeEvidence::Perturbed& perturbed : one.perturbed) {
      text += fmt::format(", {:.3f} {}", perturbed.resultant, perturbed.what);
    }
    text += fmt::format(" ({} the declared frequencies and positions)\n", one.frequencies);
  }
  text += failures.empty() ? "verified\n" : "not verified\n";
  for (const std::string& failure : failures) {
    text += "  " + failure + "\n";
  }
  return text;
}

}  // namespace kvreplay
